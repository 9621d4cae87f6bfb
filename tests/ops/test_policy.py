"""PPO, GRPO and its variants, RLOO, value loss: against TRL's own code, the papers' formulas and their limits."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastalign
from fastalign import UserError
from fastalign.losses import (
    grpo_loss,
    kl_penalty,
    ppo_loss,
    rloo_loss,
    value_loss,
    whiten,
)
from fastalign.losses.policy import GRPO_LOSS_TYPES
from fastalign.ops.policy import KL, Clip, policy_op, policy_rows, value_op, value_rows

NAN, INF = float("nan"), float("inf")


def problem(rows=6, length=9, dtype=torch.float64, spread=0.4, seed=0, empty=False):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    old = -normal(rows, length).abs() - 0.1
    logprobs, ref = old + spread * normal(rows, length), old + spread * normal(rows, length)
    advantages, entropy = normal(rows), normal(rows, length).abs()
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    lengths[0], lengths[1] = length, 1
    if empty:
        lengths[2] = 0
    mask = torch.arange(length) < lengths
    numbers = [x.to(dtype) for x in (logprobs, old, ref, advantages, entropy)]
    return SimpleNamespace(
        **dict(zip(("logprobs", "old", "ref", "advantages", "entropy"), numbers, strict=True)), mask=mask
    )


def trl_grpo(
    p,
    loss_type,
    *,
    importance="token",
    low=0.2,
    high=0.2,
    delta=None,
    beta=0.0,
    bias=False,
    entropy_coef=0.0,
    max_length=16,
    normalizer=None,
):
    """TRL's GRPOTrainer._compute_loss on given log-probabilities: its loss and its metrics."""
    from trl import GRPOTrainer

    args = SimpleNamespace(
        use_bias_correction_kl=bias,
        delta=delta,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
        steps_per_generation=1,
    )
    same = SimpleNamespace(
        num_processes=1,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        sync_gradients=False,
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (p.logprobs, p.entropy, None), args=args, accelerator=same,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level=importance, beta=beta,
        loss_type=loss_type, epsilon_low=low, epsilon_high=high, use_vllm=False, model=SimpleNamespace(training=True),
        vllm_importance_sampling_correction=False, current_gradient_accumulation_steps=1, aux_loss_enabled=False,
        max_completion_length=max_length, _entropy_bonus_enabled=entropy_coef != 0, use_adaptive_entropy=False,
        entropy_coef=entropy_coef, _metrics={"train": defaultdict(list)},
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )  # fmt: skip
    mask = p.mask.long()
    inputs = {
        "prompt_ids": mask[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": p.advantages,
        "old_per_token_logps": p.old,
        "ref_per_token_logps": p.ref,
        "num_items_in_batch": mask.sum() if normalizer is None else torch.tensor(normalizer),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


def ours_grpo(
    p,
    loss_type,
    *,
    importance=None,
    low=0.2,
    high=0.2,
    delta=None,
    beta=0.0,
    bias=False,
    entropy_coef=0.0,
    max_length=16,
    normalizer=None,
):
    return grpo_loss(
        p.logprobs, p.old, p.advantages, p.mask, loss_type=loss_type, importance=importance, clip_range=low,
        clip_range_high=high, dual_clip=delta, ref_logprobs=p.ref, kl_coef=beta, kl_bias_correction=bias,
        entropy=p.entropy, entropy_coef=entropy_coef, normalizer=normalizer,
        max_length=max_length if loss_type == "dr_grpo" else None,
    )  # fmt: skip


def with_gradient(f, p, *args, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (p.logprobs, p.entropy)]
    result = f(SimpleNamespace(**vars(p) | {"logprobs": leaves[0], "entropy": leaves[1]}), *args, **options)
    loss = result[0]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True) if loss.requires_grad else None
    return result, grads


@pytest.mark.slow_matrix
@pytest.mark.parametrize("empty", [False, True], ids=["", "with an empty row"])
@pytest.mark.parametrize("spread", [0.0, 0.4, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"importance": "sequence", "low": 3e-2, "high": 4e-2},
        {"high": 0.28, "delta": 4.0},
        {"beta": 0.04},
        {"beta": 0.1, "bias": True, "importance": "sequence", "entropy_coef": 0.01},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
@pytest.mark.parametrize("loss_type", sorted(set(GRPO_LOSS_TYPES) - {"gspo"}))
def test_grpo_equals_trls_trainer(each_backend, loss_type, options, dtype, spread, empty):
    p = problem(dtype=dtype, spread=spread, empty=empty)
    if loss_type == "cispo":
        options = options | {"high": 1.2}
    options = {"importance": "token"} | options
    (theirs, metrics), expected = with_gradient(trl_grpo, p, loss_type, **options)
    ours, result = with_gradient(ours_grpo, p, loss_type, **options)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-6
    if loss_type == "sapo":  # whose temperatures TRL rounds to float32, whatever the rest is
        tolerance = max(tolerance, 1e-7)
    # Sums of terms of size `scale` that cancel keep only its digits.
    scale = float(theirs.detach().abs()) + 1
    torch.testing.assert_close(
        ours.loss, theirs, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=tolerance * scale
    )
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=tolerance * float(b.abs().max() + 1))
    near = {"rtol": 10 * tolerance, "atol": tolerance}
    assert ours.entropy.item() == pytest.approx(metrics["entropy"][0], rel=1e-5)
    if options.get("beta") and not options.get("bias"):
        torch.testing.assert_close(ours.kl, torch.tensor(metrics["kl"][0], dtype=dtype), **near)
    if loss_type in ("grpo", "dapo") and not empty:
        assert ours.clip_low.item() == pytest.approx(metrics["clip_ratio/low_mean"][0])
        if "delta" not in options:
            assert ours.clip_high.item() == pytest.approx(metrics["clip_ratio/high_mean"][0])


def test_the_batchs_tokens_divide_dapo_cispo_and_vespo():
    p = problem()
    for loss_type in ("dapo", "cispo", "vespo"):
        theirs, _ = trl_grpo(p, loss_type, high=3.0, normalizer=321)
        torch.testing.assert_close(ours_grpo(p, loss_type, high=3.0, normalizer=321).loss, theirs)
        torch.testing.assert_close(ours_grpo(p, loss_type, high=3.0, normalizer=torch.tensor(321)).loss, theirs)


def test_gspo_and_luspo_take_one_ratio_a_sequence(each_backend):
    p = problem()
    theirs, _ = trl_grpo(p, "grpo", importance="sequence", low=3e-2, high=4e-2)
    torch.testing.assert_close(ours_grpo(p, "gspo", low=3e-2, high=4e-2).loss, theirs)
    theirs, _ = trl_grpo(p, "luspo", importance="sequence")
    torch.testing.assert_close(ours_grpo(p, "luspo").loss, theirs)


def papers_grpo(p, loss_type, low=0.2, high=0.28, beta=0.04, max_length=16, cap=2.0):
    """The papers' objectives as sums over tokens in Python floats."""
    rows = []
    for i in range(len(p.mask)):
        places = p.mask[i].nonzero().flatten().tolist()
        ratios = [math.exp(p.logprobs[i, t] - p.old[i, t]) for t in places]
        if loss_type == "gspo":
            whole = math.prod(ratios) ** (1 / len(ratios))
            ratios = [whole] * len(places)
        a, terms = p.advantages[i].item(), []
        for t, r in zip(places, ratios, strict=True):
            x = math.exp(p.ref[i, t] - p.logprobs[i, t])
            kl = x - math.log(x) - 1
            if loss_type == "cispo":
                gain = min(r, cap) * a * p.logprobs[i, t].item()
            elif loss_type == "sapo":
                tau = 1.0 if a > 0 else 1.05
                gain = 4 / tau / (1 + math.exp(-tau * (r - 1))) * a
            else:
                gain = min(r * a, min(max(r, 1 - low), 1 + high) * a)
            terms.append(-(gain - beta * kl))
        rows.append(terms)
    total, count = sum(map(sum, rows)), sum(map(len, rows))
    if loss_type in ("grpo", "gspo", "sapo"):
        return sum(sum(terms) / len(terms) for terms in rows) / len(rows)
    return total / (len(rows) * max_length) if loss_type == "dr_grpo" else total / count


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "gspo", "cispo", "sapo"])
def test_grpo_equals_the_papers(each_backend, loss_type):
    p = problem(seed=3)
    high = 2.0 if loss_type == "cispo" else 0.28
    result = ours_grpo(p, loss_type, high=high, beta=0.04).loss
    assert result.item() == pytest.approx(papers_grpo(p, loss_type), rel=1e-12)


