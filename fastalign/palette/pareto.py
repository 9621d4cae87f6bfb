"""Non-dominated points, and the volume that they dominate.

Higher is better in every coordinate.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from fastalign._base.errors import UserError
from fastalign.ops import checks
from fastalign.palette.inputs import Array, to_numpy

BLOCK = 256


def pareto_front(points: Array) -> np.ndarray:
    """Ascending indices of the points that no other point dominates (is at least as high in all and higher in one).

    points: (n, d), n >= 0, d >= 1. Equal points do not dominate each other: all copies are kept.
    O(n log n) for d <= 3; beyond, n times the size of the front at worst. Raises UserError on NaN or infinity.

    >>> from fastalign import palette
    >>> palette.pareto_front([[1, 3], [2, 2], [1, 2], [3, 1]])
    array([0, 1, 3])
    """
    points = _checked(points)
    n, d = points.shape
    if n == 0:
        return np.empty(0, dtype=np.int64)
    # Only the order matters: ranks are integers, whose sums cannot overflow and whose ties are exact.
    distinct, which = np.unique(points, axis=0, return_inverse=True)
    ranks = np.stack([np.unique(column, return_inverse=True)[1] for column in distinct.T], axis=1)
    kept = _kept_by_sweep(ranks) if d <= 3 else _kept_by_blocks(ranks)
    return np.flatnonzero(kept[which.reshape(n)])


def hypervolume(points: Array, reference: Array) -> float:
    """Volume of the set that the points dominate above `reference`: ∪ [reference, point].

    points: (n, d), n >= 0. reference: (d,). A point that does not exceed it in every coordinate adds nothing.
    Exact: a sweep in two dimensions, above that each point's exclusive volume by one dimension less (While, Bradstreet
    & Barone 2012); hundreds of points take seconds from d = 6 on. Raises UserError on NaN or infinity.

    >>> from fastalign import palette
    >>> palette.hypervolume([[1, 3], [2, 2]], [0, 0])
    5.0
    """
    points = _checked(points)
    checks.arrays(reference=reference)
    reference = np.asarray(to_numpy(reference), dtype=np.float64)
    if reference.shape != (points.shape[1],):
        raise UserError(
            f"reference must have one level for each of the {points.shape[1]} values, got {reference.shape}"
        )
    if not np.isfinite(reference).all():
        raise UserError(f"reference must be finite, got {reference[~np.isfinite(reference)][0]}")
    heights = points[(points > reference).all(axis=1)] - reference
    return _volume(_front_of(heights))


def _checked(points) -> np.ndarray:
    checks.arrays(points=points)
    points = np.asarray(to_numpy(points))
    if points.ndim != 2 or points.shape[1] == 0:
        raise UserError(f"points must have shape (n, d), d at least 1, got {points.shape}")
    if points.dtype.kind not in "fiub":
        raise checks.WrongType(f"points must be real numbers, got {points.dtype}")
    points = points.astype(np.float64, copy=False)
    bad = np.argwhere(~np.isfinite(points))
    if len(bad):
        i, j = bad[0]
        raise UserError(f"points must be finite, got {points[i, j]} in row {i}, column {j}")
    return points


def _kept_by_sweep(ranks: np.ndarray) -> np.ndarray:
    """For d <= 3 and distinct rows: in descending order of the first value, each is compared with the staircase of the
    previous ones.

    The staircase is the front of their last two values, as pairs (b, c): b ascending, c descending.
    """
    wide = np.zeros((len(ranks), 3), dtype=np.int64)
    wide[:, : ranks.shape[1]] = ranks
    kept = np.zeros(len(ranks), dtype=bool)
    stairs: list[tuple[int, int]] = []
    # Ties are broken by the values that follow, so that one that dominates always comes first.
    for i in np.lexsort((-wide[:, 2], -wide[:, 1], -wide[:, 0])):
        b, c = int(wide[i, 1]), int(wide[i, 2])
        # From here on b' >= b, and the first has the highest c' of them.
        at = bisect_left(stairs, (b, -1))
        if at < len(stairs) and stairs[at][1] >= c:
            continue
        kept[i] = True
        end = at + (at < len(stairs) and stairs[at][0] == b)
        while at > 0 and stairs[at - 1][1] <= c:
            at -= 1
        stairs[at:end] = [(b, c)]
    return kept


def _kept_by_blocks(ranks: np.ndarray) -> np.ndarray:
    """For any d and distinct rows: in the order of the sums of ranks, in which a dominating row comes first."""
    order = np.argsort(-ranks.sum(axis=1), kind="stable")
    front = np.empty((0, ranks.shape[1]), dtype=ranks.dtype)
    kept = np.zeros(len(ranks), dtype=bool)
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        for rivals in (front[i : i + BLOCK] for i in range(0, len(front), BLOCK)):
            block = block[~_dominated(ranks[block], rivals)]
        block = block[~_dominated(ranks[block], ranks[block])]
        kept[block] = True
        front = np.concatenate([front, ranks[block]])
    return kept


def _dominated(rows: np.ndarray, rivals: np.ndarray) -> np.ndarray:
    """Which rows some other row of `rivals` equals or exceeds everywhere."""
    above = np.ones((len(rows), len(rivals)), dtype=bool)
    same = above.copy()
    for j in range(rows.shape[1]):
        above &= rivals[None, :, j] >= rows[:, None, j]
        same &= rivals[None, :, j] == rows[:, None, j]
    return (above & ~same).any(axis=1)


def _front_of(heights: np.ndarray) -> np.ndarray:
    return np.unique(heights[pareto_front(heights)], axis=0) if len(heights) > 1 else heights


def _volume(heights: np.ndarray) -> float:
    """∪ [0, point] of distinct points that do not dominate each other, all > 0."""
    n, d = heights.shape
    if n <= 1 or d == 1:
        return float(heights.prod(axis=1).sum())
    if d == 2:
        a, b = heights[np.argsort(heights[:, 0])].T
        return float((np.diff(a, prepend=0.0) * b).sum())
    # Lowest first in the last value: all later points reach at least as high there, so one dimension drops out.
    heights = heights[np.argsort(heights[:, -1], kind="stable")]
    total = 0.0
    for k, point in enumerate(heights):
        shared = np.minimum(heights[k + 1 :, :-1], point[:-1])
        total += float(point[-1]) * (float(point[:-1].prod()) - _volume(_front_of(shared)))
    return total
