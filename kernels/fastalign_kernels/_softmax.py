"""The softmax of a row met piece by piece, shared by the kernels that score labels: as csrc/softmax.h does it.

A row's state is its largest logit so far and what was summed against it; each new piece of logits may raise the
largest, and then rescales the sums. Pieces are tiles of any rank: the functions reduce along AXIS, and a state has the
tile's shape without it. A row's values given to `logit_gradient` must broadcast against the tile.

Largest begins at the lowest finite number, not at -inf: then -inf logits and tiles of nothing else give exp(-inf) = 0
and no -inf - -inf. A NaN, or a logit of +inf, makes the total NaN, whatever the maximum says, and by it all that
follows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastalign.kernels._elementary import exp

from fastalign import empty

ALL = tl.constexpr(empty.ALL)  # what STATISTICS is compared with; any above 0 ask for the entropy


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """What a kernel accumulates in, for the constexpr COMPUTE: float64 for float64, float32 for the rest."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def transform_factors(
    temperature: float, softcap: float | None, logit_scale: float = 1.0
) -> tuple[float, float, float]:
    """to_cap, to_z and slope: z = to_z · x, or to_z · tanh(to_cap · x) with a softcap; slope is dz/dx, with one at 0.

    For kernel arguments annotated tl.float64 (a plain float would lose digits on its way to a float64 kernel), each
    made COMPUTE by `tl.full((), factor, COMPUTE)`.
    """
    slope = logit_scale / temperature
    return (logit_scale / softcap, softcap / temperature, slope) if softcap else (0.0, slope, slope)


@triton.jit
def tanh(x):
    """No libdevice; never overflows; for small x the series, since 1 - exp(-2x) loses its digits there."""
    size = tl.abs(x)
    e = exp(-2 * size)
    y = (1 - e) / (1 + e)
    if x.dtype == tl.float32:
        square = size * size
        series = size * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
        y = tl.where(size < 0.15, series, y)
    return tl.where(x < 0, -y, y)


@triton.jit
def transform(x, to_cap, to_z, SOFTCAP: tl.constexpr):
    """The logit z of x. Padding must be made -inf after it: a softcap makes -inf finite."""
    if SOFTCAP:
        x = tanh(x * to_cap)
    return x * to_z


@triton.jit
def lowest(COMPUTE: tl.constexpr):
    """Where the largest logit begins."""
    if COMPUTE == tl.float64:
        found = tl.full((), -1.7976931348623157e308, COMPUTE)
    else:
        found = tl.full((), -3.4028234663852886e38, COMPUTE)
    return found


@triton.jit
def not_too_low(d):
    """Where exp(d) is 0 anyway: so that 0 · d is not NaN."""
    if d.dtype == tl.float64:
        found = tl.maximum(d, -800.0)
    else:
        found = tl.maximum(d, -100.0)
    return found


@triton.jit
def add_logits(largest, total, z, AXIS: tl.constexpr):
    """The state (largest, total = Σ exp(z - largest)) after the logits z; padding is -inf."""
    top = tl.maximum(largest, tl.max(z, AXIS))
    total = total * exp(largest - top) + tl.sum(exp(z - tl.expand_dims(top, AXIS)), AXIS)
    return top, total


@triton.jit
def add_statistics(largest, total, weighted, squares, plain, z, valid, ALL: tl.constexpr, AXIS: tl.constexpr):
    """The same with weighted = Σ e (z - largest), and with ALL squares = Σ e² and plain = Σ z; valid: not padding."""
    top = tl.maximum(largest, tl.max(z, AXIS))
    drop = largest - top
    scale = exp(drop)
    d = z - tl.expand_dims(top, AXIS)
    e = exp(d)
    weighted = scale * (weighted + not_too_low(drop) * total) + tl.sum(e * not_too_low(d), AXIS)
    total = scale * total + tl.sum(e, AXIS)
    if ALL:
        squares = scale * scale * squares + tl.sum(e * e, AXIS)
        plain += tl.sum(tl.where(valid, z, 0), AXIS)
    return top, total, weighted, squares, plain


@triton.jit
def merge(largest, total, AXIS: tl.constexpr):
    """One state of the many along AXIS."""
    top = tl.max(largest, AXIS)
    return top, tl.sum(total * exp(largest - tl.expand_dims(top, AXIS)), AXIS)


@triton.jit
def merge_statistics(largest, total, weighted, squares, plain, ALL: tl.constexpr, AXIS: tl.constexpr):
    """The same with the statistics."""
    top = tl.max(largest, AXIS)
    drop = largest - tl.expand_dims(top, AXIS)
    scale = exp(drop)
    weighted = tl.sum(scale * (weighted + not_too_low(drop) * total), AXIS)
    squares = tl.sum(scale * scale * squares, AXIS) if ALL else 0.0
    plain = tl.sum(plain, AXIS) if ALL else 0.0
    return top, tl.sum(scale * total, AXIS), weighted, squares, plain


@triton.jit
def log_prob(label_z, largest, total):
    """log p of the label; 0 in a row that is all -inf, whose total is 0."""
    return tl.where(total == 0, 0, (label_z - largest) - tl.log(total))


@triton.jit
def entropy_of(total, weighted):
    """-Σ p log p."""
    return tl.where(total == 0, 0, tl.log(total) - weighted / total)


@triton.jit
def log_sum_sq_probs_of(total, squares):
    """log Σ p²."""
    return tl.where(total == 0, 0, tl.log(squares) - 2 * tl.log(total))


@triton.jit
def probability_gradient(p, d, hit, grad, grad_entropy, total, entropy, ENTROPY: tl.constexpr):
    """The gradient with respect to z, of p = exp(d) / total.

    d log p_l / dz = 1[l] - p;  dH / dz = -p (log p + H).
    """
    found = grad * (tl.where(hit, 1, 0) - p)
    if ENTROPY:
        found -= grad_entropy * p * (not_too_low(d) - tl.log(total) + entropy)
    return found


@triton.jit
def logit_gradient(
    x,
    hit,
    grad,
    grad_entropy,
    largest,
    total,
    entropy,
    to_cap,
    to_z,
    slope,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """The gradient with respect to x, the logit before its transform; hit: x is the label's.

    That of z times dz/dx = (1 - tanh²) slope. 0 in a row that is all -inf.
    """
    if SOFTCAP:
        x = tanh(x * to_cap)
    d = x * to_z - largest
    found = probability_gradient(exp(d) * (1 / total), d, hit, grad, grad_entropy, total, entropy, ENTROPY)
    if SOFTCAP:
        found *= 1 - x * x
    return tl.where(total == 0, 0, found * slope)
