"""GPU cases of policy: the rows of PPO's and GRPO's clipped objective, and of the value loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from fastalign.bench.gpu_common import KernelCase, Work
from fastalign.kernels import policy
from torch import Tensor

import fastalign
from fastalign.ops.policy import KL, Clip, policy_rows, value_rows

CLIP = Clip(-0.2231, 0.2469)


@dataclass(frozen=True)
class Setting:
    """One configuration: 512 completions, a step of GRPO with 64 groups of 8."""

    importance: str = "token"
    kl: KL | None = None
    entropy: bool = False
    token_advantages: bool = False
    old: bool = True
    cap: float = float("inf")
    dtype: torch.dtype = torch.float32
    rows: int = 512
    tokens: int = 4096

    @property
    def name(self) -> str:
        kl = self.kl and f"{self.kl.estimator}{' times the ratio' if self.kl.times_ratio else ''}"
        parts = [f"ratio: {self.importance}", f"KL {kl}" if kl else "", "entropy" if self.entropy else ""]
        parts += ["advantage per token" if self.token_advantages else "", "" if self.old else "first step"]
        return ", ".join(x for x in (*parts, f"{self.rows} × {self.tokens:,} {str(self.dtype)[6:]}") if x)


def cases() -> Iterator[KernelCase]:
    bf16, f16 = torch.bfloat16, torch.float16
    settings = [
        Setting(),
        Setting(kl=KL(0.04)),
        Setting(kl=KL(0.04), entropy=True, token_advantages=True, cap=1.1),
        Setting(kl=KL(0.04, "k1", True), entropy=True),
        Setting(kl=KL(0.0, "k2"), old=False),
        Setting("mean"),
        Setting("mean", kl=KL(0.04)),
        Setting("mean", kl=KL(0.04, "k3", True), entropy=True, token_advantages=True),
        Setting("sum"),
        Setting(dtype=bf16),
        Setting(dtype=bf16, kl=KL(0.04), entropy=True),
        Setting(dtype=f16, kl=KL(0.04)),
        Setting(rows=8, tokens=32_768, kl=KL(0.04)),
        Setting(rows=4096, tokens=200),
    ]
    for setting in settings:
        yield KernelCase(setting.name, partial(_policy, setting))
    for dtype in (torch.float32, bf16, f16):
        for clip in (True, False):
            name = f"values{', clipped' if clip else ''}, 512 × 4,096 {str(dtype)[6:]}"
            yield KernelCase(name, partial(_value, clip, dtype))


def _tensors(count: int, shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    result = [torch.empty(shape, dtype=dtype, device=device) for _ in range(count)]
    if device != "meta":
        for x in result:
            x.uniform_(-2, 0)
    return result, torch.ones(shape, dtype=torch.bool, device=device)


def _policy(setting: Setting, device: str, small: bool) -> Work:
    shape = (3, 1100 if setting.importance == "token" else 301) if small else (setting.rows, setting.tokens)
    (logprobs, old, ref, entropy), mask = _tensors(4, shape, setting.dtype, device)
    advantages = torch.ones(shape if setting.token_advantages else (shape[0], 1), dtype=setting.dtype, device=device)
    if device != "meta":
        advantages.normal_()
        old.copy_(logprobs).add_(torch.randn_like(logprobs), alpha=0.3)
    old = old if setting.old else None
    kl, ref = setting.kl or KL(), ref if setting.kl else None
    entropy = entropy if setting.entropy else None
    inputs = (logprobs, old, advantages, mask, ref, entropy)
    clip = Clip(CLIP.low, CLIP.high, setting.cap)

    def run():
        return policy.policy_rows(
            logprobs, entropy, old, advantages, mask, ref, setting.importance, clip.low, clip.high, clip.cap, kl.coef,
            kl.estimator, kl.times_ratio,
        )  # fmt: skip

    def plain(logprobs, old, advantages, mask, ref, entropy):
        with fastalign.use_backend("reference"):
            return policy_rows(logprobs, old, advantages, mask, ref, entropy, setting.importance, clip, kl)

    def check():
        objective, entropies, figures, shares, scales, weights = (x.double() for x in run())
        wide = [x if x is None or x.dtype == torch.bool else x.double() for x in inputs]
        wide[0].requires_grad_()
        truth = plain(*wide)
        (grad,) = torch.autograd.grad(truth.objective.sum(), wide[0])
        whole = torch.stack((objective, entropies, *figures))
        torch.testing.assert_close(whole, torch.stack(truth).detach(), rtol=1e-3, atol=1e-2)
        if setting.importance != "token":
            weights = shares[:, None] + (scales[:, None] * weights if weights.numel() else 0 * grad)
        torch.testing.assert_close(weights, grad, rtol=1e-3, atol=1e-4)

    weighted = setting.importance == "token" or kl.coef != 0
    numbers = 9 + (0 if setting.importance == "token" else 2)
    moved = sum(x.nbytes for x in inputs if x is not None) + shape[0] * (4 * numbers + 4 * shape[1] * weighted)
    return Work(run, moved, check=check, peers=_peers(plain, inputs))


def _value(clip: bool, dtype: torch.dtype, device: str, small: bool) -> Work:
    shape = (3, 1100) if small else (512, 4096)
    (values, old, returns), mask = _tensors(3, shape, dtype, device)
    inputs = (values, old if clip else None, returns, mask)

    def run():
        return policy.value_rows(*inputs, 0.2)

    def plain(*inputs):
        with fastalign.use_backend("reference"):
            return value_rows(*inputs, 0.2)

    def check():
        objective, figures, weights = (x.double() for x in run())
        wide = [x if x is None or x.dtype == torch.bool else x.double() for x in inputs]
        wide[0].requires_grad_()
        truth = plain(*wide)
        (grad,) = torch.autograd.grad(truth.objective.sum(), wide[0])
        torch.testing.assert_close(objective, truth.objective.detach(), rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(figures[1], truth.tokens)
        torch.testing.assert_close(weights, grad, rtol=1e-3, atol=1e-3)

    moved = sum(x.nbytes for x in inputs if x is not None) + shape[0] * 4 * (shape[1] + 3)
    return Work(run, moved, check=check, peers=_peers(plain, inputs))


def _peers(plain: Callable, inputs: tuple) -> dict[str, Callable]:
    """The same sums and the gradient in torch."""
    if not inputs[0].is_cuda:
        return {}
    x = inputs[0].clone().requires_grad_()

    def both(f):
        return torch.autograd.grad(f(x, *inputs[1:]).objective.sum(), x)

    compiled = torch.compile(plain)
    return {"torch": lambda: both(plain), "torch.compile": lambda: both(compiled)}
