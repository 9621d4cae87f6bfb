"""The compiled Newton method (csrc/map_newton.cpp) for an array in memory: whole solves, without Python between passes.

Rewards elsewhere (disk, GPU, other ranks), more values, or a missing extension are handled by `newton`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastalign import backend
from fastalign.backend import threads
from fastalign.palette.newton import Minima
from fastalign.palette.passes import ArrayPass, Pass

if TYPE_CHECKING:
    from fastalign.palette.problem import Problem

MOST_VALUES = 64
UNMEASURED, FLAT, STEEP = range(3)


def serves(run: Pass) -> bool:
    return isinstance(run, ArrayPass) and run.is_native and len(run.center) <= MOST_VALUES


def minimise(problem: Problem, start: np.ndarray | None, measured: bool) -> Minima | None:
    """Solves all of a `Problem`'s palettes, and stores in it the moments at λ = 0 and the units.

    start: (K, m) initial λ, or None. measured: whether the problem's units are known. Returns None if they must be
        measured.
    """
    assert isinstance(problem.run, ArrayPass)  # which `serves` says
    count, m = problem.palettes.shape
    if not measured:
        problem.scale = np.empty(m)
    first, passes, certified = np.empty(3 + m + m * m), np.empty(count, dtype=np.int64), np.empty(count, dtype=bool)
    mu, gradient, certificate = np.empty((3, count, m))
    value, ess, residual = np.empty((3, count))
    given = (problem.constant, problem.short) if measured else (None, None)
    start = None if start is None else np.ascontiguousarray(start, dtype=np.float64)
    verdict = backend.native.map_newton(
        (first, problem.scale, mu, value, gradient, ess, residual, certificate, certified, passes),
        problem.run.description,
        (problem.palettes, problem.sign, start, *given),
        problem.tol,
        problem.lam_max,
        threads(),
    )
    if verdict == UNMEASURED:
        return None
    problem.mean, problem.cov, problem.steep = first[3 : 3 + m], first[3 + m :].reshape(m, m), verdict == STEEP
    return Minima(mu, value, gradient, ess, residual, passes, certificate, certified)
