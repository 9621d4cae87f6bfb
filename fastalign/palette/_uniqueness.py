"""λ where it is not unique: along a combination of rewards that is constant, the dual is flat, and the least λ is taken."""

from __future__ import annotations

import numpy as np

from fastalign import backend
from fastalign.palette._newton import Point

FLAT = 1e-13  # of the correlations' eigenvalues; what lies below is rounding


def ridge(m: int) -> float:
    """A covariance of m values in units of σ that is positive definite even without so much has no flat direction."""
    return 2 * FLAT * m


def flat_directions(hessian: np.ndarray, constant: np.ndarray) -> np.ndarray | None:
    """An orthonormal basis (r, k) of the combinations of the k rewards that do vary; None where all k of them do.

    hessian: (m, m) the rewards' covariance under p0 in units of σ: its null space is what leaves μ open.
    """
    moving = np.flatnonzero(~constant)
    if len(moving) < 2:
        return None
    hessian = hessian if len(moving) == len(constant) else hessian[np.ix_(moving, moving)]
    if backend.engine is not None and backend.engine.is_positive_definite(hessian, ridge(len(moving))):
        return None  # the usual case: nothing is flat
    values, vectors = np.linalg.eigh(hessian)
    steep = values > FLAT * len(moving)
    return None if steep.all() else vectors[:, steep].T


def least_norm(point: Point, rows: np.ndarray, lower, upper, constant) -> tuple[np.ndarray | None, bool]:
    """The minimiser of least |μ| within the bounds that has the scores of `point`, or None where that is `point`; and
    whether it was unique at all. rows: what `flat_directions` returned.
    """
    moving = np.flatnonzero(~constant)
    # A value that is slack by more than rounding has μ = 0 in every minimiser.
    free = (np.abs(point.gradient[moving]) <= 1e-7) | (point.mu[moving] != 0.0)
    if np.linalg.matrix_rank(rows[:, free], tol=1e-7) == np.count_nonzero(free):
        return None, True
    from scipy.optimize import lsq_linear

    # Least |z| with rows z = rows μ, z within bounds; the scores count 1e7 times as much as the length.
    at = moving[free]
    size = max(1.0, float(np.abs(point.mu).max()))
    system = np.vstack([1e7 * rows[:, free], np.eye(len(at))])
    target = np.concatenate([1e7 * (rows[:, free] @ (point.mu[at] / size)), np.zeros(len(at))])
    found = lsq_linear(system, target, (lower[at] / size - 1e-300, upper[at] / size + 1e-300), method="bvls").x
    mu = np.zeros_like(point.mu)
    mu[at] = np.clip(found * size, lower[at], upper[at])
    mu[np.abs(mu) <= 1e-13 * size] = 0.0
    return mu, False
