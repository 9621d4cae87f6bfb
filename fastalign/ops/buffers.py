"""How tensors reach the native extension. Addresses leave Python only here, with the sizes and types that it checks.

A kernel sees memory, not a tensor: it would silently misread a slice, a transposed tensor or one on a GPU. So an
unsupported layout raises here, and a size or dtype that does not match the kernel raises in csrc/bindings.cpp. Both are
bugs of the caller, not a user's mistakes, so they are not UserErrors.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from fastalign._base.strides import two_strides

Buffer = tuple[int, int, str]  # address, elements, dtype
Rows = tuple[int, str, int, int, int, int, int]  # address, dtype, rows, inner, outer stride, inner stride, V


@overload
def buffer(x: Tensor) -> Buffer: ...
@overload
def buffer(x: None) -> None: ...
@overload
def buffer(x: Tensor | None) -> Buffer | None: ...
def buffer(x: Tensor | None) -> Buffer | None:
    """(address, elements, dtype) of a contiguous tensor on the CPU; None for None. The caller keeps it alive."""
    if x is None:
        return None
    if not (x.is_cpu and x.is_contiguous()) or x.is_neg():
        raise RuntimeError(f"native kernels take contiguous CPU tensors, got {_describe(x)}")
    return x.data_ptr(), x.numel(), _NAMES[x.dtype]


def rows(x: Tensor) -> tuple[Rows, Tensor]:
    """(address, dtype, rows, inner, outer stride, inner stride, V) of x (..., V), and the tensor to keep alive
    meanwhile.

    Copies only if the last dimension is not contiguous or the leading ones do not reduce to two strides.
    """
    strides = two_strides(x)
    if (x.stride(-1) != 1 and x.shape[-1] > 1) or strides is None:
        x = x.contiguous()
        strides = two_strides(x)
        assert strides is not None  # of a contiguous tensor
    if not x.is_cpu or x.is_neg():
        raise RuntimeError(f"native kernels take CPU tensors, got {_describe(x)}")
    outer_stride, inner, inner_stride = strides
    vocab = x.shape[-1]
    return (x.data_ptr(), _NAMES[x.dtype], x.shape[:-1].numel(), inner, outer_stride, inner_stride, vocab), x


class _Names(dict[torch.dtype, str]):
    """A torch.dtype's name, "float32"; cached, because str() takes as long as everything else."""

    def __missing__(self, dtype: torch.dtype) -> str:
        return self.setdefault(dtype, str(dtype).removeprefix("torch."))


_NAMES = _Names()


def _describe(x: Tensor) -> str:
    return f"shape {tuple(x.shape)}, strides {x.stride()}, {x.dtype} on {x.device}"
