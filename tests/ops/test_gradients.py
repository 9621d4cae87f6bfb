"""Every op and loss: a second derivative is right or refused, and a compiler traces it whatever its numbers are."""

import copy
import math

import pytest
import torch
from tiny import tiny_causal_lm
from turns import by_the_day

from fastalign import backend, losses, ops, use_backend
from fastalign.losses.preference import LOSS_TYPES
from fastalign.models.compiled_layers import CompiledLayers
from fastalign.ops.pairwise import power_score
from fastalign.ops.preference import FUSED

B, T, V, H = 2, 3, 7, 4


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOGITS, HIDDEN, WEIGHT = normal(2 * B, T, V), normal(2 * B, T, H, seed=1), normal(V, H, seed=2)
LABELS = torch.tensor([[1, 2, -100], [0, -100, 6], [3, 3, 3], [5, -100, -100]])
MASK = LABELS != -100
LOGPS, REF = normal(2 * B, seed=3) - 4, normal(2 * B, seed=4) - 4
TOKENS, OLD = normal(2 * B, T, seed=5) / 4 - 1, normal(2 * B, T, seed=6) / 4 - 1
ADVANTAGES, LENGTHS = normal(2 * B, seed=7), MASK.sum(-1)
ADAPTER = normal(2, H, seed=8), normal(V, 2, seed=9)
DESIRABLE = torch.tensor([True, False, True, True])


def both(x):
    """log_probs and entropy, with weights of their own."""
    return x.log_probs + 0.3 * x.entropy


def entropy_too(f, *args, **options):
    return both(f(*args, outputs=("log_probs", "entropy"), **options))


def dpo(kind, divergence="reverse_kl"):
    def f(logps, x):
        lengths = {"chosen_lengths": LENGTHS[:B], "rejected_lengths": LENGTHS[B:]}
        options = {"beta": x, "label_smoothing": x / 4, "discopop_tau": x, "f_alpha_divergence_coef": x}
        result = losses.dpo_loss(
            *logps.chunk(2), *REF.chunk(2), loss_type=kind, f_divergence_type=divergence, **lengths, **options
        )
        return result.losses

    return f, (LOGPS,)


def grpo(kind, **options):
    def f(logprobs, x):
        more = {"max_length": 9} if kind == "dr_grpo" else {}
        high = 1 + x if kind == "cispo" else x
        return losses.grpo_loss(
            logprobs, OLD, ADVANTAGES, MASK, loss_type=kind, clip_range=x, clip_range_high=high, ref_logprobs=OLD,
            kl_coef=x, sapo_temperatures=(x, 1 + x), vespo_positive=(1 + x, 3.0), vespo_negative=(3.0, 2 - x), **more,
            **options,
        ).loss  # fmt: skip

    return f, (TOKENS,)


def module(make, *arguments, **keywords):
    """A loss module of one float option on hidden states, made anew for each number."""
    return lambda h, w, x: make(x)(h, w, LABELS, *arguments, **keywords)[0], (HIDDEN, WEIGHT)


def policy_module(make):
    def f(h, w, x):
        return make(x)(h, w, LABELS.clamp(min=0), ADVANTAGES, mask=MASK, old_logprobs=OLD, ref_logprobs=OLD)[0]

    return f, (HIDDEN, WEIGHT)


