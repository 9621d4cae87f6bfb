"""GPU cases of shared_attention: a decoding step's attention for 1, 8 and 64 prompts, at the heads of known models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from fastalign.bench.gpu_common import KernelCase, Work
from fastalign.kernels import shared_attention as kernel

from fastalign import reference
from fastalign.ops.shared_attention import Layout


def cases() -> Iterator[KernelCase]:
    b16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    for prompts, each, heads, kv, d, dtype, window, softcap in (
        (1, 64, 32, 8, 128, b16, None, None),
        (8, 64, 32, 8, 128, b16, None, None),
        (64, 8, 32, 8, 128, b16, None, None),
        (64, 1, 9, 3, 64, b16, None, None),
        (1, 64, 9, 3, 64, b16, None, None),
        (8, 16, 9, 3, 64, f32, None, None),
        (8, 16, 16, 8, 256, b16, 512, 50.0),
        (8, 16, 32, 32, 80, f16, None, None),
        (8, 16, 32, 8, 128, f32, None, None),
        (4, 4, 16, 8, 256, f32, 512, 50.0),
        (1, 1, 128, 8, 128, b16, None, None),
    ):
        name = f"{prompts} × {each}, {heads} heads on {kv} × {d} {str(dtype)[6:]}"
        name += " window" * (window is not None) + " softcap" * (softcap is not None)
        yield KernelCase(
            name, partial(_build, prompts, each, heads, kv, d, dtype, window, softcap, 1000, 256), streaming=False
        )


def _build(prompts, each, heads, kv, d, dtype, window, softcap, length, own, device: str, small: bool) -> Work:
    if small:
        prompts, each, heads, kv, length, own = min(prompts, 3), min(each, 2), 2 * heads // kv, 2, 40, 9
        window = window and 20
    rows, total = prompts * each, prompts * length
    shapes = [(rows, heads, d), *[(kv, total, d)] * 2, *[(rows, kv, own, d)] * 2]
    q, *caches = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
    lengths = torch.full((rows,), own - 1, device=device)
    of = [row % prompts for row in range(rows)]
    layout = Layout.of(of, [length] * prompts, torch.device(device))
    settings = d**-0.5, window or 0, softcap or 0.0
    if device != "meta":
        for x in (q, *caches):
            x.normal_()

    def run():
        splits = layout.splits(kv)
        parts = kernel.prompts(q, *caches[:2], *layout[:3], lengths, splits, layout.most, *settings)
        return kernel.rows(q, *caches[2:], lengths, *parts, *settings)

    def check():
        spans = [(prompt * length, (prompt + 1) * length) for prompt in of]
        wide = [x.double() for x in (q, *caches)]
        truth = reference.shared_attention(*wide, spans, lengths.tolist(), d**-0.5, window, softcap)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(run().double(), truth, rtol=max(1e-4, 2 * eps), atol=max(1e-4, eps))

    work = 4 * rows * heads * d * (length + own)
    return Work(run, sum(x.nbytes for x in (q, q, *caches)), flops=work, check=check)
