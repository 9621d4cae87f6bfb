"""One data set and K palettes in units of the rewards' standard deviations: iterated side by side, then judged."""

from __future__ import annotations

from math import isfinite

import numpy as np

from fastalign.errors import UserError
from fastalign.palette import _engine
from fastalign.palette._batch import LEFT, Points, model_minima, residuals, sweep
from fastalign.palette._newton import State, newton
from fastalign.palette._uniqueness import flat_directions, least_norm
from fastalign.palette.feasibility import SHARP, Reachable

# Rows on which λ is first sought: a start that spares passes over all; then a 16th of all, which spares one more.
FIRST_ROWS, LAST_SHARE = 16_384, 16
# So many palettes go through the steps in arrays; so many start from the answers to every eighth of them.
TOGETHER, PATH, PATH_STEP, MOST_PIVOTS = 4, 64, 8, 512
ROUNDING = 16 * np.finfo(np.float64).eps
DOUBTFUL = 1e-12
LEAST_SPREAD = 1e-40  # and its inverse: squares of what is beyond leave float64
ENOUGH_PER_VALUE, ENOUGH_PER_PROMPT = 10, 2


class Problem:
    """run: a pass (see `passes`). sign (m,): 1 for ≥, -1 for ≤, 0 for =. start_from(problem) -> (K, m) λ or None."""

    def __init__(self, run, palettes: np.ndarray, sign: np.ndarray, tol: float, lam_max: float, start_from=None):
        self.run, self.palettes, self.sign, self.tol, self.lam_max = run, palettes, sign, tol, lam_max
        count, m = palettes.shape
        self.in_engine = _engine.serves(run, count)
        guess = None if start_from is None else start_from(self)
        # λ = 0 and the starts share the first read.
        begin = guess is not None and not self.in_engine
        first = run(np.vstack([np.zeros((1, m)), guess]) if begin else np.zeros((1, m)))
        self.mean, cov = first.mean[0], first.cov[0]
        if not (isfinite(self.mean.sum()) and isfinite(cov.sum())):
            run.reject_nonfinite()
        self.scale, self.constant = self._measure(cov.diagonal())
        _check_spread(np.where(self.constant, 1.0, self.scale))
        self.any_constant = bool(self.constant.any())
        self.offset = run.center - palettes
        bound = np.where(self.constant, 0.0, lam_max * self.scale)
        self.lower, self.upper = np.where(sign > 0, 0.0, -bound), np.where(sign < 0, 0.0, bound)
        self.short = np.zeros(count, dtype=bool)
        if self.any_constant:
            # It cannot be moved; λ stays 0 there, and the palette must ask for no more than it is.
            miss = self.miss((self.offset + self.mean) / self.scale)
            self.short = (self.constant & (miss > 4 * run.eps + tol)).any(axis=1)
        self.reachable = Reachable(run, self.scale, sign)
        self.points = self.view(slice(None), np.zeros((count, m)), first, slice(0, 1))
        self.points.hessian = np.repeat(self.points.hessian, count, axis=0)
        self.points.ess = np.repeat(self.points.ess, count)
        self.spread = self.points.hessian[0].copy()  # the covariance under p0, in units of σ
        self.guess = guess
        if begin:
            everything = np.arange(count)
            begun = self.view(everything, np.clip(guess * self.scale, self.lower, self.upper), first, 1 + everything)
            lower = np.flatnonzero(begun.value < self.points.value)  # a start that is no lower than 0 tells nothing
            self.points[lower] = begun[lower]

    def _measure(self, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What each reward is measured by, (m,): its standard deviation under p0; and whether it is constant.

        A variance that is small beside the square of the mean it is about may be all rounding, or be lost in it. There the
        range tells whether there is any, over rows of positive weight and within groups, and measures the reward; what is
        constant is measured by its own size.
        """
        run = self.run
        deviation = np.sqrt(np.maximum(variance, 0))
        constant = np.zeros(len(deviation), dtype=bool)
        doubtful = np.flatnonzero(~(variance > DOUBTFUL * self.mean**2) | (deviation == 0))
        if len(doubtful):
            size = np.maximum(run.size, np.abs(run.center + self.mean))
            size[size == 0] = 1.0
            _check_spread(size)
            towards = np.zeros((len(doubtful), len(size)))
            towards[range(len(doubtful)), doubtful] = SHARP / size[doubtful]
            spread = np.zeros(len(size))
            most, least = np.split(run(np.vstack([towards, -towards])).mean, 2)
            spread[doubtful] = (most - least)[range(len(doubtful)), doubtful]
            constant[doubtful] = ~(spread[doubtful] > 1e-14 * size[doubtful])
            deviation[doubtful] = np.where(constant, size, np.maximum(deviation, spread))[doubtful]
        return deviation, constant

    def miss(self, gradient: np.ndarray) -> np.ndarray:
        """By how many standard deviations each level misses what is asked of it; at most 0 where it does not."""
        return np.where(self.sign == 0, np.abs(gradient), -self.sign * gradient)

    def view(self, ks: np.ndarray, mu: np.ndarray, stats, rows=slice(None)) -> Points:
        """The duals of the palettes `ks` at μ (K, m), from the rows `rows` of a pass's statistics."""
        offset, mean = self.offset[ks], stats.mean[rows]
        shift = np.einsum("kj,kj->k", mu / self.scale, offset)
        gradient = (mean + offset) / self.scale
        if self.any_constant:
            gradient[:, self.constant] = 0.0
        hessian = stats.cov[rows] / (self.scale * self.scale[:, None])
        # What rounding leaves of a covariance may be negative; where the law is down to few samples that is all of it.
        diagonal = hessian.reshape(len(hessian), -1)[:, :: mu.shape[1] + 1]
        diagonal += ROUNDING * (diagonal + (mean / self.scale) ** 2)
        return Points(mu, stats.log_z[rows] + shift, gradient, hessian, stats.max_score[rows] + shift, stats.ess[rows])

    def evaluate(self, ks: np.ndarray, mu: np.ndarray) -> Points:
        return self.view(ks, mu, self.run(mu / self.scale))

    def minimise(self) -> None:
        """All palettes' Newton iterations in step: a pass serves every palette that is still at work."""
        count = len(self.palettes)
        self.passes, self.certificates = np.ones(count, dtype=int), [None] * count
        if self.in_engine:
            start = None if self.guess is None else self.guess * self.scale
            passes, self.certificates = _engine.minimise(self, self.points, start, self.short)
            self.passes += passes
            return
        todo = np.flatnonzero(~self.short)
        if len(todo) >= PATH and self.guess is None:
            pivots = todo[:: max(PATH_STEP, len(todo) // MOST_PIVOTS)]
            self._settle(pivots)
            todo = np.setdiff1d(todo, pivots, assume_unique=True)
            self._start_beside(pivots, todo)
        self._settle(todo)

    def _start_beside(self, pivots: np.ndarray, ks: np.ndarray) -> None:
        """Start each palette from the nearest one that is solved, by a Newton step on that one's model."""
        pivots = np.array([p for p in pivots if self.certificates[p] is None])
        if not len(pivots):
            return
        apart = [(((self.palettes[pivots] - self.palettes[k]) / self.scale) ** 2).sum(axis=1).argmin() for k in ks]
        beside = self.points[pivots[np.array(apart)]]
        beside.gradient = beside.gradient + (self.offset[ks] - self.offset[pivots[np.array(apart)]]) / self.scale
        beside.gradient[:, self.constant] = 0.0
        mu, found = model_minima(beside, self.lower, self.upper)
        ks, mu = ks[found], mu[found]
        if len(ks):
            begun = self.evaluate(ks, mu)
            self.passes[ks] += 1
            lower = begun.value < self.points.value[ks]
            self.points[ks[lower]] = begun[lower]

    def _settle(self, ks: np.ndarray) -> None:
        if len(ks) >= TOGETHER:
            points = self.points[ks]
            state, passes = sweep(
                lambda rows, mu: self.evaluate(ks[rows], mu), points, self.lower, self.upper, self.tol
            )
            self.points[ks] = points
            self.passes[ks] += passes
            ks = ks[state == LEFT]
        states = {k: State(newton(self.points.one(k), self.lower, self.upper, self.tol)) for k in ks}
        active = np.array([k for k in ks if states[k].begin()], dtype=int)
        while len(active):
            found = self.evaluate(active, np.array([states[k].trial for k in active]))
            active = np.array([k for row, k in enumerate(active) if states[k].advance(found.one(row))], dtype=int)
        for k, state in states.items():
            self.points.put(k, state.point)
            self.passes[k] += state.passes
            self.certificates[k] = state.certificate

    def conclude(self) -> dict:
        """The verdicts, and the solutions in the rewards' own units: every field of PaletteSolution, K leading."""
        points, count = self.points, len(self.palettes)
        left = residuals(points, self.lower, self.upper)
        reached = (left <= self.tol) & ~self.short
        if isfinite(self.lam_max):  # else no residual could hide what is missing
            reached &= (self.miss(points.gradient) <= self.tol).all(axis=1)
        feasible, beyond = reached.copy(), {"nearest": {}, "certificate": {}, "scaling": {}}
        for k in np.flatnonzero(~reached):
            palette = self.palettes[k]
            known = None if self.certificates[k] is None else self.certificates[k] / self.scale
            nearest, certificate, distance = self.reachable.nearest(palette, known)
            feasible[k] = distance <= self.tol and not self.short[k]
            if not feasible[k]:
                beyond["nearest"][k], beyond["certificate"][k] = nearest, certificate
                if certificate is None:  # beyond by too little to be proved in double
                    beyond["certificate"][k], beyond["scaling"][k] = np.full(len(palette), np.nan), 1.0
                    continue
                beyond["scaling"][k] = self.reachable.scaling(self.run.center + self.mean, palette, certificate)
        solved = feasible | isfinite(self.lam_max)
        unique = np.ones(count, dtype=bool)
        steep = flat_directions(self.spread, self.constant)
        for k in np.flatnonzero(solved) if steep is not None else ():
            mu, unique[k] = least_norm(points.one(k), steep, self.lower, self.upper, self.constant)
            if mu is None:
                continue
            again = self.evaluate(np.array([k]), mu[None])
            self.passes[k] += 1
            if residuals(again, self.lower, self.upper)[0] <= max(self.tol, left[k]):
                points[[k]], left[k] = again, residuals(again, self.lower, self.upper)[0]
        lam = points.mu / self.scale
        lam[np.abs(points.mu) <= self.tol] = 0.0
        if isfinite(self.lam_max):
            lam = np.clip(lam, -self.lam_max, self.lam_max)
        levels = points.gradient * self.scale + self.palettes
        if self.any_constant:
            levels[:, self.constant] = (self.run.center + self.mean)[self.constant]
        gap = np.einsum("kj,kj->k", points.mu, points.gradient)
        found = {
            "lam": lam, "levels": levels, "kl": np.maximum(0.0, gap - points.value), "ess": points.ess.copy(),
            "kkt_residual": left, "duality_gap": gap,
        }  # fmt: skip
        for x in () if solved.all() else found.values():  # the dual has no minimum
            x[~solved] = np.nan
        flagged = feasible & too_thin(points.ess, lam, self.run.rows, self.run.group_count)
        found |= {"feasible": feasible, "iterations": self.passes, "nearly_infeasible": flagged, "unique": unique}
        for name, rows in beyond.items():
            found[name] = None
            if rows:
                found[name] = np.full((count,) if name == "scaling" else self.palettes.shape, np.nan)
                found[name][list(rows)] = list(rows.values())
        return found


def too_thin(ess, lam: np.ndarray, rows: int, groups: int):
    """Whether too few samples are left for the values that bind, if any do: ess (...,) of lam (..., m)."""
    binding = (lam != 0).sum(axis=-1)
    enough = np.minimum(ENOUGH_PER_VALUE * (1 + binding), rows / 2)
    thin = (ess * groups < enough) | (ess < ENOUGH_PER_PROMPT) if groups else ess < enough
    return thin & (binding > 0)


def starts(problem: Problem) -> np.ndarray | None:
    """(K, m) λ solved on a part of the rows, and then on more of them; None where there are not many times as many, or
    where the engine itself starts so."""
    run, guess = problem.run, None
    if problem.in_engine:
        return None
    sizes = [FIRST_ROWS] if run.rows >= 8 * FIRST_ROWS else []
    sizes += [run.rows // LAST_SHARE] if run.rows >= 3 * LAST_SHARE * FIRST_ROWS else []
    for size in sizes:
        part = run.part(size)
        if part is None:
            return guess
        before = guess
        few = Problem(part, problem.palettes, problem.sign, 1e-3, problem.lam_max, lambda _, x=before: x)
        if few.constant.any() or few.short.any():
            return guess
        few.minimise()
        guess = few.points.mu / few.scale
        guess[[c is not None for c in few.certificates]] = 0.0
    return guess


def _check_spread(scale: np.ndarray) -> None:
    for j in np.flatnonzero(~((scale > LEAST_SPREAD) & (scale < 1 / LEAST_SPREAD))):
        rule = f"rewards must spread by more than {LEAST_SPREAD:g} and less than {1 / LEAST_SPREAD:g} in each value"
        raise UserError(f"{rule}, got about {scale[j]:.3g} in column {j}: scale it")
