"""GPU cases of gae: short rows, rows of many blocks, float64; against the loop over time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from fastalign.bench.gpu_common import KernelCase, Work
from fastalign.bench.peers import python_loop
from fastalign.kernels import gae as kernel

from fastalign import reference


def cases() -> Iterator[KernelCase]:
    for rows, length, dtype in (
        (512, 128, torch.float32),
        (512, 1024, torch.float32),
        (4096, 2048, torch.float32),
        (256, 32_768, torch.float32),
        (512, 1024, torch.float64),
    ):
        yield KernelCase(f"{rows} × {length:,} {str(dtype)[6:]}", partial(_build, rows, length, dtype))


def _build(rows: int, length: int, dtype: torch.dtype, device: str, small: bool) -> Work:
    if small:
        rows, length = 3, length // 64 + 1
    rewards, values = (torch.empty(rows, length, dtype=dtype, device=device) for _ in range(2))
    mask = torch.ones(rows, length, dtype=torch.bool, device=device)
    if device != "meta":
        rewards.normal_()
        values.normal_()

    def run():
        return kernel.gae(rewards, values, mask, 0.99, 0.95)

    def check():
        for ours, truth in zip(run(), reference.gae(rewards.double(), values.double(), mask, 0.99, 0.95), strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)

    peers = {"Python loop over time": lambda: python_loop(rewards, values, 0.99, 0.95)} if rewards.is_cuda else {}
    return Work(run, rewards.numel() * (4 * rewards.element_size() + 1), check=check, peers=peers)