OPS = {
    "token_logprobs": (lambda z, x: ops.token_logprobs(z, LABELS, temperature=x), (LOGITS,)),
    "token_logprobs, entropy": (lambda z, x: entropy_too(ops.token_logprobs, z, LABELS, softcap=x), (LOGITS,)),
    "token_logratios": (lambda z, r, x: ops.token_logratios(z, r, LABELS, temperature=x), (LOGITS, LOGITS.flip(0))),
    "linear_token_logprobs": (
        lambda h, w, x: ops.linear_token_logprobs(h, w, LABELS, temperature=x, softcap=1 + x, logit_scale=x),
        (HIDDEN, WEIGHT),
    ),
    "linear_token_logprobs, frozen head": (
        lambda h, x: ops.linear_token_logprobs(h, WEIGHT, LABELS, temperature=x),
        (HIDDEN,),
    ),
    "linear_token_logprobs, bias and adapter": (
        lambda h, bias, a, b, x: entropy_too(
            ops.linear_token_logprobs, h, WEIGHT, LABELS, bias=bias, adapter=(a, b, x), grad_filter=x * 1e-9
        ),
        (HIDDEN, normal(V, seed=10), *ADAPTER),
    ),
    "linear_token_logratios": (
        lambda h, w, x: ops.linear_token_logratios(h, w, HIDDEN.flip(0), WEIGHT.flip(0), LABELS, temperature=x),
        (HIDDEN, WEIGHT),
    ),
} | {
    f"pairwise_loss, {kind}": (
        lambda p, x, kind=kind: (
            ops.pairwise_loss(p, OLD, MASK, beta=x, label_smoothing=x / 4, discopop_tau=x, loss_type=kind).losses
        ),
        (TOKENS,),
    )
    for kind in FUSED
}
LOSSES = {
    **{f"dpo_loss, {kind}": dpo(kind) for kind in LOSS_TYPES},
    **{f"dpo_loss, {kind}": dpo("sigmoid", kind) for kind in ("forward_kl", "js_divergence", "alpha_divergence")},
    "sequence_logps": (lambda p, x: losses.sequence_logps(p, MASK, ld_alpha=x), (TOKENS,)),
    "kto_loss": (
        lambda p, x: losses.kto_loss(p, REF, DESIRABLE, x, beta=x, desirable_weight=x).losses, (LOGPS,)
    ),
    "simpo_loss": (lambda p, x: losses.simpo_loss(*p.chunk(2), beta=x, gamma=x, alpha=x).losses, (LOGPS,)),
    "cpo_loss": (
        lambda p, x: losses.cpo_loss(*p.chunk(2), beta=x, chosen_nll=-p[:B].mean(), cpo_alpha=x).losses, (LOGPS,)
    ),
    "orpo_loss": (lambda p, x: losses.orpo_loss(*p.chunk(2), beta=x, chosen_nll=-p[:B].mean()).losses, (LOGPS,)),
    "bradley_terry_loss": (
        lambda s, x: losses.bradley_terry_loss(*s.chunk(2), margin=x, center_coefficient=x), (LOGPS,)
    ),
    "plackett_luce_loss": (
        lambda s, x: losses.plackett_luce_loss(s * x, torch.tensor([[2, 0], [1, 2], [0, 1], [2, 1]])), (TOKENS,)
    ),
    "ppo_loss": (
        lambda p, x: losses.ppo_loss(
            p, OLD, ADVANTAGES, MASK, clip_range=x, dual_clip=2 + x, ref_logprobs=OLD, kl_coef=x, entropy=-p,
            entropy_coef=x,
        ).loss,
        (TOKENS,),
    ),
    "rloo_loss": (lambda p, x: losses.rloo_loss(p, OLD, ADVANTAGES, MASK, clip_range=x).loss, (TOKENS,)),
    "value_loss": (lambda v, x: losses.value_loss(v, OLD, OLD + 1, MASK, clip_range=x).loss, (TOKENS,)),
    "kl_penalty": (lambda p, x: losses.kl_penalty(p, x * OLD), (TOKENS,)),
    **{f"grpo_loss, {kind}": grpo(kind) for kind in ("grpo", "dapo", "dr_grpo", "gspo", "luspo", "cispo", "sapo",
        "vespo")},
    "grpo_loss, ratio times KL": grpo("dapo", kl_bias_correction=True),
    "LinearDPOLoss": module(lambda x: losses.LinearDPOLoss(beta=x, temperature=x, softcap=1 + x)),
    "LinearDPOLoss, WPO": module(lambda x: losses.LinearDPOLoss(beta=x, use_weighting=True, ld_alpha=x)),
    "LinearCPOLoss": module(lambda x: losses.LinearCPOLoss(beta=x, cpo_alpha=x)),
    "LinearSimPOLoss": module(lambda x: losses.LinearSimPOLoss(beta=x, gamma=x, alpha=x)),
    "LinearORPOLoss": module(lambda x: losses.LinearORPOLoss(beta=x)),
    "LinearKTOLoss": module(lambda x: losses.LinearKTOLoss(beta=x, undesirable_weight=x), DESIRABLE, kl=0.5,
                            ref_logps=REF),
    "LinearPPOLoss": policy_module(lambda x: losses.LinearPPOLoss(clip_range=x, kl_coef=x, entropy_coef=x)),
    "LinearGRPOLoss": policy_module(lambda x: losses.LinearGRPOLoss(clip_range=x, kl_coef=x, entropy_coef=x)),
}  # fmt: skip
ALL = OPS | LOSSES
# Their weights are constants: what is differentiated is no function whose differences could be taken.
STOPPED = ("grpo_loss, cispo", "grpo_loss, vespo", "LinearDPOLoss, WPO")
ALIKE = [f"grpo_loss, {kind}" for kind in ("grpo", "dr_grpo", "luspo", "dapo")]  # in one way of being traced
ALIKE += [f"pairwise_loss, {kind}" for kind in FUSED if kind not in ("sigmoid", "exo_pair", "sigmoid_norm")]
TRACED = [name for name in ALL if name not in ALIKE]
COMPILED = backend.native is not None
BACKENDS = [*["cpu"] * COMPILED, "reference"]


