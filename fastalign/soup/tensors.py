"""Weighted sums in memory, through the engine, or through torch where the engine is not built."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastalign import backend, reference
from fastalign.ops.buffers import buffer


def mix_tensors(tensors: Sequence[Tensor], rows: Sequence[Sequence[float]], dtype: torch.dtype) -> list[Tensor]:
    """K sums Σ rows[k][i] tensors[i] in `dtype`, contiguous. tensors: one shape and device, floating-point types of FLOATS.

    Added up in float32, in float64 where an input or `dtype` is; beyond float8_e4m3fn's range, its largest number.
    """
    if backend.choose(tensors[0].device) != "cpu":
        return reference.weighted_sums(tensors, rows, dtype)
    outs = [torch.empty(tensors[0].shape, dtype=dtype) for _ in rows]
    kept = [tensor.detach().contiguous() for tensor in tensors]
    backend.engine.soup_memory(
        [buffer(out) for out in outs], [buffer(tensor) for tensor in kept], [float(w) for row in rows for w in row],
        backend.threads(),
    )  # fmt: skip
    return outs
