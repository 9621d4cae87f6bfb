"""How kernels walk a tensor that is not contiguous."""

from __future__ import annotations

from torch import Tensor


def two_strides(x: Tensor) -> tuple[int, int, int] | None:
    """(outer stride, inner size, inner stride) that walk the leading dimensions as one; None if two strides are not
    enough."""
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