def test_ppo_equals_the_papers(each_backend):
    """arXiv 1707.06347, eq. 7, with an advantage per token, a KL penalty and an entropy bonus."""
    p = problem(seed=5, spread=0.6)
    advantages = torch.randn(p.mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = kl = entropy = 0.0
    for i, t in p.mask.nonzero().tolist():
        r, a = math.exp(p.logprobs[i, t] - p.old[i, t]), advantages[i, t].item()
        objective = min(r * a, min(max(r, 0.9), 1.3) * a)
        total -= max(objective, 1.5 * a) if a < 0 else objective  # arXiv 1912.09729
        kl += 0.5 * (p.logprobs[i, t] - p.ref[i, t]).item() ** 2
        entropy += p.entropy[i, t].item()
    n = p.mask.sum().item()
    result = ppo_loss(
        p.logprobs, p.old, advantages, p.mask, clip_range=0.1, clip_range_high=0.3, dual_clip=1.5, ref_logprobs=p.ref,
        kl_coef=0.2, kl_estimator="k2", entropy=p.entropy, entropy_coef=0.01,
    )  # fmt: skip
    assert result.loss.item() == pytest.approx((total + 0.2 * kl - 0.01 * entropy) / n, rel=1e-12)
    assert result.policy_loss.item() == pytest.approx(total / n, rel=1e-12)
    assert result.kl.item() == pytest.approx(kl / n) and result.entropy.item() == pytest.approx(entropy / n)
    d = (p.logprobs - p.old)[p.mask]
    assert result.approx_kl.item() == pytest.approx((d.exp() - 1 - d).mean().item())
    assert result.ratio.item() == pytest.approx(d.exp().mean().item())
    a = advantages[p.mask]
    assert result.clip_low.item() == pytest.approx(((d.exp() < 0.9) & (a < 0)).double().mean().item())
    assert result.clip_high.item() == pytest.approx(((d.exp() > 1.3) & (a > 0)).double().mean().item())


def test_ppo_is_grpo_with_other_sums(each_backend):
    p = problem()
    arguments = (p.logprobs, p.old, p.advantages, p.mask)
    for how, loss_type in (("token_mean", "bnpo"), ("seq_mean_token_mean", "grpo")):
        torch.testing.assert_close(
            ppo_loss(*arguments, aggregation=how).loss, grpo_loss(*arguments, loss_type=loss_type).loss
        )
    spread = ppo_loss(p.logprobs, p.old, p.advantages[:, None].expand(p.mask.shape), p.mask)
    torch.testing.assert_close(spread.loss, ppo_loss(*arguments).loss)
    halved = ppo_loss(*arguments, normalizer=2 * p.mask.sum())
    torch.testing.assert_close(2 * halved.loss, ppo_loss(*arguments).loss)
    summed = ppo_loss(*arguments, aggregation="seq_mean_token_sum")
    torch.testing.assert_close(summed.loss, ppo_loss(*arguments).loss * p.mask.sum() / len(p.mask))


def test_first_step_without_old_logprobs_is_the_policy_gradient(each_backend):
    p = problem()
    x = p.logprobs.clone().requires_grad_()
    result = ppo_loss(x, None, p.advantages, p.mask)
    (grad,) = torch.autograd.grad(result.loss, x)
    torch.testing.assert_close(grad, -(p.advantages[:, None] * p.mask) / p.mask.sum())
    assert result.approx_kl == 0 and result.ratio == 1 and result.clip_low == result.clip_high == 0


def trl_rloo(p):
    from trl import RLOOTrainer

    same = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (p.logprobs, p.entropy, None),
        accelerator=same,
        epsilon_low=0.2,
        epsilon_high=0.3,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        model=SimpleNamespace(training=True),
    )
    mask = p.mask.long()
    inputs = {
        "prompt_ids": mask[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": p.advantages,
        "old_logps": (p.old * mask).sum(1),
    }
    return RLOOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


@pytest.mark.parametrize("spread", [0.05, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rloo_equals_trls_trainer(each_backend, dtype, spread):
    p = problem(dtype=dtype, spread=spread)
    (theirs, metrics), expected = with_gradient(trl_rloo, p)
    ours, result = with_gradient(lambda p: rloo_loss(p.logprobs, p.old, p.advantages, p.mask, clip_range_high=0.3), p)
    torch.testing.assert_close(ours.loss, theirs, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(result[0], expected[0], rtol=1e-5, atol=1e-6)
    assert ours.clip_low.item() == pytest.approx(metrics["clip_ratio/low_mean"][0])
    assert ours.clip_high.item() == pytest.approx(metrics["clip_ratio/high_mean"][0])


def test_kl_estimators():
    logprobs, ref = torch.tensor([-1.0, -2.0, -1e4, 0.0, -5.0]), torch.tensor([-2.0, -1.0, 0.0, -1e4, -5.0])
    d = (logprobs - ref).double()
    torch.testing.assert_close(kl_penalty(logprobs, ref, "k1").double(), d)
    torch.testing.assert_close(kl_penalty(logprobs, ref, "k2").double(), d**2 / 2)
    torch.testing.assert_close(kl_penalty(logprobs, ref).double(), (-d).exp() - 1 + d)
    tiny = kl_penalty(torch.tensor([1e-5]), torch.tensor([0.0]))
    assert tiny.item() == pytest.approx(0.5e-10, rel=0.3)  # exp(-d) - 1 + d in float32 would give 0 or worse
    # k1 and k3 average to the KL, k2's gradient to the KL's: a policy over four words, all words enumerated.
    p, q = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * kl_penalty(p, q, estimator)).sum(), exact)
    z = p.clone().requires_grad_()
    (expected,) = torch.autograd.grad((z.softmax(-1) * (z.log_softmax(-1) - q)).sum(), z)
    (result,) = torch.autograd.grad((p.exp() * kl_penalty(z.log_softmax(-1), q, "k2")).sum(), z)
    torch.testing.assert_close(result, expected)


def test_value_loss(each_backend):
    p = problem()
    values, returns, old = p.logprobs, p.ref, p.old
    total, over = 0.0, 0
    for i, t in p.mask.nonzero().tolist():
        v, r, o = (x[i, t].item() for x in (values, returns, old))
        plain, clipped = (v - r) ** 2, (min(max(v, o - 0.2), o + 0.2) - r) ** 2
        total, over = total + 0.5 * max(plain, clipped), over + (clipped > plain)
    n = p.mask.sum().item()
    result = value_loss(values, old, returns, p.mask)
    assert result.loss.item() == pytest.approx(total / n, rel=1e-12)
    assert result.clip_fraction.item() == pytest.approx(over / n)
    free = value_loss(values, None, returns, p.mask, clip_range=None)
    torch.testing.assert_close(free.loss, 0.5 * (values - returns)[p.mask].square().mean())
    assert free.clip_fraction == 0
    x = values.clone().requires_grad_()
    check = {"fast_mode": each_backend == "triton"}
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, returns, p.mask).loss, x, **check)