def penalised(f, tensors):
    """The gradient of f + 10 |its gradient|²: with it comes the second derivative."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    grads = torch.autograd.grad(f(*leaves, 0.5).sum(), leaves, create_graph=True)
    return torch.autograd.grad(f(*leaves, 0.5).sum() + 10 * sum(g.square().sum() for g in grads), leaves)


def test_every_loss_is_here():
    tried = {name.split(",")[0] for name in ALL}
    without = {"group_advantages", "whiten", "wpo_weights", "kto_kl", "shift_labels"}
    without |= {"bradley_terry_scores", "gae", "resample", "sample_tokens", "linear_sample_tokens", "map_statistics"}
    parallel = {name for name in ops.__all__ if name.startswith("vocab_parallel")}  # test_vocab_parallel.py
    public = {name for name in (*ops.__all__, *losses.__all__) if name[0].islower() or name.startswith("Linear")}
    assert public - without - parallel == tried


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("on", BACKENDS)
def test_second_derivatives_are_right_or_refused(name, on):
    f, tensors = ALL[name]
    with use_backend("reference"):
        expected = penalised(f, tensors)
    with use_backend(on):
        try:
            result = penalised(f, tensors)
        except RuntimeError as error:
            assert on == "cpu" and "cannot be differentiated again" in str(error)
            assert name in OPS or name.startswith("Linear")
            return
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b)
    if name in STOPPED or on != "reference":
        return
    leaves = [x.clone().requires_grad_() for x in tensors]
    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda *x: f(*x, 0.5), leaves, atol=1e-4, fast_mode=True)


@pytest.mark.skipif(not COMPILED, reason="the native extension is not built")
@pytest.mark.parametrize("name", [name for name in OPS if "pairwise" not in name])
def test_a_second_derivative_is_refused_in_every_way_to_ask_for_it(name):
    f, tensors = OPS[name]
    first = torch.func.grad(lambda x: f(x, *tensors[1:], 0.5).sum())
    leaf = tensors[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf, *tensors[1:], 0.5).sum(), leaf)
    torch.testing.assert_close(first(tensors[0]), expected)
    torch.testing.assert_close(torch.func.vmap(first)(torch.stack([tensors[0]] * 2)), torch.stack([expected] * 2))
    for second in (
        lambda: torch.func.grad(lambda x: first(x).sum())(tensors[0]),
        lambda: torch.func.hessian(lambda x: f(x, *tensors[1:], 0.5).sum())(tensors[0]),
        lambda: torch.autograd.functional.hessian(lambda x: f(x, *tensors[1:], 0.5).sum(), tensors[0]),
    ):
        with pytest.raises(RuntimeError, match=r"cannot be differentiated again|forward mode AD|jvp"):
            second()


@pytest.mark.skipif(not COMPILED, reason="the native extension is not built")
def test_compiled_layers_refuse_too():
    model = tiny_causal_lm(dtype=torch.float32)
    compiled = copy.deepcopy(model)
    ids = torch.tensor([[5, 6, 7, 8]])

    def gradient(of):
        loss = of(input_ids=ids).logits.sum()
        return torch.autograd.grad(loss, list(of.parameters()), create_graph=True, allow_unused=True)

    expected = gradient(model)
    with CompiledLayers.of(compiled):
        assert len(CompiledLayers.of(compiled))
        result = gradient(compiled)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        sum(g.square().sum() for g in result).backward()


def test_a_gradient_of_nothing_is_differentiated_again():
    """Where the gradient that comes in is 0, its slope is not: the Hessian at a minimum."""
    x = torch.tensor([0.3, 1.0], dtype=torch.float64)
    floor = power_score(x, 2.0)
    hessian = torch.autograd.functional.hessian(lambda x: (power_score(x, 2.0) - floor).square().sum(), x)
    torch.testing.assert_close(hessian, torch.diag(2 * (4 * x).exp()))
    huge = torch.tensor([800.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad((0 * power_score(huge, 1.0)).sum(), huge)
    assert grad == 0


@pytest.mark.parametrize("name", by_the_day(TRACED, 12))
def test_traces_at_any_number(name):
    """What is plain torch is traced by dynamo alone, which takes a third of the time."""
    f, tensors = ALL[name]
    torch._dynamo.reset()
    traced = torch.compile(f, backend="aot_eager" if name in OPS else "eager", fullgraph=True, dynamic=True)
    for x in (1.0, 0.7, 0.5):
        result, expected = [], []
        for run, into in ((traced, result), (f, expected)):
            leaves = [t.clone().requires_grad_() for t in tensors]
            out = run(*leaves, x)
            into += [out, *torch.autograd.grad(out.sum(), leaves)]
        for a, b in zip(result, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_numbers_out_of_range_are_still_refused(bad):
    with pytest.raises(ValueError, match=r"temperature must be a positive finite number"):
        ops.token_logprobs(LOGITS, LABELS, temperature=bad)
    with pytest.raises(ValueError, match=r"beta must be a positive finite number"):
        losses.dpo_loss(*LOGPS.chunk(2), None, None, beta=bad)


@pytest.mark.slow_matrix
@pytest.mark.parametrize("on", [*BACKENDS, "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_is_largest_beside_what_is_no_number(bad, dtype, on):
    """Wherever it and the label stand."""
    places = torch.cartesian_prod(torch.arange(V), torch.tensor([0, 3, V - 1]))
    x = LOGITS[0, 0].to(dtype).repeat(len(places), 1)
    x[torch.arange(len(places)), places[:, 1]] = 9
    head, sound = torch.eye(V, dtype=dtype), x.clone()
    x[torch.arange(len(places)), places[:, 0]] = bad
    with use_backend(on):
        for z, expected in ((x, False), (sound, True)):
            result = ops.token_logprobs(z, places[:, 1], outputs=("is_top1", "log_probs"))
            assert (result.is_top1 == expected).all()
            assert (result.log_probs.isfinite() == expected).all()
        for z, expected in ((x, False), (sound, True)):
            assert (ops.linear_token_logprobs(z, head, places[:, 1], outputs=("is_top1",)).is_top1 == expected).all()
