"""The MAP dual: the weights λ ≥ 0 whose policy p_λ ∝ p0 exp(λ·R) reaches a value palette at the least KL.

min over λ ≥ 0 of g(λ) = log Z(λ) − λ·c, which is the entropy-projection dual of MAP (arXiv 2410.19198, eqs. 5-7):
its gradient is E_λ[R] − c, its Hessian the covariance of R under p_λ. Both come out of one pass over the rewards,
so the method is the one that needs the fewest passes: projected Newton (Bertsekas 1982; the model over the bounds
is solved exactly) with a safeguarded line search. Everything runs in units of each reward's standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastalign.ops.map_statistics import MapPass
from fastalign.palette._inputs import checked, reject_nonfinite
from fastalign.palette.feasibility import nearest_reachable

MAX_PASSES = 200
# Beyond this λ (in standard deviations) a policy holds single samples; only the feasibility test can tell then.
HUGE = 1e12
# From this many rows on, λ is first sought on a part of them: a start that spares passes over all.
WARM_START_ROWS = 16_384


@dataclass(frozen=True)
class PaletteSolution:
    """What `solve` found. Each field leads with K where the palette was (K, m).

    lam: (m,) float64, the weights; exactly 0 for a value whose constraint is slack. NaN where the palette is
        infeasible and no `lam_max` was given: the dual has no minimum.
    levels: (m,) E_λ[R], the levels that the policy reaches. kl: KL(p_λ ‖ p0) in nats (with groups: its mean over the
        groups). ess: effective sample size (Σ w)² / Σ w² of the reweighted samples (with groups: mean per group).
    feasible: whether the palette can be reached at all by reweighting these samples.
    kkt_residual: max_j |μ_j − clip(μ_j − γ_j, 0, bound)| with μ_j = λ_j σ_j, γ_j = (E_λ[R_j] − c_j) / σ_j and σ_j the
        standard deviation of reward j under p0 (with groups: within them, in the root mean square); that is, how far
        the levels miss, in standard deviations. A constant reward is measured by its own size.
    iterations: passes over all rewards that Newton took. nearest: (m,) the reachable palette closest to an infeasible one (Euclidean
        distance in units of σ); None where the palette is feasible (NaN rows in the (K, m) form, None if all are).
    certificate: (m,) d ≥ 0 with max_i d·R_i < d·c, the proof that an infeasible palette is so; else as `nearest`.
    """

    lam: np.ndarray
    levels: np.ndarray
    kl: Any
    ess: Any
    feasible: Any
    kkt_residual: Any
    iterations: Any
    nearest: np.ndarray | None
    certificate: np.ndarray | None


def solve(
    rewards, palette, *, groups=None, weights=None, tol: float = 1e-9, lam_max: float | None = None
) -> PaletteSolution:
    """Weights λ ≥ 0 of the policy p_λ ∝ p0 exp(λ·R) with E_λ[R] ≥ palette at the least KL from p0.

    rewards: (n, m), rewards of n samples of p0; numpy array or torch tensor of any device; float32 and float64 are
        read in place. palette: (m,), or (K, m) for K palettes solved side by side, each pass serving all of them.
    groups: (n,) integers, the prompt of each sample: the per-prompt dual mean_x log Z(x, λ) − λ·c, whose policy
        keeps the prompts' distribution (every group counts alike). None: the joint dual, log Z over all samples.
    weights: (n,) ≥ 0, weights of the samples under p0 (default 1). tol: bound on the KKT residual.
    lam_max: upper bound on each λ_j. The levels may then fall short of a palette that is feasible:
        `feasible` still tells whether it can be reached without the bound.

    A palette is feasible if some mixture of the samples reaches it to within tol standard deviations. On the very
    edge of what is reachable λ grows without limit; there the returned λ is the first to come within tol or, if
    none does at finite precision, the last one tried, and kkt_residual tells how far off it is.

    Raises UserError or TypeError, in one line, on NaN or infinite rewards, empty or mismatched shapes, weights
    that are negative or sum to nothing (in any group).
    """
    rewards, palettes, log_weights, groups = checked(rewards, palette, groups, weights, tol, lam_max)
    run = MapPass(rewards, center=_rough(rewards)[0], log_weights=log_weights, groups=groups)
    problem = _Problem(run, palettes, tol, np.inf if lam_max is None else lam_max)
    states = problem.minimise(_warm_start(problem))
    results = [problem.conclude(k, state) for k, state in enumerate(states)]
    return _assemble(results, single=np.ndim(palette) == 1)


class _Problem:
    """One data set and K palettes, in units of the rewards' standard deviations."""

    def __init__(self, run: MapPass, palettes: np.ndarray, tol: float, lam_max: float):
        self.run, self.palettes, self.tol = run, palettes, tol
        m = palettes.shape[1]
        self.at_zero = run(np.zeros((1, m)))
        if not (np.isfinite(self.at_zero.mean).all() and np.isfinite(self.at_zero.cov).all()):
            reject_nonfinite(run.rewards)
        mean, deviation = self.at_zero.mean[0], np.sqrt(np.maximum(np.diagonal(self.at_zero.cov[0]), 0))
        size = np.maximum(_rough(run.rewards)[1], np.abs(run.center + mean))
        # A constant reward has no deviation to measure by (what is left is rounding): its own size serves instead.
        self.constant = ~(deviation > 1e-14 * size)
        self.scale = np.where(self.constant, np.where(size > 0, size, 1.0), deviation)
        self.offset = run.center - palettes
        # A constant reward cannot be moved; λ stays 0 there, and the palette must ask for no more than it is.
        slack = 4 * np.finfo(run.rewards.dtype).eps + tol
        self.short = self.constant & (self.offset + mean < -slack * self.scale)
        self.upper = np.where(self.constant, 0.0, lam_max * self.scale)
        self.lam_max = lam_max

    def view(self, k: int, mu: np.ndarray, stats, row: int) -> _Point:
        """The k-th palette's dual at μ, from row `row` of a pass's statistics."""
        lam = mu / self.scale
        shift = lam @ self.offset[k]
        gradient = (stats.mean[row] + self.offset[k]) / self.scale
        gradient[self.constant] = 0.0
        hessian = stats.cov[row] / (self.scale * self.scale[:, None])
        return _Point(mu, stats.log_z[row] + shift, gradient, hessian, stats.max_score[row] + shift, stats.ess[row])

    def minimise(self, starts: np.ndarray | None = None) -> list[_State]:
        """All palettes' Newton iterations in step: a pass serves every palette that is still at work."""
        count, m = self.palettes.shape
        zero = np.zeros(m)
        starts = [None] * count if starts is None else starts
        origins = [self.view(k, zero, self.at_zero, 0) for k in range(count)]
        states = [_State(_newton(*both, self.upper, self.tol)) for both in zip(origins, starts, strict=True)]
        active = [k for k in range(count) if not self.short[k].any() and states[k].begin()]
        while active:
            lams = np.array([states[k].trial for k in active]) / self.scale
            stats = self.run(lams)
            active = [k for row, k in enumerate(active) if states[k].advance(self.view(k, states[k].trial, stats, row))]
        for k in np.flatnonzero(self.short.any(axis=1)):
            states[k].point = origins[k]
        return states

    def conclude(self, k: int, state: _State) -> dict:
        """The verdict, and the solution in the rewards' own units."""
        palette, point = self.palettes[k], state.point
        lam = np.minimum(np.where(point.mu <= self.tol, 0.0, point.mu) / self.scale, self.lam_max)
        residual = _residual(point, self.upper)
        reached = residual <= self.tol and (point.gradient >= -self.tol).all()
        feasible, nearest, certificate = True, None, None
        if self.short[k].any() or not reached:
            known = None if state.certificate is None else state.certificate / self.scale
            nearest, certificate, distance = nearest_reachable(self.run, palette, self.scale, known)
            feasible = distance <= self.tol and not self.short[k].any()
            if feasible:
                nearest = certificate = None
        levels = point.gradient * self.scale + palette
        levels[self.constant] = (self.run.center + self.at_zero.mean[0])[self.constant]
        kl = max(0.0, float(point.mu @ point.gradient - point.value))
        ess = float(point.ess)
        if not feasible and np.isinf(self.lam_max):  # the dual has no minimum
            lam, levels = np.full_like(lam, np.nan), np.full_like(lam, np.nan)
            kl = ess = residual = np.nan
        return dict(
            lam=lam,
            levels=levels,
            kl=kl,
            ess=ess,
            feasible=bool(feasible),
            kkt_residual=float(residual),
            iterations=1 + state.passes,
            nearest=nearest,
            certificate=certificate,
        )


