"""layer_passes: the small passes of a decoder layer in a step of decoding, one launch each.

`norm`: RMSNorm, a program a row, after adding the residual if there is one. `rotate`: queries and keys turned by their
rotary embedding, after a norm of each head if there is one, and the new keys and values written to their places in the
cache; a program a row and head. `gate`: silu(g) u or gelu(g) u, by blocks. A norm multiplies by offset + weight.

Bytes: each input read once, each output written once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from fastalign.kernels._elementary import exp
from fastalign.kernels._rows import unit_stride
from torch import Tensor

ELEMENTS = 1024  # of a block of the gate
THREAD = 16  # elements of a norm's row
# gelu's tanh form, x (1 + tanh(√(2/π) (x + c x³))) / 2, is x / (1 + exp(-2 √(2/π) (x + c x³))).
SLOPE, CUBIC = tl.constexpr(2 * (2 / math.pi) ** 0.5), tl.constexpr(0.044715)


@triton.jit(do_not_specialize=["eps", "offset"])
def _norm(y, total, x, residual, weight, x_row, residual_row, width, eps, offset, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * x_row + at, mask=inside, other=0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row * residual_row + at, mask=inside, other=0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * width + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value) / width + eps)
    value *= offset + tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    tl.store(y + row * width + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _half(x, at, inside):
    return tl.load(x + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def _turn(out, x, weight, eps, offset, cos, sin, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """out = x cos + (-x's second half, its first) sin, of 2 HALF numbers, x normed by `weight` unless that is None."""
    i = tl.arange(0, BLOCK)
    inside, j = i < HALF, HALF + i
    a, b = _half(x, i, inside), _half(x, j, inside)
    if weight is not None:
        scale = tl.rsqrt(tl.sum(a * a + b * b) / (2 * HALF) + eps)
        a *= scale * (offset + _half(weight, i, inside))
        b *= scale * (offset + _half(weight, j, inside))
    first = a * _half(cos, i, inside) - b * _half(sin, i, inside)
    second = b * _half(cos, j, inside) + a * _half(sin, j, inside)
    tl.store(out + i, first.to(out.dtype.element_ty), mask=inside)
    tl.store(out + j, second.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["q_eps", "k_eps", "offset"])
def _rotate(
    out, q, k, v, cos, sin, q_weight, k_weight, keys, values, lengths, heads, q_eps, k_eps, offset,
    q_row, q_head, k_row, k_head, v_row, v_head, cos_row, sin_row,
    key_row, key_head, key_step, value_row, value_head, value_step,
    HALF: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos += row * cos_row
    sin += row * sin_row
    if head < heads:
        to = out + (row * heads + head) * (2 * HALF)
        _turn(to, q + row * q_row + head * q_head, q_weight, q_eps, offset, cos, sin, HALF, BLOCK)
    else:
        head -= heads
        place = tl.load(lengths + row)
        to_key = keys + row * key_row + head.to(tl.int64) * key_head + place * key_step
        _turn(to_key, k + row * k_row + head * k_head, k_weight, k_eps, offset, cos, sin, HALF, BLOCK)
        i = tl.arange(0, BLOCK_DV)
        value = tl.load(v + row * v_row + head * v_head + i, mask=i < DV)
        to_value = values + row * value_row + head.to(tl.int64) * value_head + place * value_step
        tl.store(to_value + i, value, mask=i < DV)


@triton.jit
def _gate(out, g, u, count, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gate = tl.load(g + at, mask=inside, other=0).to(tl.float32)
    of = SLOPE * (gate + CUBIC * gate * gate * gate) if GELU else gate
    value = gate / (1 + exp(-of)) * tl.load(u + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """(the norm of the sum, the sum), both (rows, width); without a residual the second is empty."""
    rows, width = x.shape
    y, total = x.new_empty(rows, width), x.new_empty((rows, width) if residual is not None else (0,))
    x, residual = unit_stride(x), None if residual is None else unit_stride(residual)
    block = triton.next_power_of_2(width)
    _norm[(rows,)](
        y, total, x, residual, weight.contiguous(), x.stride(0), 0 if residual is None else residual.stride(0), width,
        eps, offset, BLOCK=block, enable_fp_fusion=True, num_warps=min(max(block // (32 * THREAD), 1), 16),
    )  # fmt: skip
    return y, total


def rotate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_eps: float,
    k_eps: float,
    offset: float,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
) -> Tensor:
    """The turned q (rows, heads, d); the turned k and v are in the caches (rows, kv heads, room, d) at `lengths`."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    q, k, v, cos, sin = map(unit_stride, (q, k, v, cos, sin))
    (rows, heads, d), dv = q.shape, v.shape[-1]
    _rotate[(rows, heads + k.shape[1])](
        out, q, k, v, cos, sin, q_weight, k_weight, keys, values, lengths, heads, q_eps, k_eps, offset,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.stride(0), sin.stride(0),
        *keys.stride()[:3], *values.stride()[:3],
        HALF=d // 2, DV=dv, BLOCK=triton.next_power_of_2(d // 2), BLOCK_DV=triton.next_power_of_2(dv),
        enable_fp_fusion=True, num_warps=1,
    )  # fmt: skip
    return out


def gate(g: Tensor, u: Tensor, gelu: bool) -> Tensor:
    """silu(g) u, or gelu(g) u, of g's shape."""
    out = torch.empty_like(g, memory_format=torch.contiguous_format)
    _gate[(triton.cdiv(g.numel(), ELEMENTS),)](
        out, g.contiguous(), u.contiguous(), g.numel(), GELU=gelu, BLOCK=ELEMENTS, enable_fp_fusion=True, num_warps=4
    )
    return out
