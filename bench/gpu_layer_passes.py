"""GPU cases of layer_passes: the passes of a decoding step's layer, at the sizes of known models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from fastalign.bench.gpu_common import KernelCase, Work
from fastalign.kernels import layer_passes as kernel
from torch import Tensor


def cases() -> Iterator[KernelCase]:
    b16, f32 = torch.bfloat16, torch.float32
    for rows, width, dtype, added, offset in (
        (64, 4096, b16, True, 0.0),
        (512, 4096, b16, False, 0.0),
        (64, 576, f32, True, 0.0),
        (8, 16_384, b16, True, 0.0),
        (64, 3584, b16, True, 1.0),
    ):
        name = f"norm {rows} × {width:,} {str(dtype)[6:]}{' of a sum' * added}{' from 1' * bool(offset)}"
        yield KernelCase(name, partial(_norm, rows, width, dtype, added, offset), streaming=False)
    for rows, heads, kv, d, dtype, normed in (
        (64, 32, 8, 128, b16, True),
        (512, 9, 3, 64, f32, False),
        (64, 32, 32, 80, b16, False),
    ):
        name = f"rotate {rows}, {heads} heads and {kv} × {d} {str(dtype)[6:]}{' normed' * normed}"
        yield KernelCase(name, partial(_rotate, rows, heads, kv, d, dtype, normed), streaming=False)
    for rows, width, dtype, gelu in (
        (64, 14_336, b16, False),
        (512, 14_336, b16, False),
        (64, 1536, f32, False),
        (64, 14_336, b16, True),
    ):
        name = f"gate {rows} × {width:,} {str(dtype)[6:]}{' gelu' * gelu}"
        yield KernelCase(name, partial(_gate, rows, width, dtype, gelu))


def _tensor(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    x = torch.empty(shape, dtype=dtype, device=device)
    return x if device == "meta" else x.normal_()


def _close(result: Tensor, expected: Tensor) -> None:
    eps = torch.finfo(result.dtype).eps
    torch.testing.assert_close(result.double(), expected, rtol=max(1e-5, 2 * eps), atol=max(1e-5, eps / 8))


def _norm(rows: int, width: int, dtype: torch.dtype, added: bool, offset: float, device: str, small: bool) -> Work:
    if small:
        rows, width = 3, width // 16
    x, residual, weight = (_tensor(*shape, dtype=dtype, device=device) for shape in ((rows, width),) * 2 + ((width,),))

    def run():
        return kernel.norm(x, residual if added else None, weight, 1e-5, offset)

    def check():
        y, total = run()
        if added:
            _close(total, x.double() + residual.double())
        _close(y, F.rms_norm((total if added else x).double(), (width,), weight.double() + offset, 1e-5))

    return Work(run, x.nbytes * (4 if added else 2) + weight.nbytes, check=check)


def _rotate(rows: int, heads: int, kv: int, d: int, dtype: torch.dtype, normed: bool, device: str, small: bool) -> Work:
    if small:
        rows, heads, kv = 3, 3, 1
    q, k, v = (_tensor(rows, n, d, dtype=dtype, device=device) for n in (heads, kv, kv))
    cos, sin = (_tensor(rows, d, dtype=dtype, device=device) for _ in range(2))
    keys, values = (_tensor(rows, kv, 64, d, dtype=dtype, device=device) for _ in range(2))
    lengths = torch.full((rows,), 40, device=device)
    weight = _tensor(d, dtype=dtype, device=device) if normed else None

    def run():
        return kernel.rotate(q, k, v, cos, sin, weight, weight, 1e-6, 1e-6, 0.0, keys, values, lengths)

    def check():
        def turned(x: Tensor) -> Tensor:
            x = x.double() if weight is None else F.rms_norm(x.double(), (d,), weight.double(), 1e-6)
            a, b = x.chunk(2, -1)
            return x * cos.double()[:, None] + torch.cat([-b, a], -1) * sin.double()[:, None]

        _close(run(), turned(q))
        _close(keys[:, :, 40], turned(k))
        assert torch.equal(values[:, :, 40], v)

    return Work(run, 2 * (q.nbytes + k.nbytes + v.nbytes + cos.nbytes) + lengths.nbytes, check=check)


def _gate(rows: int, width: int, dtype: torch.dtype, gelu: bool, device: str, small: bool) -> Work:
    if small:
        rows, width = 3, width // 16 + 1
    g, u = (_tensor(rows, width, dtype=dtype, device=device) for _ in range(2))

    def run():
        return kernel.gate(g, u, gelu)

    def check():
        x = g.double()
        _close(run(), (F.gelu(x, approximate="tanh") if gelu else F.silu(x)) * u.double())

    return Work(run, 3 * g.nbytes, check=check)