@dataclass
class _Point:
    """The dual at μ: value, gradient, Hessian; the largest score μ·(R_i − c) of any sample; effective sample size."""

    mu: np.ndarray
    value: float
    gradient: np.ndarray
    hessian: np.ndarray
    top: float
    ess: float


class _State:
    """A palette's Newton iteration between passes: the trial asked for, the best point, the certificate if met."""

    def __init__(self, steps):
        self.steps, self.passes = steps, 0
        self.trial = self.point = self.certificate = None

    def begin(self) -> bool:
        return self._resume(None)

    def advance(self, point: _Point) -> bool:
        self.passes += 1
        return self._resume(point)

    def _resume(self, sent) -> bool:
        try:
            self.trial = self.steps.send(sent)
            return True
        except StopIteration as stop:
            self.point, self.certificate = stop.value
            return False


def _residual(point: _Point, upper: np.ndarray) -> float:
    mu = point.mu
    return float(np.abs(mu - np.minimum(np.maximum(mu - point.gradient, 0.0), upper)).max())


def _newton(point: _Point, start: np.ndarray | None, upper: np.ndarray, tol: float):
    """Generator: yields the μ to evaluate, is sent its _Point; returns (last point, certificate or None).

    Begins at `point`, which is μ = 0, or at `start` if g is lower there.
    """
    # With finite bounds the minimum exists whatever the palette, so a certificate does not end the search.
    bounded = bool(np.isfinite(upper[upper > 0.0]).all())
    certificate = None
    if start is not None and start.any():
        warm = yield start
        # g(0) = 0: a start that is no lower tells nothing.
        if warm.value < point.value:
            point = warm
    for _ in range(MAX_PASSES):
        size = float(np.sqrt(point.mu @ point.mu))
        # max_i μ·(R_i − c) < 0: no mixture of the samples reaches c (Farkas). The distance is at least -top / size.
        if certificate is None and point.top < -tol * size:
            certificate = point.mu / size
            if not bounded:
                return point, certificate
        residual = _residual(point, upper)
        if residual <= tol or size > HUGE:
            return point, certificate
        step = _model_minimum(point.hessian, point.gradient, point.mu, upper) - point.mu
        slope = float(point.gradient @ step)
        if not slope < 0.0:
            return point, certificate
        reach = 1e3 * (1.0 + size) / max(1e-300, float(np.sqrt(step @ step)))
        if reach < 1.0:
            step, slope = step * reach, slope * reach
        t = 1.0
        for _ in range(40):
            trial = yield np.minimum(point.mu + t * step, upper)
            # Near the minimum g stands still at its last bits; there the residual is what must fall.
            if trial.value <= point.value + 1e-4 * t * slope or (
                trial.value <= point.value + 1e-12 * (1.0 + abs(point.value))
                and _residual(trial, upper) < 0.5 * residual
            ):
                break
            if certificate is None and trial.top < -tol * np.sqrt(trial.mu @ trial.mu):
                break
            t *= _shorten(point.value, t * slope, trial.value, t * float(trial.gradient @ step))
        else:
            return point, certificate
        point = trial
    return point, certificate


