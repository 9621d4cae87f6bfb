"""GPU cases of map_statistics: few and many values, one and many λ, weights, groups; against float64 products in
torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from fastalign.bench.gpu_common import KernelCase, Work
from fastalign.kernels import map_statistics as kernel
from torch import Tensor

from fastalign import reference


def cases() -> Iterator[KernelCase]:
    f32, f64 = torch.float32, torch.float64
    for n, m, count, dtype, weighted, group in (
        (1_000_000, 6, 1, f32, False, 0),
        (1_000_000, 6, 16, f32, False, 0),
        (1_000_000, 3, 4, f32, True, 0),
        (1_000_000, 6, 1, f64, True, 0),
        (20_000, 3, 1, f32, False, 0),
        (200_000, 17, 1, f32, False, 0),
        (200_000, 64, 2, f32, False, 0),
        (50_000, 100, 1, f32, False, 0),
        (1_000_000, 6, 1, f32, False, 64),
        (1_000_000, 3, 4, f32, True, 1024),
    ):
        name = f"n {n:,} m {m} K {count} {str(dtype)[6:]}{' weights' * weighted}"
        name += f", groups of {group}" if group else ""
        yield KernelCase(
            name,
            partial(_build, n, m, count, dtype, weighted, group),
            # Many second moments are work, not traffic; and the order of the groups is read as well.
            streaming=not group and m <= 8 and count <= 4,
        )


def _build(
    n: int, m: int, count: int, dtype: torch.dtype, weighted: bool, group: int, device: str, small: bool
) -> Work:
    if small:
        n = min(n, 8191 if m <= 8 and count <= 4 else 201)
    rewards = torch.empty(n, m, dtype=dtype, device=device)
    lam = torch.empty(count, m, dtype=torch.float64, device=device)
    center = torch.full((m,), 0.1, dtype=torch.float64, device=device)
    log_weights = torch.empty(n, dtype=torch.float64, device=device) if weighted else None
    groups = torch.arange(n, device=device) // group if group else None
    if device != "meta":
        rewards.normal_()
        lam.normal_(0, m**-0.5)
        if weighted:
            log_weights.normal_()

    def run():
        return kernel.statistics(rewards, lam, center, log_weights, groups)

    def check():
        truth = reference.map_statistics(rewards, lam, center, log_weights, groups)
        result = dict(zip(("log_z", "mean", "cov", "ess", "max_score"), run(), strict=True))
        for name, value in truth.items():
            torch.testing.assert_close(result[name], value, rtol=1e-9, atol=1e-9)

    moved = (
        rewards.numel() * rewards.element_size() + n * 8 * (weighted + bool(group)) + count * (m * m + 2 * m + 3) * 8
    )
    peers = {} if group or not rewards.is_cuda else _peers(rewards, lam, center, log_weights)
    return Work(run, moved, check=check, peers=peers)


def _peers(rewards: Tensor, lam: Tensor, center: Tensor, log_weights: Tensor | None) -> dict[str, Callable]:
    def plain():
        x = rewards.double() - center
        scores = lam @ x.T + (0 if log_weights is None else log_weights)
        p = torch.softmax(scores, -1)
        mean = p @ x
        second = torch.stack([(x * q[:, None]).T @ x for q in p])
        return torch.logsumexp(scores, -1), mean, second - mean[:, :, None] * mean[:, None, :]

    return {"torch": plain, "torch.compile": torch.compile(plain)}
