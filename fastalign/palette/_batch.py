"""Newton on many palettes at once, in arrays: the plain steps that nearly all of them need.

What these do not settle (a step that must be shortened, a palette that shows itself infeasible) is left where it is,
for `_newton.newton` to go on with alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastalign.palette._newton import Point

ROUNDS = 12
LEFT, DONE, MOVING = 0, 1, 2


@dataclass
class Points:
    """K points, as `_newton.Point` has one: mu, gradient (K, m), hessian (K, m, m), value, top, ess (K,)."""

    mu: np.ndarray
    value: np.ndarray
    gradient: np.ndarray
    hessian: np.ndarray
    top: np.ndarray
    ess: np.ndarray

    def __getitem__(self, rows) -> Points:
        return Points(*(x[rows] for x in vars(self).values()))

    def __setitem__(self, rows, other: Points) -> None:
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine[rows] = theirs

    def one(self, k: int) -> Point:
        return Point(self.mu[k], float(self.value[k]), self.gradient[k], self.hessian[k], self.top[k], self.ess[k])

    def put(self, k: int, point: Point) -> None:
        for name, x in vars(self).items():
            x[k] = getattr(point, name)


def residuals(points: Points, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """(K,): `_newton.residual` of each."""
    moved = np.minimum(np.maximum(points.mu - points.gradient, lower), upper)
    return np.abs(points.mu - moved).max(axis=1)


def model_minima(points: Points, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`_newton.model_minimum` of each (K, m), by fixing and freeing many values at a time; and (K,) whether it was found."""
    mu, h = points.mu, points.hessian
    count, m = mu.shape
    low, high = np.where(np.isfinite(lower), lower, 0.0), np.where(np.isfinite(upper), upper, 0.0)
    z, found = mu.copy(), np.zeros(count, dtype=bool)
    free = ((mu > lower) | (points.gradient < 0.0)) & ((mu < upper) | (points.gradient > 0.0)) & (lower < upper)
    fixed_at = np.where(free, 0.0, mu)
    work = np.arange(count)
    for _ in range(3 * m + 3):
        f, hw, g, x = free[work], h[work], points.gradient[work], mu[work]
        away = np.where(f, 0.0, fixed_at[work] - x)
        rhs = np.where(f, -(g + (hw @ away[..., None])[..., 0]), 0.0)
        system = np.where(f[:, :, None] & f[:, None, :], hw, 0.0)
        system[:, range(m), range(m)] += ~f
        step = np.where(f, np.linalg.solve(system, rhs[..., None])[..., 0], away)
        goal = x + step
        below, above = f & (goal < lower), f & (goal > upper)
        out = (below | above).any(axis=1)
        slope = g + (hw @ step[..., None])[..., 0]
        held = ~f & (lower < upper)
        wrong = held & np.where(goal <= lower, slope < -1e-13, slope > 1e-13)
        good = ~out & ~wrong.any(axis=1)
        z[work[good]], found[work[good]] = goal[good], True
        # Values that would leave their bounds are held there; else those that pull inwards are let go.
        fixed_at[work] = np.where(below, low, np.where(above, high, fixed_at[work]))
        free[work] = np.where(out[:, None], f & ~(below | above), f | wrong)
        work = work[~good]
        if not len(work):
            break
    return z, found


def sweep(evaluate, points: Points, lower, upper, tol: float) -> tuple[np.ndarray, np.ndarray]:
    """Newton steps on all of `points`, in place, as long as full steps do; evaluate(rows, mu) -> Points.

    Returns for each whether it is DONE or LEFT to do, and how many passes it took part in.
    """
    count = len(points.mu)
    state, passes = np.full(count, MOVING), np.zeros(count, dtype=int)
    for _ in range(ROUNDS):
        rows = np.flatnonzero(state == MOVING)
        if not len(rows):
            break
        here = points[rows]
        left = residuals(here, lower, upper)
        goal, found = model_minima(here, lower, upper)
        step = goal - here.mu
        slope = (here.gradient * step).sum(axis=1)
        length, size = np.sqrt((step * step).sum(axis=1)), np.sqrt((here.mu * here.mu).sum(axis=1))
        done = (left == 0.0) | ((left <= tol) & found & (length <= 10 * tol * size))
        sound = found & (slope < 0.0) & (length <= 1e3 * (1.0 + size)) & (here.top >= -tol * size)
        state[rows[done]] = DONE
        state[rows[~done & ~sound]] = LEFT
        go = ~done & sound
        rows, slope, left, here = rows[go], slope[go], left[go], here[go]
        if not len(rows):
            break
        trial = evaluate(rows, goal[go])
        passes[rows] += 1
        better = trial.value <= here.value + 1e-4 * slope
        flat = trial.value <= here.value + 1e-12 * (1.0 + np.abs(here.value))
        better |= flat & (residuals(trial, lower, upper) < 0.5 * left)
        points[rows[better]] = trial[better]
        state[rows[~better]] = LEFT
    state[state == MOVING] = LEFT
    return state, passes
