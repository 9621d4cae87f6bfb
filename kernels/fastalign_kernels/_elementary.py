"""Elementary functions that keep their digits, from what Triton has on every target: its exp and log."""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """Of float32 by exp2, which compiles to the hardware's instruction alone; tl.exp cares for denormal results too,
    and takes a third more instructions a logit."""
    if x.dtype == tl.float64:
        found = tl.exp(x)
    else:
        found = tl.exp2(x * 1.4426950408889634)
    return found


@triton.jit
def log_sigmoid(x):
    """min(x, 0) - log(1 + exp(-|x|)), the logarithm as log(u) · z / (u - 1), u = 1 + z rounded (Goldberg 1991)."""
    z = exp(-tl.abs(x))
    u = 1 + z
    log1p = tl.where(u == 1, z, tl.log(u) * (z / tl.where(u == 1, 1.0, u - 1)))
    return tl.where(x < 0, x, 0.0) - log1p


@triton.jit
def exp_excess(x):
    """exp(x) - 1 - x: its series, x²/2 (1 + x/3 (1 + x/4 (...))), where the difference would cancel."""
    tail = _series(x, 3)
    return tl.where(tl.abs(x) < 0.5, x * x * 0.5 * tail, exp(x) - 1 - x)


@triton.jit
def expm1(x):
    """exp(x) - 1: its series, x (1 + x/2 (1 + x/3 (...))), where the difference would cancel."""
    return tl.where(tl.abs(x) < 0.5, x * _series(x, 2), exp(x) - 1)


@triton.jit
def _series(x, FIRST: tl.constexpr):
    """1 + x/FIRST (1 + x/(FIRST + 1) (1 + ...)), for |x| < 0.5 to the last digit of x's precision."""
    LAST: tl.constexpr = 15 if x.dtype == tl.float64 else 9
    total = x * 0 + 1
    for i in tl.static_range(LAST - FIRST + 1):
        total = 1 + x * (1.0 / (LAST - i)) * total
    return total
