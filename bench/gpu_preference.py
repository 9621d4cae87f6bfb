"""GPU cases of preference: every loss from the log-probabilities of tokens, and the backward pass of all fused
losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from fastalign.bench.gpu_common import KernelCase, Work
from fastalign.kernels import _sum_gradient, preference
from torch import Tensor

import fastalign
from fastalign.ops.pairwise import FUSED
from fastalign.ops.preference import pairwise_loss


@dataclass(frozen=True)
class Setting:
    """One configuration: 64 pairs, as in a step of DPO on one GPU."""

    loss_type: str = "sigmoid"
    smoothing: float = 0.0
    reference: str = "tokens"  # tokens, sums, none
    dtype: torch.dtype = torch.float32
    pairs: int = 64
    tokens: int = 4096

    @property
    def name(self) -> str:
        parts = [f"{self.loss_type}{' smoothed' if self.smoothing else ''}", f"{self.pairs} pairs × {self.tokens:,}"]
        return " ".join((*parts, f"reference {self.reference}", str(self.dtype)[6:]))


def cases() -> Iterator[KernelCase]:
    plain = Setting()
    settings = [replace(plain, loss_type=kind, smoothing=1e-3 if kind == "exo_pair" else 0.0) for kind in FUSED]
    settings += [replace(plain, loss_type=kind, smoothing=0.1) for kind in ("sigmoid", "robust", "sigmoid_norm")]
    settings += [replace(plain, reference=reference) for reference in ("sums", "none")]
    settings += [replace(plain, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)]
    settings += [replace(plain, tokens=200, pairs=512), replace(plain, tokens=32_768, pairs=8)]
    for setting in settings:
        yield KernelCase(f"forward {setting.name}", partial(_forward, setting))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for over in ("mask", "weights", "mask and weights"):
            yield KernelCase(f"backward over {over} 128 × 4,096 {str(dtype)[6:]}", partial(_backward, over, dtype))


def _forward(setting: Setting, device: str, small: bool) -> Work:
    rows, tokens = (6, 301) if small else (2 * setting.pairs, setting.tokens)
    per_token = setting.reference == "tokens"
    log_probs = torch.empty(rows, tokens, dtype=setting.dtype, device=device)
    ref = torch.empty(log_probs.shape if per_token else (rows,), dtype=setting.dtype, device=device)
    mask = torch.ones(rows, tokens, dtype=torch.bool, device=device)
    if device != "meta":
        log_probs.uniform_(-2, 0)
        ref.uniform_(-2, 0).mul_(1 if per_token else tokens)
    reference = None if setting.reference == "none" else ref
    options = {"beta": 0.1, "loss_type": setting.loss_type, "label_smoothing": setting.smoothing}

    def run():
        return preference.forward(log_probs, reference, mask, setting.loss_type, 0.1, setting.smoothing, 0.05)

    def plain(x: Tensor, reference: Tensor | None = reference):
        with fastalign.use_backend("reference"):
            return pairwise_loss(x, reference, mask, **options)

    def check():
        losses, chosen, rejected, sums, slopes = (x.double() for x in run())
        wide = log_probs.double().requires_grad_()
        truth = plain(wide, None if reference is None else reference.double())
        (grad,) = torch.autograd.grad(truth.losses.sum(), wide)
        torch.testing.assert_close(chosen, truth.chosen_rewards, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(rejected, truth.rejected_rewards, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(sums, torch.cat(truth[3:]), rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(losses, truth.losses.detach(), rtol=2e-3, atol=1e-2)
        torch.testing.assert_close(slopes, grad[:, 0], rtol=2e-3, atol=1e-3)

    read = log_probs.numel() * (log_probs.element_size() + 1) + (0 if reference is None else ref.nbytes)
    return Work(run, read + rows // 2 * 7 * 4, check=check, peers=_peers(plain, log_probs))


def _backward(over: str, dtype: torch.dtype, device: str, small: bool) -> Work:
    rows, tokens = (6, 301) if small else (128, 4096)
    each, scales = (torch.ones(rows, device=device) for _ in range(2))
    mask = torch.ones(rows, tokens, dtype=torch.bool, device=device)
    weights = torch.ones(rows, tokens, device=device)
    if device != "meta":
        for x in (each, scales, weights):
            x.normal_()
    arguments = (each, mask) if "mask" in over else (None, None)
    arguments += (scales, weights) if "weights" in over else (None, None)

    def run():
        return _sum_gradient.sum_gradient(*arguments, dtype)

    def check():
        truth = (each[:, None] * mask if "mask" in over else 0) + (
            scales[:, None] * weights if "weights" in over else 0
        )
        torch.testing.assert_close(run(), truth.to(dtype))

    moved = rows * tokens * dtype.itemsize + sum(x.nbytes for x in arguments if x is not None)
    peers = {"torch": lambda: torch.where(mask, each[:, None], 0).to(dtype)} if over == "mask" else {}
    return Work(run, moved, check=check, peers=peers if device == "cuda" else {})


def _peers(plain: Callable, log_probs: Tensor) -> dict[str, Callable]:
    """The same in torch, forward and backward: after a fused forward pass only one multiplication is left."""
    if not log_probs.is_cuda:
        return {}
    x = log_probs.clone().requires_grad_()

    def both(f):
        return torch.autograd.grad(f(x).losses.sum(), x)

    compiled = torch.compile(plain)
    return {"torch, with gradient": lambda: both(plain), "torch.compile, with gradient": lambda: both(compiled)}
