"""What an op gives hangs on its tensors' values alone, wherever in memory they stand: every argument, on every
backend."""

import pytest
import torch

from fastalign import backend, losses, ops, use_backend

R, T, V, H, N = 4, 5, 33, 6, 9


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape, below=V, seed=0):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


LABELS, MASK = integers(R, T), torch.arange(R * T).view(R, T) % 3 != 1
LABELS[1, 3] = -100
HEAD = {"hidden": normal(R, T, H), "weight": normal(V, H, seed=1), "labels": LABELS, "bias": normal(V, seed=2)}
LORA = {"a": normal(2, H, seed=3), "b": normal(V, 2, seed=4)}
SUMS = {"logprobs": normal(R, T) - 2, "old_logprobs": normal(R, T, seed=1) - 2, "mask": MASK}
BESIDE = {"ref_logprobs": normal(R, T, seed=2) - 2, "entropy": normal(R, T, seed=3).abs()}


def given(found):
    return tuple(x for x in found if x is not None)


def head(hidden, weight, labels, bias, a, b):
    outputs = ("log_probs", "entropy", "is_top1")
    return given(ops.linear_token_logprobs(hidden, weight, labels, bias=bias, adapter=(a, b, 0.5), outputs=outputs))


def grpo(**tensors):
    return losses.grpo_loss(**tensors, kl_coef=0.1, entropy_coef=0.1, loss_type="dapo").loss


CASES = {
    "token_logprobs": (
        lambda logits, labels: given(ops.token_logprobs(logits, labels, outputs=("log_probs", "entropy", "is_top1"))),
        {"logits": normal(R, T, V), "labels": LABELS},
    ),
    "token_logratios": (
        ops.token_logratios,
        {"policy_logits": normal(R, T, V), "ref_logits": normal(R, T, V, seed=1), "labels": LABELS},
    ),
    "linear_token_logprobs": (head, HEAD | LORA),
    "linear_token_logprobs, frozen head": (
        lambda hidden, **rest: ops.linear_token_logprobs(hidden, **{k: x.detach() for k, x in rest.items()}),
        HEAD,
    ),
    "linear_token_logratios": (
        lambda **x: ops.linear_token_logratios(**x),
        HEAD | {"ref_hidden": normal(R, T, H, seed=5), "ref_weight": normal(V, H, seed=6),
                "ref_bias": normal(V, seed=7)},
    ),
    "pairwise_loss": (
        lambda **x: ops.pairwise_loss(**x).losses,
        {"log_probs": SUMS["logprobs"], "ref_log_probs": SUMS["old_logprobs"], "mask": MASK},
    ),
    "pairwise_loss, sums": (
        lambda **x: ops.pairwise_loss(**x).losses,
        {"log_probs": SUMS["logprobs"], "ref_log_probs": normal(R, seed=8), "mask": MASK},
    ),
    "grpo_loss": (grpo, SUMS | BESIDE | {"advantages": normal(R, seed=9)}),
    "ppo_loss": (lambda **x: losses.ppo_loss(**x).loss, SUMS | {"advantages": normal(R, T, seed=9)}),
    "value_loss": (
        lambda **x: losses.value_loss(**x).loss,
        {"values": normal(R, T), "old_values": normal(R, T, seed=1), "returns": normal(R, T, seed=2), "mask": MASK},
    ),
    "gae": (ops.gae, {"rewards": normal(R, T), "values": normal(R, T, seed=1), "mask": MASK}),
    "sample_tokens": (
        lambda logits, rows: tuple(ops.sample_tokens(logits, rows=rows, seed=3, top_p=0.9, top_k=20)),
        {"logits": normal(2, V), "rows": integers(2, 2, below=99)},
    ),
    "sample_tokens, streams": (
        lambda logits, rows: tuple(ops.sample_tokens(logits, rows=rows, seed=3)),
        {"logits": normal(N, V), "rows": integers(N, below=99)},
    ),
    "linear_sample_tokens": (
        lambda hidden, weight, bias, a, b, rows: tuple(
            ops.linear_sample_tokens(hidden, weight, bias=bias, adapter=(a, b, 0.5), rows=rows, seed=3)
        ),
        {"hidden": normal(N, H), "weight": HEAD["weight"], "bias": HEAD["bias"], **LORA,
         "rows": integers(N, 2, below=99)},
    ),
    **{
        f"resample, {method}": (
            lambda log_weights, mask, method=method: ops.resample(log_weights, 3, method=method, mask=mask, seed=1),
            {"log_weights": normal(R, N), "mask": integers(R, N, below=4, seed=1) > 0},
        )
        for method in ("multinomial", "residual", "gumbel_top_k", "best")
    },
    "map_statistics": (
        lambda **x: tuple(ops.map_statistics(**x)),
        {
            "rewards": normal(N * R, 3), "lam": normal(2, 3, seed=1), "center": normal(3, seed=2),
            "log_weights": normal(N * R, seed=3), "groups": integers(N * R, below=3, seed=4),
        },
    ),
}  # fmt: skip


def gaps(x):
    """Every second place of the last dimension."""
    return torch.stack((x, torch.ones_like(x)), -1)[..., 0]


def turned(x):
    """The first dimension changes fastest."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def within(x):
    """In the middle of something larger."""
    larger = x.new_ones([n + 2 for n in x.shape])
    inside = larger[(slice(1, -1),) * x.ndim]
    return inside.copy_(x)


def outcome(f, tensors):
    """What f gives, and the gradients that whatever floats of its inputs get."""
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in tensors.items()}
    out = f(**leaves)
    out = out if isinstance(out, tuple) else (out,)
    learns = [x for x in out if x.requires_grad]
    grads = ()
    if learns:
        weights = [gaps(normal(*x.shape, seed=20)) for x in learns]  # the gradient that comes in has a layout too
        grads = torch.autograd.grad(learns, [x for x in leaves.values() if x.requires_grad], weights, allow_unused=True)
    return [x for x in (*out, *grads) if x is not None]


@pytest.mark.slow_matrix
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("on", [*["cpu"] * (backend.native is not None), "reference", "triton"])
def test_a_layout_changes_nothing(name, on):
    f, tensors = CASES[name]
    with use_backend(on):
        expected = outcome(f, tensors)
        for lay in (gaps, turned, within):
            laid = {key: lay(x) for key, x in tensors.items()}
            assert all(torch.equal(laid[key], x) for key, x in tensors.items())
            # Triton's interpreter takes long: there one tensor is moved at a time in one way alone.
            one_by_one = [{**tensors, key: x} for key, x in laid.items()] if on != "triton" or lay is gaps else []
            for moved in (laid, *one_by_one):
                for a, b in zip(outcome(f, moved), expected, strict=True):
                    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.skipif(backend.native is None, reason="the native extension is not built")
def test_flushing_denormals_changes_nothing(name):
    """torch.set_flush_denormal is of one thread alone: what hung on it would hang on which thread a row fell to."""
    f, tensors = CASES[name]
    expected = outcome(f, tensors)
    try:
        assert torch.set_flush_denormal(True)
        result = outcome(f, tensors)
    finally:
        torch.set_flush_denormal(False)
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a, b)
