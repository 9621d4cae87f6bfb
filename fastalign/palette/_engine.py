"""The Newton iteration of `_newton` in the compiled engine: whole solves, with no Python between their passes.

It serves one palette over any array, and many where the rewards are few enough to be kept as columns. What lies
elsewhere (disk, GPU, other ranks), has groups, or finds no compiled engine goes through `_newton` and `_batch`.
"""

from __future__ import annotations

import numpy as np

from fastalign import backend
from fastalign.backend import threads
from fastalign.palette._batch import Points
from fastalign.palette.passes import ArrayPass

MOST_VALUES = 64
# Columns of the rewards, in both precisions, that are worth their memory: for one solve, and for many.
KEPT, KEPT_FOR_MANY = 1 << 21, 1 << 24


def serves(run, count: int) -> bool:
    """Whether the engine solves `count` palettes over this pass's rewards by itself."""
    if not (isinstance(run, ArrayPass) and run.on_engine and run.groups is None and len(run.center) <= MOST_VALUES):
        return False
    return count == 1 or keeps(run.rows, len(run.center), KEPT_FOR_MANY)


def keeps(n: int, m: int, most: int = KEPT) -> bool:
    """Whether so many rewards' columns are kept in memory for a solve."""
    return 12 * n * (m + 2) <= most


def minimise(problem, points: Points, start: np.ndarray | None, skip: np.ndarray):
    """Each palette's last point, in place of its point at λ = 0 in `points`; how many reads of all rows each took, (K,),
    and its certificate (m,) or None.

    problem: a `Problem` over a pass that the engine serves. start: (K, m) μ to begin at, or None. skip: (K,) palettes
    to leave alone.
    """
    run, (count, m) = problem.run, points.mu.shape
    passes, certificate = np.zeros(count, dtype=np.int64), np.empty((count, m))
    certified = np.zeros(count, dtype=bool)
    start = None if start is None else np.ascontiguousarray(start)
    told = (problem.scale, problem.offset, problem.lower, problem.upper, start, problem.constant, skip)
    state = (points.mu, points.value, points.gradient, points.hessian, points.top, points.ess)
    keep = count > 1 or keeps(run.rows, m)
    backend.engine.map_newton(
        state, passes, certificate, certified, run.description, told, run.log_norm, problem.tol, keep, threads()
    )
    return passes, [certificate[k] if yes else None for k, yes in enumerate(certified.tolist())]
