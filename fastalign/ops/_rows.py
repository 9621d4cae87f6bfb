"""A tensor (..., V) as the rows that the engine reads, without a copy where two strides can say it."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the engine accumulates in and returns: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def describe(x: Tensor) -> tuple[tuple, Tensor]:
    """The engine's description of the rows of `x`, and the tensor to keep alive while it is used.

    Copies only if the last dimension is not contiguous or the leading ones cannot be walked with two strides.
    """
    rows = two_strides(x)
    if (x.stride(-1) != 1 and x.shape[-1] > 1) or rows is None:
        x = x.contiguous()
        rows = two_strides(x)
    outer_stride, inner, inner_stride = rows
    vocab = x.shape[-1]
    count = x.numel() // vocab
    return (x.data_ptr(), DTYPES[x.dtype], count, inner, outer_stride, inner_stride, vocab), x


def two_strides(x: Tensor) -> tuple[int, int, int] | None:
    """(outer stride, inner size, inner stride) that walk the leading dimensions as one; None where two do not do."""
    dims: list[list[int]] = []  # [size, stride] of the leading dimensions, neighbours merged where one stride serves
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = [dims[-1][0] * size, stride]
        else:
            dims.append([size, stride])
    if len(dims) > 2:
        return None
    dims = [[1, 0]] * (2 - len(dims)) + dims
    return dims[0][1], max(dims[1][0], 1), dims[1][1]
