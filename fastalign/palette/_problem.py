"""One data set and K palettes in units of the rewards' standard deviations: iterated side by side, then judged."""

from __future__ import annotations

import numpy as np

from fastalign.palette._newton import Point, State, newton, residual
from fastalign.palette._uniqueness import least_norm
from fastalign.palette.feasibility import Reachable

# Rows on which λ is first sought: a start that spares passes over all; then a 16th of all, which spares one more.
FIRST_ROWS, LAST_SHARE = 16_384, 16
ROUNDING = 16 * np.finfo(np.float64).eps
ENOUGH_PER_VALUE, ENOUGH_PER_PROMPT = 10, 2


class Problem:
    """run: a pass (see `passes`). sign (m,): 1 for ≥, -1 for ≤, 0 for =. start_from(problem) -> (K, m) λ or None."""

    def __init__(self, run, palettes: np.ndarray, sign: np.ndarray, tol: float, lam_max: float, start_from=None):
        self.run, self.palettes, self.sign, self.tol, self.lam_max = run, palettes, sign, tol, lam_max
        count, m = palettes.shape
        guess = None if start_from is None else start_from(self)
        # λ = 0 and the starts share the first read.
        first = run(np.zeros((1, m)) if guess is None else np.vstack([np.zeros((1, m)), guess]))
        self.mean, cov = first.mean[0], first.cov[0]
        if not (np.isfinite(self.mean).all() and np.isfinite(cov).all()):
            run.reject_nonfinite()
        deviation = np.sqrt(np.maximum(np.diagonal(cov), 0))
        size = np.maximum(run.size, np.abs(run.center + self.mean))
        # A constant reward has no deviation to measure by (what is left is rounding): its own size serves instead.
        self.constant = ~(deviation > 1e-14 * size)
        self.scale = np.where(self.constant, np.where(size > 0, size, 1.0), deviation)
        self.offset = run.center - palettes
        bound = np.where(self.constant, 0.0, lam_max * self.scale)
        self.lower, self.upper = np.where(sign > 0, 0.0, -bound), np.where(sign < 0, 0.0, bound)
        # A constant reward cannot be moved; λ stays 0 there, and the palette must ask for no more than it is.
        self.short = self.constant & (self.miss((self.offset + self.mean) / self.scale) > 4 * run.eps + tol)
        self.reachable = Reachable(run, self.scale, sign)
        self.origins = [self.view(k, np.zeros(m), first, 0) for k in range(count)]
        self.begun = [None] * count
        if guess is not None:
            clipped = np.clip(guess * self.scale, self.lower, self.upper)
            self.begun = [self.view(k, clipped[k], first, 1 + k) for k in range(count)]

    def miss(self, gradient: np.ndarray) -> np.ndarray:
        """By how many standard deviations each level misses what is asked of it; at most 0 where it does not."""
        return np.where(self.sign == 0, np.abs(gradient), -self.sign * gradient)

    def view(self, k: int, mu: np.ndarray, stats, row: int) -> Point:
        """The k-th palette's dual at μ, from row `row` of a pass's statistics."""
        lam = mu / self.scale
        shift = lam @ self.offset[k]
        gradient = (stats.mean[row] + self.offset[k]) / self.scale
        gradient[self.constant] = 0.0
        hessian = stats.cov[row] / (self.scale * self.scale[:, None])
        # What rounding leaves of a covariance may be negative; where the law is down to few samples that is all of it.
        hessian.flat[:: len(mu) + 1] += ROUNDING * (np.diagonal(hessian) + (stats.mean[row] / self.scale) ** 2)
        return Point(mu, stats.log_z[row] + shift, gradient, hessian, stats.max_score[row] + shift, stats.ess[row])

    def minimise(self) -> list[State]:
        """All palettes' Newton iterations in step: a pass serves every palette that is still at work."""
        states = [
            State(newton(origin, begun, self.lower, self.upper, self.tol))
            for origin, begun in zip(self.origins, self.begun, strict=True)
        ]
        active = [k for k in range(len(states)) if not self.short[k].any() and states[k].begin()]
        while active:
            stats = self.run(np.array([states[k].trial for k in active]) / self.scale)
            active = [k for row, k in enumerate(active) if states[k].advance(self.view(k, states[k].trial, stats, row))]
        for k in np.flatnonzero(self.short.any(axis=1)):
            states[k].point = self.origins[k]
        return states

    def conclude(self, k: int, state: State) -> dict:
        """The verdict, and the solution in the rewards' own units."""
        palette, point, passes = self.palettes[k], state.point, 1 + state.passes
        left = residual(point, self.lower, self.upper)
        reached = left <= self.tol and (self.miss(point.gradient) <= self.tol).all()
        feasible, nearest, certificate, scaling, unique = True, None, None, None, True
        if self.short[k].any() or not reached:
            known = None if state.certificate is None else state.certificate / self.scale
            nearest, certificate, distance = self.reachable.nearest(palette, known)
            feasible = distance <= self.tol and not self.short[k].any()
            if feasible:
                nearest = certificate = None
            else:
                scaling = self.reachable.scaling(self.run.center + self.mean, palette, certificate)
        if feasible or np.isfinite(self.lam_max):
            mu, unique = least_norm(point, self.origins[k].hessian, self.lower, self.upper, self.constant)
            if mu is not None:
                again = self.view(k, mu, self.run((mu / self.scale)[None]), 0)
                passes += 1
                if residual(again, self.lower, self.upper) <= max(self.tol, left):
                    point, left = again, residual(again, self.lower, self.upper)
        mu = np.where(np.abs(point.mu) <= self.tol, 0.0, point.mu)
        lam = np.clip(mu / self.scale, -self.lam_max, self.lam_max)
        levels = point.gradient * self.scale + palette
        levels[self.constant] = (self.run.center + self.mean)[self.constant]
        gap = float(point.mu @ point.gradient)
        kl, ess = max(0.0, gap - float(point.value)), float(point.ess)
        if not feasible and np.isinf(self.lam_max):  # the dual has no minimum
            lam, levels = np.full_like(lam, np.nan), np.full_like(lam, np.nan)
            kl = ess = left = gap = np.nan
        return dict(
            lam=lam,
            levels=levels,
            kl=kl,
            ess=ess,
            feasible=bool(feasible),
            kkt_residual=float(left),
            iterations=passes,
            nearest=nearest,
            certificate=certificate,
            scaling=scaling,
            duality_gap=gap,
            nearly_infeasible=bool(feasible and self._thin(ess, np.count_nonzero(lam))),
            unique=unique,
        )

    def _thin(self, ess: float, binding: int) -> bool:
        enough = min(ENOUGH_PER_VALUE * (1 + binding), self.run.rows / 2)
        groups = self.run.group_count
        return binding > 0 and (ess * (groups or 1) < enough or (groups > 0 and ess < ENOUGH_PER_PROMPT))


def starts(problem: Problem) -> np.ndarray | None:
    """(K, m) λ solved on a part of the rows, and then on more of them; None where there are not many times as many."""
    run, guess = problem.run, None
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
        found = few.minimise()
        guess = np.array(
            [np.zeros(len(few.scale)) if s.certificate is not None else s.point.mu / few.scale for s in found]
        )
    return guess
