"""A tensor (..., V) as the rows of a kernel, without a copy where two strides can walk its leading dimensions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from fastalign._base.strides import two_strides

THREADS = 256  # of a program that streams rows
VECTOR_BYTES = 16  # that a thread loads at once


class Rows(NamedTuple):
    """Row r begins at r // inner * outer_stride + r % inner * inner_stride; its elements stand column_stride apart."""

    inner: int
    outer_stride: int
    inner_stride: int
    column_stride: int


def rows_of(x: Tensor) -> tuple[Tensor, Rows]:
    """`x`, copied only if its leading dimensions need a third stride, and how to walk it."""
    strides = two_strides(x)
    if strides is None:
        x = x.contiguous()
        strides = two_strides(x)
    outer_stride, inner, inner_stride = strides
    return x, Rows(inner, outer_stride, inner_stride, x.stride(-1) if x.ndim and x.shape[-1] > 1 else 1)


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied only if its last dimension has a stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def row_start(row, inner, outer_stride, inner_stride):
    """The offset of a row, in 64 bits."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


def lanes_and_options(length: int, dtype: torch.dtype, device: torch.device) -> tuple[int, dict]:
    """How many elements of a row THREADS load at once, a power of two not far beyond `length`; and how to launch.

    On AMD exp may flush what is below 1e-38 to 0: caring for it would take more instructions than exp itself.
    """
    vector = VECTOR_BYTES // dtype.itemsize
    lanes = min(THREADS * vector, triton.next_power_of_2(length))
    target = None if device.type == "cpu" else driver.active.get_current_target()
    options = {"enable_fp_fusion": True, "num_warps": max(lanes // (vector * (target.warp_size if target else 32)), 1)}
    if target and target.backend == "hip":
        options["allow_flush_denorm"] = True
    return lanes, options