def _shorten(f0: float, d0: float, f1: float, d1: float) -> float:
    """Minimum in (0, 1) of the cubic with values f0, f1 and slopes d0 < 0, d1 > 0 at its ends, kept inside."""
    a = d0 + d1 - 3.0 * (f1 - f0)
    root = a * a - d0 * d1
    if not np.isfinite(root) or root < 0.0:
        return 0.1
    root = float(np.sqrt(root))
    t = 1.0 - (d1 + root - a) / (d1 - d0 + 2.0 * root) if d1 - d0 + 2.0 * root > 0 else 0.5
    return min(max(t, 0.05), 0.8)


def _model_minimum(hessian: np.ndarray, gradient: np.ndarray, x: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """argmin over 0 ≤ z ≤ upper of ½ (z−x)ᵀ H (z−x) + gradient·(z−x), from a feasible x, by a primal active set."""
    diagonal = np.diagonal(hessian)
    # A hair on the diagonal, relative to each entry: duplicated and collinear rewards make H singular.
    floor = 1e-14 * float(diagonal.max()) + 1e-280
    h = hessian.copy()
    h.flat[:: len(x) + 1] = np.maximum(diagonal, floor) * (1.0 + 1e-11)
    z, g = x.copy(), gradient
    free = ((x > 0.0) | (g < 0.0)) & ((x < upper) | (g > 0.0)) & (upper > 0.0)
    for _ in range(10 * len(x) + 20):
        f = free.nonzero()[0]
        if len(f):
            whole = len(f) == len(x)
            step = np.linalg.solve(h if whole else h[f[:, None], f], -(g if whole else g[f]))
            at = z[f]
            goal = at + step
            out = (goal < 0.0) | (goal > upper[f])
            if out.any():
                room = np.where(step < 0.0, -at, upper[f] - at)[out] / step[out]
                t = float(room.min())
                z[f] = at + t * step
                hit = f[out][room <= t]
                z[hit] = np.where(step[out][room <= t] < 0.0, 0.0, upper[hit])
                free[hit] = False
                g = gradient + h @ (z - x)
                continue
            z[f] = goal
            g = gradient + h @ (z - x)
        wrong = np.where(free | (upper <= 0.0), 0.0, np.where(z <= 0.0, -g, g))
        j = int(wrong.argmax())
        if wrong[j] <= 1e-13 * (1.0 + abs(gradient[j])):
            break
        free[j] = True
    return z


def _warm_start(problem: _Problem) -> np.ndarray | None:
    """(K, m) μ solved on about WARM_START_ROWS of the rows; None where there are not many times as many."""
    run = problem.run
    stride = len(run.rewards) // WARM_START_ROWS
    if stride < 8:
        return None
    if run.groups is None:
        rows = slice(None, None, stride)
    else:  # whole groups
        sizes = np.diff(run.offsets)
        if len(sizes) < 64 * stride:
            return None
        rows = np.repeat(np.arange(len(sizes)) % stride == 0, sizes).nonzero()[0]
        rows = rows if run.order is None else run.order[rows]
    log_weights = None if run.log_weights is None else np.ascontiguousarray(run.log_weights[rows])
    if log_weights is not None and run.groups is None and not (log_weights > -np.inf).any():
        return None
    run = MapPass(
        run.rewards[rows],
        center=run.center,
        log_weights=log_weights,
        groups=None if run.groups is None else run.groups[rows],
    )
    part = _Problem(run, problem.palettes, 1e-3, problem.lam_max)
    if part.constant.any() or part.short.any():
        return None
    starts = np.zeros_like(problem.palettes)
    for k, state in enumerate(part.minimise()):
        if state.certificate is None:
            starts[k] = np.minimum(state.point.mu / part.scale * problem.scale, problem.upper)
    return starts


def _rough(rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each reward's mean and root mean square over some of the rows.

    The mean lies amid the data; moments are taken about it, so that an offset costs no digits.
    """
    some = rewards[:: max(1, len(rewards) // 256)].astype(np.float64)
    with np.errstate(all="ignore"):  # NaN and infinity are found by the first pass
        return some.mean(axis=0), np.sqrt((some * some).mean(axis=0))


def _assemble(results: list[dict], single: bool) -> PaletteSolution:
    if single:
        return PaletteSolution(**results[0])
    fields = {
        name: np.array([r[name] for r in results]) for name in results[0] if name not in ("nearest", "certificate")
    }
    m = fields["lam"].shape[1]
    for name in ("nearest", "certificate"):
        rows = [r[name] for r in results]
        fields[name] = (
            None if all(r is None for r in rows) else np.array([np.full(m, np.nan) if r is None else r for r in rows])
        )
    return PaletteSolution(**fields)
