"""resample on the GPU: best of N for many prompts, and up to a million candidates for one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fastalign.bench.gpu_common import KernelCase, Work

from fastalign import reference
from fastalign.reference import RESAMPLE_METHODS as METHODS

SHAPES = ((4096, 64, 1), (64, 16_384, 64), (1, 1_000_000, 1000))
READS = {"residual": 2}  # of the log-weights
CHECKED = 256  # prompts checked, from the first on: a prompt's index is its stream


def cases() -> Iterator[KernelCase]:
    for prompts, n, k in SHAPES:
        for method in METHODS:
            yield case(method, prompts, n, k, torch.float32)
    yield case("multinomial", 64, 16_384, 64, torch.float32, masked=True)
    yield case("gumbel_top_k", 64, 16_384, 64, torch.float32, masked=True)
    yield case("systematic", 64, 16_384, 64, torch.float64)
    yield case("residual", 64, 16_384, 64, torch.float64)
    yield case("best", 1, 1_000_000, 1, torch.float64)


def case(method: str, prompts: int, n: int, k: int, dtype: torch.dtype, masked: bool = False) -> KernelCase:
    def build(device: str, small: bool) -> Work:
        from fastalign.kernels.resample import resample

        rows, length, count = (min(prompts, 3), min(n, 5001), min(k, 20)) if small else (prompts, n, k)
        log_weights = torch.randn(rows, length, dtype=dtype, device=device) * 2
        mask = torch.rand(rows, length, device=device) > 0.2 if masked else None
        number = METHODS.index(method)

        def check():
            part = None if mask is None else mask[:CHECKED]
            truth = reference.resample(log_weights[:CHECKED], count, method, part, 1)
            assert torch.equal(resample(log_weights, count, number, mask, 1)[:CHECKED], truth)

        return Work(
            lambda: resample(log_weights, count, number, mask, 1),
            bytes=log_weights.nbytes * READS.get(method, 1) + (mask.nbytes if masked else 0) + rows * count * 8,
            peers=peers(log_weights, count, method) if device == "cuda" and not masked else {},
            check=check,
        )

    name = f"{method}, {prompts:,} × {n:,}, k = {k:,}, {str(dtype).removeprefix('torch.')}{', masked' * masked}"
    return KernelCase(name, build, streaming=False)


def peers(log_weights, k, method):
    if method == "multinomial":
        return {"softmax + multinomial": lambda: log_weights.softmax(-1).multinomial(k, replacement=True)}
    if method == "gumbel_top_k":
        return {"softmax + multinomial": lambda: log_weights.softmax(-1).multinomial(k)}
    if method == "best":
        return {"topk": lambda: log_weights.topk(k)}

    def comb():
        mass = log_weights.double().softmax(-1).cumsum(-1)
        shares = (torch.arange(k, device=mass.device) + torch.rand(len(mass), 1, device=mass.device)) / k
        return torch.searchsorted(mass, shares * mass[:, -1:])

    return {"cumsum + searchsorted": comb} if method != "residual" else {}
