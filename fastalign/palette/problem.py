"""One data set and K palettes in units of the rewards' standard deviations: solved side by side, then judged."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign.ops.map_statistics import ArrayStatistics
from fastalign.palette import native, newton
from fastalign.palette.feasibility import SHARP, Reachable
from fastalign.palette.newton import Point, residual
from fastalign.palette.passes import Pass
from fastalign.palette.uniqueness import flat_directions, least_norm

# If there are many times as many rows, λ is first solved on this many: a start that saves full passes.
FIRST_ROWS, FIRST_SHARE = 16_384, 8
ROUNDING = 16 * np.finfo(np.float64).eps
DOUBTFUL = 1e-12
LEAST_SCALE = 1e-40  # and its inverse: beyond these, squares leave float64's range
ENOUGH_PER_VALUE, ENOUGH_PER_PROMPT = 10, 2


class Problem:
    """The duals of `palettes` (K, m) at their minima.

    run: a pass (see `passes`). sign (m,): 1 for ≥, -1 for ≤, 0 for =. start: (K, m) initial λ, or None.
    """

    palettes: np.ndarray
    sign: np.ndarray
    constant: np.ndarray
    short: np.ndarray
    mean: np.ndarray
    cov: np.ndarray
    scale: np.ndarray
    run: Pass
    tol: float
    lam_max: float

    def __init__(
        self,
        run: Pass,
        palettes: np.ndarray,
        sign: np.ndarray,
        tol: float,
        lam_max: float,
        start: np.ndarray | None = None,
    ):
        self.run, self.palettes, self.sign, self.tol, self.lam_max = run, palettes, sign, tol, lam_max
        count, m = palettes.shape
        self.constant, self.short = np.zeros(m, dtype=bool), np.zeros(count, dtype=bool)
        compiled = native.serves(run)
        minima = native.minimise(self, start, measured=False) if compiled else None
        if minima is None:
            if start is None and not compiled:
                start = self._start_on_part()
            guess = None if compiled else start
            first = run(np.zeros((1, m)) if guess is None else np.vstack([np.zeros((1, m)), guess]))
            self._measure(first)
            minima = native.minimise(self, start, measured=True) if compiled else self._minimise(first, guess)
        assert minima is not None  # of a measured problem
        self.minima: newton.Minima = minima

    def _start_on_part(self) -> np.ndarray | None:
        """(K, m) λ solved on a part of the rows; None if there are too few rows for that to pay."""
        part = self.run.part(FIRST_ROWS) if self.run.rows >= FIRST_SHARE * FIRST_ROWS else None
        if part is None:
            return None
        few = Problem(part, self.palettes, self.sign, 1e-3, self.lam_max)
        if few.constant.any() or few.short.any():
            return None
        return np.where(few.minima.certified[:, None], 0.0, few.minima.mu / few.scale)

    def _measure(self, first: ArrayStatistics) -> None:
        """The units, from the moments at λ = 0, and which palettes are infeasible in a constant reward."""
        self.mean, self.cov = first.mean[0], first.cov[0]
        if not (isfinite(self.mean.sum()) and isfinite(self.cov.sum())):
            self.run.reject_nonfinite()
        self.scale, self.constant = self._units(self.cov.diagonal())
        _check_scale(np.where(self.constant, 1.0, self.scale))
        self.steep = False
        # A constant reward cannot be moved: λ stays 0, and its level must already meet the target.
        miss = self._miss((self.run.center + self.mean - self.palettes) / self.scale)
        self.short = np.any(self.constant & (miss > 4 * self.run.eps + self.tol), axis=1)

    def _units(self, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The unit of each reward, (m,): its standard deviation under p0; and whether it is constant.

        A variance that is small relative to the squared mean may be rounding error, or be lost in it. Then the range,
        over rows of positive weight and within groups, decides whether there is any, and is the unit; the unit of a
        constant reward is its own size.
        """
        run = self.run
        deviation = np.sqrt(np.maximum(variance, 0))
        constant = np.zeros(len(deviation), dtype=bool)
        doubtful = np.flatnonzero(~(variance > DOUBTFUL * self.mean**2) | (deviation == 0))
        if len(doubtful):
            size = np.maximum(run.size, np.abs(run.center + self.mean))
            size[size == 0] = 1.0
            _check_scale(size)
            towards = np.zeros((len(doubtful), len(size)))
            towards[range(len(doubtful)), doubtful] = SHARP / size[doubtful]
            span = np.zeros(len(size))
            most, least = np.split(run(np.vstack([towards, -towards])).mean, 2)
            span[doubtful] = (most - least)[range(len(doubtful)), doubtful]
            constant[doubtful] = ~(span[doubtful] > 1e-14 * size[doubtful])
            deviation[doubtful] = np.where(constant, size, np.maximum(deviation, span))[doubtful]
        return deviation, constant

    def _miss(self, gradient: np.ndarray) -> np.ndarray:
        """By how many standard deviations each level misses its target; at most 0 if it does not."""
        return np.where(self.sign == 0, np.abs(gradient), -self.sign * gradient)

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """On μ (m,)."""
        bound = np.where(self.constant, 0.0, self.lam_max * self.scale)
        return np.where(self.sign > 0, 0.0, -bound), np.where(self.sign < 0, 0.0, bound)

    def _points(self, ks: Sequence[int] | np.ndarray, mu: np.ndarray, stats: ArrayStatistics) -> list[Point]:
        """The duals of the palettes `ks` at their μ (len(ks), m), from a pass's statistics."""
        offset = self.run.center - self.palettes[ks]
        shift = (mu / self.scale * offset).sum(axis=1)
        gradient = np.where(self.constant, 0.0, (stats.mean + offset) / self.scale)
        hessian = stats.cov / (self.scale * self.scale[:, None])
        # Rounding may make a covariance negative; if the distribution is down to few samples, rounding is all there is.
        diagonal = hessian.reshape(len(mu), -1)[:, :: mu.shape[1] + 1]
        diagonal += ROUNDING * (diagonal + (stats.mean / self.scale) ** 2)
        top = stats.max_score + shift
        return [Point(*each) for each in zip(mu, stats.log_z + shift, gradient, hessian, top, stats.ess, strict=True)]

    def _evaluate(self, ks: Sequence[int] | np.ndarray, mu: np.ndarray) -> list[Point]:
        return self._points(ks, mu, self.run(mu / self.scale))

    def _minimise(self, first: ArrayStatistics, guess: np.ndarray | None) -> newton.Minima:
        """Minimises in Python, from 0 or from the guess if that is lower; both share the first read."""
        (lower, upper), ks = self._bounds(), np.arange(len(self.palettes))
        part = lambda rows: type(first)(*(x[rows] for x in first))  # noqa: E731
        points = self._points(ks, np.zeros(self.palettes.shape), part(np.zeros_like(ks)))
        if guess is not None:
            begun = self._points(ks, np.clip(guess * self.scale, lower, upper), part(1 + ks))
            points = [b if b.value < p.value else p for b, p in zip(begun, points, strict=True)]
        return newton.minimise(self._evaluate, points, self.short, lower, upper, self.tol)

    def conclude(self) -> dict[str, Any]:
        """The verdicts, and the solutions in the rewards' own units: every field of PaletteSolution, K leading."""
        mu, value, gradient, ess, left, passes, _, _ = self.minima
        reached = (left <= self.tol) & ~self.short
        if isfinite(self.lam_max):  # otherwise the residual could not show the deficit
            reached &= (self._miss(gradient) <= self.tol).all(axis=1)
        feasible, beyond = (reached, {}) if reached.all() else self._judge(reached)
        solved = feasible | isfinite(self.lam_max)
        unique = np.ones(len(mu), dtype=bool) if self.steep else self._least_norm(solved)
        lam = mu / self.scale
        lam[np.abs(mu) <= self.tol] = 0.0
        if isfinite(self.lam_max):
            lam = np.clip(lam, -self.lam_max, self.lam_max)
        levels = gradient * self.scale + self.palettes
        if self.constant.any():
            levels[:, self.constant] = (self.run.center + self.mean)[self.constant]
        gap = (mu * gradient).sum(axis=1)
        result = {
            "lam": lam,
            "levels": levels,
            "kl": np.maximum(0.0, gap - value),
            "ess": ess,
            "kkt_residual": left,
            "duality_gap": gap,
        }
        flagged = feasible & too_thin(ess, lam, self.run.rows, self.run.group_count)
        for x in () if solved.all() else result.values():  # the dual has no minimum
            x[~solved] = np.nan
        result |= {"feasible": feasible, "iterations": passes, "nearly_infeasible": flagged, "unique": unique}
        return result | {name: beyond.get(name) for name in ("nearest", "certificate", "scaling")}

    def _judge(self, reached: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Which palettes can be reached (K,), and for those that cannot, `nearest`, `certificate` and `scaling`, else
        NaN."""
        reachable, feasible = Reachable(self.run, self.scale, self.sign), reached.copy()
        nearest, certificate = np.full((2, *self.palettes.shape), np.nan)
        scaling = np.full(len(reached), np.nan)
        for k in np.flatnonzero(~reached):
            palette = self.palettes[k]
            known = self.minima.certificate[k] / self.scale if self.minima.certified[k] else None
            there, direction, distance = reachable.nearest(palette, known)
            feasible[k] = distance <= self.tol and not self.short[k]
            if feasible[k]:
                continue
            nearest[k], scaling[k] = there, 1.0
            if direction is not None:  # otherwise infeasible by too little to prove in float64
                certificate[k] = direction
                scaling[k] = reachable.scaling(self.run.center + self.mean, palette, direction)
        beyond = {"nearest": nearest, "certificate": certificate, "scaling": scaling}
        return feasible, {} if feasible.all() else beyond

    def _least_norm(self, solved: np.ndarray) -> np.ndarray:
        """Moves each non-unique minimum to the one of least norm; returns (K,) whether it is unique."""
        minima, unique = self.minima, np.ones(len(solved), dtype=bool)
        directions = flat_directions(self.cov / (self.scale * self.scale[:, None]), self.constant)
        if directions is None:
            return unique
        lower, upper = self._bounds()
        for k in np.flatnonzero(solved):
            mu, unique[k] = least_norm(minima.mu[k], minima.gradient[k], directions, lower, upper, self.constant)
            if mu is None:
                continue
            again = self._evaluate([int(k)], mu[None])[0]
            minima.passes[k] += 1
            left = residual(again.mu, again.gradient, lower, upper)
            if left <= max(self.tol, minima.residual[k]):
                minima.mu[k], minima.gradient[k], minima.residual[k] = again.mu, again.gradient, left
                minima.value[k], minima.ess[k] = again.value, again.ess
        return unique


def too_thin(ess: Any, lam: np.ndarray, rows: int, groups: int) -> Any:
    """Whether too few effective samples are left for the binding values, if any: ess (...,) of lam (..., m)."""
    binding = (lam != 0).sum(axis=-1)
    enough = np.minimum(ENOUGH_PER_VALUE * (1 + binding), rows / 2)
    thin = (ess * groups < enough) | (ess < ENOUGH_PER_PROMPT) if groups else ess < enough
    return thin & (binding > 0)


def _check_scale(scale: np.ndarray) -> None:
    for j in np.flatnonzero(~((scale > LEAST_SCALE) & (scale < 1 / LEAST_SCALE))):
        rule = f"rewards must have standard deviations between {LEAST_SCALE:g} and {1 / LEAST_SCALE:g}"
        raise UserError(f"{rule}, got about {scale[j]:.3g} in column {j}: scale it")
