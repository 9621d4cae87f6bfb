"""Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011): the random numbers of csrc/philox.h, bit for bit."""

import triton
import triton.language as tl


@triton.jit
def philox_uniform(seed, row, offset):
    """A float64 in (0, 1), a function of three integers of 64 bits, blocks that broadcast or scalars.

    The key is the seed, the counter (row, offset). 53 of the 128 bits, times 2^-53, and at least that.
    """
    zero = tl.zeros((), tl.int64)  # added, not cast: Triton's interpreter keeps an argument of [2^31, 2^32) in 32 bits
    row, offset, seed = zero + row, zero + offset, zero + seed
    c0, c1 = row.to(tl.uint32), (row >> 32).to(tl.uint32)
    c2, c3 = offset.to(tl.uint32), (offset >> 32).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    A: tl.constexpr = 0xD2511F53
    B: tl.constexpr = 0xCD9E8D57
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, A), c0 * A
        high1, low1 = tl.umulhi(c2, B), c2 * B
        c0, c1 = high1 ^ c1 ^ k0, low1
        c2, c3 = high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    bits = ((c0 >> 5).to(tl.int64) << 26) | (c1 >> 6).to(tl.int64)
    return tl.maximum(bits, 1).to(tl.float64) * (1.0 / (1 << 53))


@triton.jit
def row_uniform(seed, rows, row, offset, ROWS: tl.constexpr):
    """The row's random number. ROWS: columns of `rows`, the row's own stream and step; 0 where there are none."""
    stream = tl.load(rows + row * ROWS) if ROWS else row
    return philox_uniform(seed, stream, offset + tl.load(rows + row * ROWS + 1) if ROWS == 2 else offset)
