"""The backward pass of every loss that is a sum over tokens: what each row gets, spread over its tokens.

A row's incoming gradient goes to all of its valid places, or to each in proportion to the weight that the forward pass
left there, or both. Reads the mask or the weights once and writes the gradient once, in the dtype asked for. One
program does BLOCK tokens of one row.
"""

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def _sum_gradient(
    rows, mask, scales, weights, out, length, mask_stride, weight_stride, COMPUTE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < length
    gradient = tl.zeros((BLOCK,), COMPUTE)
    if rows is not None:
        valid = tl.load(mask + row * mask_stride + place, mask=inside, other=0) != 0
        gradient += tl.where(valid, tl.load(rows + row), 0)
    if scales is not None:
        weight = tl.load(weights + row * weight_stride + place, mask=inside, other=0)
        gradient += tl.where(weight != 0, tl.load(scales + row) * weight, 0)
    tl.store(out + row * length + place, gradient.to(out.dtype.element_ty), mask=inside)


@triton.jit
def valid_part(pointers, inside, valid, COMPUTE: tl.constexpr):
    """What lies there where it is valid, 0 elsewhere, NaN or not."""
    return tl.where(valid, tl.load(pointers, mask=inside, other=0).to(COMPUTE), 0)


def sum_gradient(rows, mask, scales, weights, dtype):
    over = weights if mask is None else mask
    out = torch.empty(over.shape, dtype=dtype, device=over.device)
    if out.numel() == 0:
        return out
    length = over.shape[-1]
    mask, weights = (None if x is None else contiguous_rows(x.reshape(-1, length)) for x in (mask, weights))
    rows, scales = (None if x is None else x.reshape(-1).contiguous() for x in (rows, scales))
    block = min(BLOCK, triton.next_power_of_2(length))
    _sum_gradient[(out.numel() // length, triton.cdiv(length, block))](
        rows,
        mask,
        scales,
        weights,
        out,
        length,
        *(0 if x is None else x.stride(0) for x in (mask, weights)),
        COMPUTE=compute(scales if rows is None else rows),
        BLOCK=block,
        enable_fp_fusion=True,
        num_warps=8 if block > 2048 else 4,
    )
    return out


def compute(x):
    """The precision of a kernel whose sums are of x's dtype."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def contiguous_rows(x):
    """x (R, T), copied only if the elements of a row do not lie next to each other."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