def test_whiten():
    p = problem()
    x = p.logprobs.masked_fill(~p.mask, NAN)
    result = whiten(x, p.mask)
    assert result[p.mask].mean().abs() < 1e-12 and result[p.mask].std().item() == pytest.approx(1, rel=1e-6)
    assert (result[~p.mask] == 0).all()
    kept = whiten(x, p.mask, shift_mean=False)
    torch.testing.assert_close(kept[p.mask] - result[p.mask], x[p.mask].mean().expand(p.mask.sum()))
    for mask in (torch.zeros(2, 2), torch.eye(2)[:1]):
        assert (whiten(torch.ones(mask.shape) * 3, mask) == 0).all()
    assert whiten(torch.ones(2, 2).bfloat16(), torch.ones(2, 2)).dtype == torch.float32


def all_losses(p):
    """Every loss of this file as a function of logprobs and entropy."""
    kl = {"ref_logprobs": p.ref, "kl_coef": 0.1}
    rest = (p.old, p.advantages, p.mask)
    losses = {
        f"grpo {name}": lambda x, e, name=name: (
            grpo_loss(
                x,
                *rest,
                loss_type=name,
                clip_range_high=0.9 if name == "cispo" else None,
                max_length=12 if name == "dr_grpo" else None,
                entropy=e,
                entropy_coef=0.3,
                **kl,
            ).loss
        )
        for name in GRPO_LOSS_TYPES
    }
    losses["ppo"] = lambda x, e: ppo_loss(x, *rest, dual_clip=3.0, entropy=e, entropy_coef=0.1, **kl).loss
    losses["rloo"] = lambda x, e: rloo_loss(x, *rest).loss + 0 * e.sum()
    losses["value"] = lambda x, e: value_loss(x, p.old, p.ref, p.mask).loss + 0 * e.sum()
    return losses


