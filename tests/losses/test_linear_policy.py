"""LinearPPOLoss and LinearGRPOLoss: equal to their functions on the log-probs of full logits, gradients too."""

import pytest
import torch
import torch.utils.checkpoint

from fastalign import UserError, reference
from fastalign.losses import LinearGRPOLoss, LinearPPOLoss, grpo_loss, ppo_loss
from fastalign.losses.policy import GRPO_LOSS_TYPES


def problem(dtype=torch.float64, rows=4, length=6, size=10, vocab=37):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    tensors = {
        "hidden": normal(rows, length, size),
        "weight": normal(vocab, size, scale=0.6),
        "bias": normal(vocab),
        "ref_hidden": normal(rows, length, size + 3),
        "ref_weight": normal(vocab, size + 3, scale=0.6),
        "advantages": normal(rows),
        "noise": normal(rows, length, scale=0.3),
    }
    labels = torch.randint(0, vocab, (rows, length), generator=generator)
    labels[0, :2] = labels[1, 3:] = -100
    labels[2] = -100  # a row without a completion
    return tensors | {"labels": labels}


def by_logits(f, p, hidden, weight, bias, *, temperature=1.0, entropy_coef=0.0, mask=None, **options):
    """The function on log-probs and entropies of logits that are held."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    labels = p["labels"] if mask is None else p["labels"].masked_fill(mask == 0, -100)
    result = reference.token_logprobs(logits, labels, temperature)
    ref = reference.token_logprobs(p["ref_hidden"] @ p["ref_weight"].T, labels, temperature)["log_probs"]
    old = result["log_probs"].detach() + p["noise"]
    return old, f(
        result["log_probs"],
        old,
        p["advantages"],
        labels != -100,
        ref_logprobs=ref,
        entropy=result["entropy"],
        entropy_coef=entropy_coef,
        **options,
    )


CASES = [
    (LinearPPOLoss, ppo_loss, {"aggregation": "seq_mean_token_mean", "dual_clip": 3.0}),
    (LinearPPOLoss, ppo_loss, {}),
]
for name in GRPO_LOSS_TYPES:
    more = {"clip_range_high": 1.1} if name == "cispo" else {"max_length": 9} if name == "dr_grpo" else {}
    CASES.append((LinearGRPOLoss, grpo_loss, {"loss_type": name, **more}))


@pytest.mark.parametrize("entropy_coef", [0.0, 0.02])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[1].__name__}-{c[2].get('loss_type', '')}")
def test_equals_the_function_on_held_logits(each_backend, case, entropy_coef):
    module, function, options = case
    p = problem()
    options = options | {"kl_coef": 0.1, "entropy_coef": entropy_coef, "temperature": 0.8}
    leaves = [p[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    old, expected = by_logits(function, p, *leaves, **options)
    grads = torch.autograd.grad(expected.loss, leaves)
    loss, metrics = module(**options, token_metrics=True)(
        *leaves[:2],
        p["labels"],
        p["advantages"],
        old,
        bias=leaves[2],
        ref_hidden=p["ref_hidden"],
        ref_weight=p["ref_weight"],
    )
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), grads)
    names = {"clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean", "weight": "vespo/phi_seq_mean"}
    for name, value in expected._asdict().items():
        if name not in ("loss", "rows") and value is not None:
            torch.testing.assert_close(metrics.pop(names.get(name, name)), value)
    assert not metrics


def test_reference_as_log_probs_or_none_and_what_is_in_the_metrics():
    p = problem(torch.float32)
    module = LinearPPOLoss(kl_coef=0.1)
    arguments = (p["hidden"], p["weight"], p["labels"], p["advantages"])
    ref = reference.token_logprobs(p["ref_hidden"] @ p["ref_weight"].T, p["labels"])["log_probs"]
    loss, metrics = module(*arguments, ref_logprobs=ref)
    other, _ = module(*arguments, ref_hidden=p["ref_hidden"], ref_weight=p["ref_weight"])
    torch.testing.assert_close(loss, other)
    assert set(metrics) == {"policy_loss", "kl", "approx_kl", "ratio", "clip_ratio/low_mean", "clip_ratio/high_mean"}
    _, metrics = LinearPPOLoss()(*arguments)
    assert "kl" not in metrics and "entropy" not in metrics
    _, metrics = LinearGRPOLoss(entropy_coef=0.1)(*arguments)
    assert metrics["entropy"] > 0 and all(x.ndim == 0 and not x.requires_grad for x in metrics.values())


def test_a_mask_takes_places_out_and_the_normalizer_counts():
    p = problem()
    mask = torch.rand(p["labels"].shape, generator=torch.Generator().manual_seed(1)) > 0.4
    leaves = [p[name] for name in ("hidden", "weight", "bias")]
    old, expected = by_logits(grpo_loss, p, *leaves, mask=mask, normalizer=50)
    loss, _ = LinearGRPOLoss()(*leaves[:2], p["labels"], p["advantages"], old, mask=mask, bias=leaves[2], normalizer=50)
    torch.testing.assert_close(loss, expected.loss)


def test_rows_without_tokens_and_batches_without_any():
    p = problem()
    hidden = p["hidden"].clone().requires_grad_()
    weight = p["weight"].clone().requires_grad_()
    labels = torch.full_like(p["labels"], -100)
    loss, metrics = LinearGRPOLoss(entropy_coef=0.1, kl_coef=0.1)(
        hidden, weight, labels, p["advantages"], ref_hidden=p["ref_hidden"], ref_weight=p["ref_weight"]
    )
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()
    assert all(x == 0 for x in metrics.values())


def test_an_adapter_on_the_head():
    p = problem()
    a, b = torch.randn(2, 10, dtype=torch.float64), torch.randn(37, 2, dtype=torch.float64)
    merged = p["weight"] + 0.5 * b @ a
    rest = (p["labels"], p["advantages"], p["noise"] - 3)
    expected, _ = LinearPPOLoss()(p["hidden"], merged, *rest)
    result, _ = LinearPPOLoss()(p["hidden"], p["weight"], *rest, adapter=(a, b, 0.5))
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("module", [LinearPPOLoss(entropy_coef=0.01, kl_coef=0.1), LinearGRPOLoss(loss_type="gspo")])
def test_gradcheck_compile_and_func_grad(module):
    p = problem(rows=3, length=3, size=4, vocab=7)

    def loss(hidden, weight):
        reference = {"ref_hidden": p["ref_hidden"], "ref_weight": p["ref_weight"]}
        return module(hidden, weight, p["labels"], p["advantages"], p["noise"] - 2, **reference)[0]

    leaves = [p[name].clone().requires_grad_() for name in ("hidden", "weight")]
    assert torch.autograd.gradcheck(loss, leaves)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(p["hidden"], p["weight"]), expected)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


def test_narrow_weights_and_a_frozen_head():
    p = problem(torch.bfloat16)
    hidden = p["hidden"].clone().requires_grad_()
    arguments = (p["labels"], p["advantages"].float(), p["noise"].float() - 3)
    loss, _ = LinearPPOLoss()(hidden, p["weight"], *arguments)
    loss.backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16
    wide = p["hidden"].float().requires_grad_()
    expected, _ = LinearPPOLoss()(wide, p["weight"].float(), *arguments)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.float(), wide.grad, rtol=1e-2, atol=1e-3)


def test_under_autocast_and_gradient_checkpointing():
    p = problem(torch.float32)
    module = LinearGRPOLoss(kl_coef=0.1, entropy_coef=0.01)
    arguments = (p["weight"], p["labels"], p["advantages"], p["noise"] - 3)
    reference = {"ref_hidden": p["ref_hidden"], "ref_weight": p["ref_weight"]}
    hidden = p["hidden"].clone().requires_grad_()
    expected, _ = module(hidden, *arguments, **reference)
    (grad,) = torch.autograd.grad(expected, hidden)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = module(hidden, *arguments, **reference)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], grad)
    loss, _ = torch.utils.checkpoint.checkpoint(module, hidden, *arguments, use_reentrant=False, **reference)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], grad)


def test_mistakes_and_repr():
    p = problem()
    arguments = (p["hidden"], p["weight"], p["labels"], p["advantages"])
    with pytest.raises(UserError, match="ref_hidden and ref_logprobs must not both be given"):
        LinearPPOLoss()(*arguments, ref_hidden=p["ref_hidden"], ref_logprobs=p["noise"])
    with pytest.raises(UserError, match="ref_weight must be given with ref_hidden"):
        LinearPPOLoss()(*arguments, ref_hidden=p["ref_hidden"])
    with pytest.raises(UserError, match=r"mask.shape must equal labels.shape, got \(4,\) and \(4, 6\)"):
        LinearPPOLoss()(*arguments, mask=torch.ones(4))
    with pytest.raises(UserError, match="ref_logprobs must be given if kl_coef is not 0"):
        LinearPPOLoss(kl_coef=0.1)(*arguments)
    with pytest.raises(TypeError, match="clip"):
        LinearPPOLoss(clip=0.1)
    assert "'loss_type': 'gspo'" in repr(LinearGRPOLoss(loss_type="gspo"))
