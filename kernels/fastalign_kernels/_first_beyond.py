"""The inverse of a cumulative sum, in index order: how a uniform number becomes a place."""

import triton
import triton.language as tl


@triton.jit
def first_beyond(weights, target, SIZE: tl.constexpr):
    """The first place whose cumulative weight exceeds target, else the last with any; and what is before it."""
    place = tl.arange(0, SIZE)
    found = tl.min(tl.where((weights > 0) & (tl.cumsum(weights, 0) > target), place, SIZE))
    found = tl.minimum(found, tl.max(tl.where(weights > 0, place, 0)))
    return found, tl.sum(tl.where(place < found, weights, 0))