@pytest.mark.slow_matrix
@pytest.mark.parametrize("name", list(all_losses(problem())))
def test_gradcheck_compile_and_func_grad(each_backend, name):
    p = problem(rows=3, length=3, spread=0.6, empty=True)
    loss = all_losses(p)[name]
    leaves = [x.clone().requires_grad_() for x in (p.logprobs, p.entropy)]
    if name not in ("grpo cispo", "grpo vespo"):  # their gradient is that of no function: the weights are constants
        assert torch.autograd.gradcheck(loss, leaves, fast_mode=each_backend == "triton")
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.func.grad(loss, (0, 1))(p.logprobs, p.entropy), expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.compiler.reset()  # the losses share a line, and a line may be compiled eight times
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    out = compiled(*leaves)
    torch.testing.assert_close(out, loss(*leaves))
    for a, b in zip(torch.autograd.grad(out, leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_whitening_compiles():
    p = problem()

    def f(x):
        return whiten(x.expand(9, -1).T, p.mask)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(p.advantages), f(p.advantages))


@pytest.mark.parametrize("name", list(all_losses(problem())))
def test_masked_places_and_empty_rows_count_for_nothing(each_backend, name):
    clean = problem(empty=True)
    dirty = SimpleNamespace(**vars(clean))
    for key, bad in (("logprobs", NAN), ("old", INF), ("ref", NAN), ("entropy", -INF)):
        setattr(dirty, key, getattr(clean, key).masked_fill(~clean.mask, bad))
    dirty.advantages = clean.advantages.clone()
    dirty.advantages[2] = NAN  # the empty row's
    result = []
    for p in (clean, dirty):
        leaves = [x.clone().requires_grad_() for x in (p.logprobs, p.entropy)]
        out = all_losses(p)[name](leaves[0], leaves[1] if name not in ("rloo", "value") else torch.zeros(1))
        result.append((out.detach(), torch.autograd.grad(out, leaves[0])[0]))
    (a, grad_a), (b, grad_b) = result
    assert torch.equal(a, b) and torch.equal(grad_a, grad_b)
    assert (grad_b[~clean.mask] == 0).all()

    nothing = problem()
    nothing.mask = torch.zeros_like(nothing.mask)
    x = nothing.logprobs.clone().requires_grad_()
    out = all_losses(nothing)[name](x, nothing.entropy)
    out.backward()
    assert out == 0 and (x.grad == 0).all()


def both_ways(f, *leaves):
    """What f makes of copies of the leaves, and its gradients of a sum with unequal weights: torch's, the kernels'."""
    result = []
    for backend in ("auto", "triton"):
        inputs = [x.detach().clone().requires_grad_() for x in leaves]
        with fastalign.use_backend(backend):
            out = f(*inputs)
        result.append((out, torch.autograd.grad(out[0], inputs)))
    return result


@pytest.mark.parametrize("reference", [False, True], ids=["", "with a reference"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("per_token", [False, True], ids=["", "an advantage per token"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_the_kernel_equals_torch_in_all_that_it_reports(monkeypatch, importance, per_token, estimator, reference):
    """Rows of several blocks with an odd end, strided, and bool, integer and float masks."""
    monkeypatch.setattr("fastalign.kernels.policy.BLOCK", 16)
    p = problem(rows=4, length=37, spread=0.8, empty=True)
    advantages = p.ref.roll(1, 0) + 2 if per_token else p.advantages
    wide = torch.stack((p.old, p.ref), 1).flatten(1)
    old, ref = wide[:, :37], wide[:, 37:]  # rows further apart than they are long
    options = {"kl_coef": 0.2, "kl_bias_correction": True} if reference else {}

    def f(logprobs, entropy):
        return grpo_loss(
            logprobs,
            old,
            advantages,
            p.mask.to(mask_dtype),
            importance=importance,
            dual_clip=1.5,
            kl_estimator=estimator,
            ref_logprobs=ref if reference or estimator == "k2" else None,
            entropy=entropy,
            entropy_coef=0.1,
            **options,
        )

    mask_dtype = {"k1": torch.bool, "k2": torch.int64, "k3": torch.float32}[estimator]
    (torchs, expected), (ours, found) = both_ways(f, p.logprobs, p.entropy)
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_value_kernel_equals_torch(monkeypatch, dtype):
    monkeypatch.setattr("fastalign.kernels.policy.BLOCK", 16)
    p = problem(rows=3, length=37, dtype=dtype, spread=1.0, empty=True)
    for clip_range in (None, 0.2):
        (torchs, expected), (ours, found) = both_ways(
            lambda x, c=clip_range: value_loss(x.T, p.old, p.ref, p.mask, clip_range=c), p.logprobs.T.contiguous()
        )
        torch.testing.assert_close(ours, torchs)
        torch.testing.assert_close(found, expected)


def test_nan_and_infinity_in_the_kernel_stay_in_their_row():
    p = problem(spread=0.5)
    p.logprobs[0, 0], p.logprobs[3, 0] = NAN, -INF
    with fastalign.use_backend("triton"):
        for importance in ("token", "mean"):
            rows = policy_rows(
                p.logprobs, p.old, p.advantages[:, None], p.mask, p.ref, None, importance, Clip(-0.2, 0.2), KL(0.1)
            )
            whole = torch.stack(rows)
            assert whole[0, 0].isnan() and whole[:, [1, 2, 4, 5]].isfinite().all()
        values = value_rows(p.logprobs, p.old, p.ref, p.mask, 0.2)
        assert values.objective[0].isnan() and values.objective[[1, 2, 4, 5]].isfinite().all()
        old = p.old.clone()
        old[1, 0] = NAN
        assert value_rows(p.old, old, p.ref, p.mask, 0.2).objective.isnan().tolist() == [False, True] + [False] * 4


def test_the_kernel_keeps_the_digits_of_a_small_kl():
    """e^x - 1 - x of a log-ratio of 1e-4, in float32, where the terms are 1e4 times the result."""
    p = problem(dtype=torch.float32, spread=1e-4)
    arguments = (p.logprobs, p.old, p.advantages, p.mask)
    with fastalign.use_backend("triton"):
        result = ppo_loss(*arguments, ref_logprobs=p.ref)
    truth = ppo_loss(*(x.double() for x in arguments), ref_logprobs=p.ref.double())
    for name in ("approx_kl", "kl"):
        assert getattr(result, name).item() == pytest.approx(getattr(truth, name).item(), rel=1e-5)


def test_the_ops_on_the_cpu_are_the_plain_formulas():
    """What the dispatcher runs for CPU tensors; the losses themselves do without it there."""
    p = problem(spread=0.8)
    for importance in ("token", "mean", "sum"):
        arguments = (p.logprobs, p.entropy, p.old, p.advantages[:, None], p.mask, p.ref, importance, -0.2, 0.2, 1.0)
        result = policy_op(*arguments, 0.1, "k3", True)
        with fastalign.use_backend("triton"):
            expected = policy_op(*arguments, 0.1, "k3", True)
        torch.testing.assert_close(result[:3], expected[:3])
        slopes = [(out[3] if importance != "token" else 0 * out[3])[:, None] * p.mask for out in (result, expected)]
        scales = [(out[4] if importance != "token" else 0 * out[4] + 1)[:, None] for out in (result, expected)]
        whole = [a + b * out[5] for a, b, out in zip(slopes, scales, (result, expected), strict=True)]
        torch.testing.assert_close(*whole)
    arguments = (p.logprobs, p.old, p.ref, p.mask, 0.2)
    result = value_op(*arguments)
    with fastalign.use_backend("triton"):
        torch.testing.assert_close(result, value_op(*arguments))


def test_figures_of_an_empty_batch_are_zero(each_backend):
    p = problem()
    result = ppo_loss(p.logprobs, p.old, p.advantages, torch.zeros(6, 9), ref_logprobs=p.ref, entropy=p.entropy)
    assert all(x == 0 for x in result if isinstance(x, torch.Tensor))
    none = ppo_loss(p.logprobs[:0], p.old[:0], p.advantages[:0], p.mask[:0])
    assert none.loss == 0


@pytest.mark.parametrize("loss_type", sorted(set(GRPO_LOSS_TYPES) - {"luspo", "gspo"}))
@given(
    ratios=st.lists(st.sampled_from([-1e4, -100.0, -1.0, 0.0, 0.5, 80.0, 1e4]), min_size=2, max_size=6),
    advantage=st.sampled_from([-1e3, -1.0, 0.0, 1e-20, 2.0]),
)
def test_extreme_ratios(loss_type, ratios, advantage):
    """Values equal TRL's wherever it has one, and no gradient is NaN though TRL's is inf · 0 there."""
    logprobs = torch.tensor([ratios]) / 2
    p = SimpleNamespace(
        logprobs=logprobs,
        old=-logprobs,
        ref=logprobs,
        advantages=torch.tensor([advantage]),
        entropy=torch.ones_like(logprobs),
        mask=torch.ones(1, len(ratios)).bool(),
    )
    high = 3.0 if loss_type == "cispo" else 0.2
    theirs, _ = trl_grpo(p, loss_type, high=high)
    ours, (grad, _) = with_gradient(ours_grpo, p, loss_type, high=high)
    assert not ours.loss.isnan() and not grad.isnan().any()
    if not theirs.isnan():
        torch.testing.assert_close(ours.loss.detach(), theirs, rtol=1e-6, atol=1e-7)


def test_narrow_dtypes_are_summed_in_float32(each_backend):
    p = problem(dtype=torch.bfloat16)
    x = p.logprobs.clone().requires_grad_()
    result = ppo_loss(x, p.old, p.advantages, p.mask, ref_logprobs=p.ref, kl_coef=0.1)
    result.loss.backward()
    assert result.loss.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    wide = ppo_loss(p.logprobs.float(), p.old, p.advantages, p.mask, ref_logprobs=p.ref, kl_coef=0.1)
    assert torch.equal(result.loss.detach(), wide.loss)


@pytest.mark.parametrize(
    ("f", "change", "says"),
    [
        (ppo_loss, {"old_logprobs": torch.zeros(2, 4)},
         "old_logprobs.shape must equal logprobs.shape, got (2, 4) and (2, 3)"),
        (ppo_loss, {"mask": torch.ones(2)}, "mask.shape must equal logprobs.shape, got (2,) and (2, 3)"),
        (ppo_loss, {"advantages": torch.ones(3)}, "advantages must have shape (2,) or (2, 3), got (3,)"),
        (ppo_loss, {"logprobs": torch.ones(3)}, "logprobs must have shape (B, T), got (3,)"),
        (ppo_loss, {"clip_range": 0}, "clip_range must be positive, got 0"),
        (ppo_loss, {"dual_clip": 1.1}, "dual_clip must be above 1 + clip_range_high = 1.2, got 1.1"),
        (ppo_loss, {"kl_coef": 0.1}, "ref_logprobs must be given if kl_coef is not 0, got None and 0.1"),
        (ppo_loss, {"entropy_coef": 0.1}, "entropy must be given if entropy_coef is not 0"),
        (ppo_loss, {"aggregation": "mean"},
         "aggregation must be one of token_mean, seq_mean_token_mean, seq_mean_token_sum, got 'mean'"),
        (ppo_loss, {"aggregation": "seq_mean_token_sum", "normalizer": 3},
         "normalizer must be None unless aggregation is 'token_mean'"),
        (ppo_loss, {"ref_logprobs": torch.ones(2, 3), "kl_estimator": "k4"},
         "estimator must be one of k1, k2, k3, got 'k4'"),
        (grpo_loss, {"loss_type": "ppo"}, "loss_type must be one of grpo, bnpo, dapo"),
        (grpo_loss, {"loss_type": "dr_grpo"},
         "max_length must be a positive integer for loss_type 'dr_grpo', got None"),
        (grpo_loss, {"loss_type": "cispo"}, "clip_range_high must be given for loss_type 'cispo'"),
        (grpo_loss, {"loss_type": "grpo", "normalizer": 4},
         "normalizer must be None unless loss_type is dapo, cispo or vespo, got 'grpo'"),
        (grpo_loss, {"importance": "word"}, "importance must be token or sequence, got 'word'"),
        (grpo_loss, {"loss_type": "vespo", "advantages": torch.ones(2, 3)},
         "advantages must have shape (B,) for loss_type 'vespo'"),
        (rloo_loss, {"advantages": torch.ones(2, 3)}, "advantages must have shape (B,), got (2, 3)"),
    ],
)  # fmt: skip
def test_mistakes_are_reported_in_one_line(f, change, says):
    good = {"logprobs": torch.zeros(2, 3), "old_logprobs": None, "advantages": torch.ones(2), "mask": torch.ones(2, 3)}
    with pytest.raises(UserError) as raised:
        f(**good | change)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_other_mistakes():
    x = torch.zeros(2, 3)
    with pytest.raises(UserError, match="old_values must be given unless clip_range is None"):
        value_loss(x, None, x, x)
    with pytest.raises(UserError, match=r"returns.shape must equal values.shape, got \(3, 2\) and \(2, 3\)"):
        value_loss(x, x, x.T, x)
    with pytest.raises(UserError, match=r"ref_logprobs.shape must equal logprobs.shape"):
        kl_penalty(x, x.T)
    with pytest.raises(TypeError, match=r"logprobs must be a floating tensor, got torch.int64"):
        ppo_loss(x.long(), None, torch.ones(2), x)
