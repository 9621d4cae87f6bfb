"""Non-unique λ: along a constant combination of rewards the dual is flat, and the λ of least norm is taken."""

from __future__ import annotations

import numpy as np

FLAT = 1e-13  # smallest eigenvalue of the correlations that is not rounding


def flat_directions(hessian: np.ndarray, constant: np.ndarray) -> np.ndarray | None:
    """An orthonormal basis (r, k) of the varying combinations of the k rewards; None if all combinations vary.

    hessian: (m, m) the rewards' covariance under p0 in units of σ: its null space leaves μ undetermined.
    """
    moving = np.flatnonzero(~constant)
    if len(moving) < 2:
        return None
    hessian = hessian if len(moving) == len(constant) else hessian[np.ix_(moving, moving)]
    values, vectors = np.linalg.eigh(hessian)
    steep = values > FLAT * len(moving)
    return None if steep.all() else vectors[:, steep].T


def least_norm(
    mu: np.ndarray, gradient: np.ndarray, rows: np.ndarray, lower: np.ndarray, upper: np.ndarray, constant: np.ndarray
) -> tuple[np.ndarray | None, bool]:
    """The minimiser of least |μ| within the bounds with the same scores as `mu` (m,), or None if that is `mu`; and
    whether the minimiser is unique. gradient: (m,) at `mu`. rows: the result of `flat_directions`.
    """
    moving = np.flatnonzero(~constant)
    # A value that is slack by more than rounding has μ = 0 in every minimiser.
    free = (np.abs(gradient[moving]) <= 1e-7) | (mu[moving] != 0.0)
    if np.linalg.matrix_rank(rows[:, free], tol=1e-7) == np.count_nonzero(free):
        return None, True
    from scipy.optimize import lsq_linear

    # Least |z| with rows z = rows μ, z within bounds; the scores count 1e7 times as much as the length.
    at = moving[free]
    size = max(1.0, float(np.abs(mu).max()))
    system = np.vstack([1e7 * rows[:, free], np.eye(len(at))])
    target = np.concatenate([1e7 * (rows[:, free] @ (mu[at] / size)), np.zeros(len(at))])
    shortest = lsq_linear(system, target, (lower[at] / size - 1e-300, upper[at] / size + 1e-300), method="bvls").x
    least = np.zeros_like(mu)
    least[at] = np.clip(shortest * size, lower[at], upper[at])
    least[np.abs(least) <= 1e-13 * size] = 0.0
    return least, False
