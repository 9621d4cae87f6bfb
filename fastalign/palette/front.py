"""What policies p_λ ∝ p0 exp(λ·R) reach: the front at a given KL from p0, the path to a palette, and random λ.

Among all policies within a KL of κ, exactly one maximises w·E[R], w ≥ 0: the p_λ with λ along w (Gibbs). So for finite
κ each such policy lies on the Pareto front of all policies within κ, and every point of the front's strictly convex
part is such a policy. This is exact for any number of values and needs no random search. With groups the policies are
per-prompt distributions p(y|x) and the KL is the mean over prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.former import renamed
from fastalign._base.units import counted
from fastalign.ops import checks
from fastalign.palette.feasibility import INWARD
from fastalign.palette.inputs import Array, Rewards, Sense, as_palettes, as_sign
from fastalign.palette.passes import Pass
from fastalign.palette.problem import Problem
from fastalign.palette.setup import pass_over
from fastalign.palette.solve import check_arguments, one_palette, solve

TOGETHER = 1024  # λ in one read of the rewards
TOP = 1e-9  # nats below the highest score: a policy this close to its limit has reached it
MOST_STEPS = 100


class Policies(NamedTuple):
    """K policies p_λ over the same samples, float64."""

    lam: np.ndarray  # (K, m)
    levels: np.ndarray  # (K, m) E_λ[R]
    kl: np.ndarray  # (K,) KL(p_λ ‖ p0), nats
    ess: np.ndarray  # (K,) effective sample size; with groups each group's, in the mean

    def __repr__(self) -> str:
        count, m = self.lam.shape
        return f"Policies: {count:,} λ of {counted(m, 'value')}, KL {self.kl.min():.3f} to {self.kl.max():.3f} nats"


class Region(NamedTuple):
    """Random λ and the policies they give."""

    policies: Policies
    desirable: np.ndarray  # (K,) bool: every level at least its mean under p0
    mean: np.ndarray  # (m,)

    def __repr__(self) -> str:
        return f"Region: {len(self.desirable):,} λ, {self.desirable.mean():.1%} of them leave no value below its mean"


class Way(NamedTuple):
    """The path from the mean to a palette."""

    palette: np.ndarray  # (m,)
    t: np.ndarray  # (T,) how far, 0 to 1
    palettes: np.ndarray  # (T, m) mean + t (palette − mean)
    policies: Policies  # the least KL that reaches each
    limit: float  # the largest t that can be reached; 1 where the palette itself can

    def __repr__(self) -> str:
        steps = f"{counted(len(self.t), 'step')} to a palette of {counted(len(self.palette), 'value')}"
        return f"Way: {steps}, {self.limit:.1%} can be reached"


class Tilts:
    """The policies of any λ over given samples. rewards, groups, weights: as in `palette.solve`."""

    mean: np.ndarray
    cov: np.ndarray

    def __init__(self, rewards: Rewards, *, groups: Array | None = None, weights: Array | None = None):
        check_arguments(rewards, (), weights)
        self.run: Pass = pass_over(rewards, groups, weights)
        m = len(self.run.center)
        first = self.run(np.zeros((1, m)))
        self.mean, self.cov = self.run.center + first.mean[0], first.cov[0]
        if not (np.isfinite(self.mean).all() and np.isfinite(self.cov).all()):
            self.run.reject_nonfinite()
        deviation = np.sqrt(np.maximum(np.diagonal(self.cov), 0.0))
        size = np.maximum(self.run.size, np.abs(self.mean))
        # A constant reward cannot be moved; its own size serves as a unit.
        self.constant: np.ndarray = ~(deviation > 1e-14 * size)
        self.scale: np.ndarray = np.where(self.constant, np.where(size > 0, size, 1.0), deviation)

    def at(self, lam: np.ndarray) -> Policies:
        """The policies of `lam` (K, m)."""
        return self._look(lam)[0]

    def _look(self, lam: np.ndarray) -> tuple[Policies, np.ndarray, np.ndarray]:
        """The policies; and for each λ the variance (K,) of its score λ·R, and the gap to the highest score."""
        stats = [self.run(lam[i : i + TOGETHER]) for i in range(0, len(lam), TOGETHER)]
        log_z, mean, cov, ess, top = (np.concatenate(x) for x in zip(*stats, strict=True))
        score = (lam * mean).sum(axis=1)
        variance = np.einsum("ki,kij,kj->k", lam, cov, lam)
        return Policies(lam, self.run.center + mean, np.maximum(score - log_z, 0.0), ess), variance, top - score


def kl_front(
    rewards: Rewards,
    kl: float,
    directions: Array | None = None,
    *,
    groups: Array | None = None,
    weights: Array | None = None,
) -> Policies:
    """The policies with the highest w·E[R / σ] among all within `kl` nats of p0, one for each direction w.

    rewards (n, m), groups, weights: as in `palette.solve`. kl > 0; inf for the limit in which only each prompt's best
    samples remain (without groups: the whole set's). directions (K, m) >= 0, in units of the rewards' standard
    deviations σ; None: `spread_directions(m)`. If that limit is reached below `kl`, the policy is the limit and its KL
    is smaller. λ is solved to a KL within 1e-10 of `kl`, with the same reads for all directions.

    >>> import numpy as np
    >>> from fastalign import palette
    >>> rewards = np.random.default_rng(0).normal(size=(1000, 2))
    >>> front = palette.kl_front(rewards, 0.5, [[1, 0], [0, 1]])
    >>> front.kl.round(6)
    array([0.5, 0.5])
    >>> front.levels.argmax(axis=1)  # the first goes furthest in the first value
    array([0, 1])
    """
    return front_of(Tilts(rewards, groups=groups, weights=weights), kl, directions)


def front_of(tilts: Tilts, kl: float, directions: Array | None = None) -> Policies:
    """`kl_front` of samples that are already set up."""
    m = len(tilts.mean)
    checks.numbers(kl=kl)
    if directions is not None:
        checks.arrays(directions=directions)
    if not kl > 0:
        raise UserError(f"kl must be positive, got {kl!r}")
    w = spread_directions(m) if directions is None else np.asarray(directions, dtype=np.float64)
    if w.ndim != 2 or w.shape[1] != m or not len(w):
        raise UserError(f"directions must have shape (K, {m}), got {w.shape}")
    if not (np.isfinite(w).all() and (w >= 0).all() and (w > 0).any(axis=1).all()):
        raise UserError("directions must be finite, not negative, and not 0 in every value")
    w = w * ~tilts.constant
    unit = w / np.maximum(np.linalg.norm(w, axis=1, keepdims=True), 1e-300) / tilts.scale
    movable = np.flatnonzero(np.einsum("ki,ij,kj->k", unit, tilts.cov, unit) > 0)
    t = np.zeros(len(unit))
    if len(movable):
        t[movable] = _lengths(tilts, unit[movable], kl)
    return tilts.at(t[:, None] * unit)


def _lengths(tilts: Tilts, unit: np.ndarray, kl: float) -> np.ndarray:
    """t (K,) with KL(p_{t unit}) = kl, or t at the limit: Newton within a bracket; the KL grows by t Var(unit·R)."""
    first = np.einsum("ki,ij,kj->k", unit, tilts.cov, unit)
    t = np.minimum(np.sqrt(2 * min(kl, 1.0) / first), 1e12)
    low, high = np.zeros(len(t)), np.full(len(t), np.inf)
    within = 1e-11 * (1 + kl) if kl < np.inf else 0.0
    work = np.arange(len(t))
    for _ in range(MOST_STEPS):
        here = t[work]
        policies, variance, gap = tilts._look(here[:, None] * unit[work])
        short = policies.kl < kl
        low[work[short]], high[work[~short]] = here[short], here[~short]
        done = (np.abs(policies.kl - kl) <= within) | (short & ((gap <= TOP) | (here >= 1e12)))
        done |= high[work] - low[work] <= 4e-16 * here
        work, here, below = work[~done], here[~done], short[~done]
        if not len(work):
            break
        with np.errstate(divide="ignore", invalid="ignore"):  # KL' = variance / t, variance of t unit·R
            goal = here * (1 - (policies.kl[~done] - kl) / variance[~done])
        goal = np.where(below, np.fmin(goal, 4 * here), goal)
        outside = ~((goal > low[work]) & (goal < high[work]))
        middle = np.where(np.isfinite(high[work]), (low[work] + high[work]) / 2, 4 * here)
        t[work] = np.where(outside, middle, goal)
    return t


def front_towards(
    rewards: Rewards,
    palettes: Array,
    kl: float,
    *,
    groups: Array | None = None,
    weights: Array | None = None,
    tol: float = 1e-9,
) -> tuple[np.ndarray, Policies]:
    """How far towards each palette the policies within `kl` nats of p0 can go, and the one that goes farthest.

    palettes: (K, m), each above the mean in one value at least. Returns t (K,), the largest for which mean + t (palette
    − mean) is reachable, and those Policies: the front's points on given rays, while `kl_front` gives those with given
    normals. Solved as palettes, each started from its previous λ; kl must be finite.
    """
    checks.numbers(kl=kl, tol=tol)
    checks.arrays(palettes=palettes)
    if not 0 < kl < np.inf:
        raise UserError(f"kl must be positive and finite, got {kl!r}")
    tilts = Tilts(rewards, groups=groups, weights=weights)
    m = len(tilts.mean)
    palettes = as_palettes(palettes, m)
    away = palettes - tilts.mean
    climb = np.maximum(away / tilts.scale * ~tilts.constant, 0.0)
    if not (climb > 0).any(axis=1).all():
        raise UserError("palettes must each ask for more than the mean of one value at least")
    if (away[:, tilts.constant] > 1e-9 * tilts.scale[tilts.constant]).any():
        raise UserError("palettes must not ask for more of a value that is constant")
    count = len(palettes)
    t = np.sqrt(2 * kl) / climb.max(axis=1)  # where a normal value would be
    low, high = np.zeros(count), np.full(count, np.inf)
    best, lam = np.zeros((count, m)), np.zeros((count, m))
    work, start = np.arange(count), None
    for _ in range(MOST_STEPS):
        trials = tilts.mean + t[work, None] * away[work]
        solved = Problem(tilts.run, trials, as_sign(">=", m), tol, np.inf, start).conclude()
        within = solved["feasible"] & (solved["kl"] <= kl)
        low[work[within]], best[work[within]] = t[work[within]], solved["lam"][within]
        high[work[~within]] = np.minimum(high[work[~within]], t[work[~within]])
        if solved["scaling"] is not None:
            lost = ~solved["feasible"]
            high[work[lost]] = np.minimum(high[work[lost]], t[work[lost]] * solved["scaling"][lost])
        good = solved["feasible"]
        lam[work[good]] = solved["lam"][good]
        done = (good & (np.abs(solved["kl"] - kl) <= 1e-9 * (1 + kl))) | (high[work] - low[work] <= 1e-9 * t[work])
        best[work[done & good]], low[work[done & good]] = solved["lam"][done & good], t[work[done & good]]
        slope = (lam[work] * away[work]).sum(axis=1)  # dKL/dt, by the envelope theorem
        with np.errstate(divide="ignore", invalid="ignore"):
            goal = np.where(good, t[work] + (kl - solved["kl"]) / slope, np.nan)
        goal = np.fmin(goal, 4 * t[work])
        middle = np.where(np.isfinite(high[work]), (low[work] + high[work]) / 2, 2 * t[work])
        inside = (goal > low[work]) & (goal < high[work])
        t[work] = np.where(inside, goal, middle)
        work = work[~done]
        if not len(work):
            break
        start = lam[work]
    return low, tilts.at(best)


def palette_path(
    rewards: Rewards,
    palette: Array,
    *,
    steps: int = 41,
    groups: Array | None = None,
    weights: Array | None = None,
    sense: Sense = ">=",
) -> Way:
    """λ(c) along the path from the mean to `palette` (m,), or to nine tenths of what the samples allow: `steps`
    palettes, one solve.

    rewards, groups, weights, sense: as in `palette.solve`.

    >>> import numpy as np
    >>> from fastalign import palette
    >>> rewards = np.array([[1.0], [0.0], [0.0], [0.0]])
    >>> way = palette.palette_path(rewards, [0.5], steps=3)
    >>> way.palettes[:, 0], way.policies.kl.round(4)
    (array([0.25 , 0.375, 0.5  ]), array([0.    , 0.0381, 0.1438]))
    """
    checks.integer("steps", steps)
    if not steps >= 2:
        raise UserError(f"steps must be at least 2, got {steps!r}")
    check_arguments(rewards, palette, weights, sense)
    tilts = Tilts(rewards, groups=groups, weights=weights)
    palette = one_palette(palette, len(tilts.mean))
    options: dict[str, Any] = {"groups": groups, "weights": weights, "sense": sense}
    whole = solve(rewards, palette, **options)
    limit = 1.0 if whole.scaling is None else float(whole.scaling)
    t = np.linspace(0.0, 1.0 if whole.feasible else INWARD * limit, steps)
    palettes = tilts.mean + t[:, None] * (palette - tilts.mean)
    solution = solve(rewards, palettes[1:], **options)
    lam = np.concatenate([np.zeros((1, len(palette))), solution.lam])
    known = np.isfinite(lam).all(axis=1)  # if nothing can move, no step is feasible
    return Way(palette, t[known], palettes[known], tilts.at(lam[known]), limit)


@renamed(n_lambda="n_lam")
def feasible_region(
    rewards: Rewards,
    n_lam: int,
    l1_max: float,
    seed: int,
    *,
    groups: Array | None = None,
    weights: Array | None = None,
) -> Region:
    """The policies of random λ, and which are desirable: those that leave no value below its mean under p0.

    λ is uniform over {λ ≥ 0, Σ λ_j σ_j ≤ l1_max}, with σ_j the standard deviation of reward j, so that the draw does
    not depend on the values' units. The share that is desirable is then a share of that region's volume. As in MAP
    (arXiv 2410.19198, section 4), which draws λ in the rewards' own units.

    >>> import numpy as np
    >>> from fastalign import palette
    >>> rewards = np.random.default_rng(0).normal(size=(1000, 2))
    >>> region = palette.feasible_region(rewards, 100, 1.0, seed=0)
    >>> region.policies.levels.shape
    (100, 2)
    """
    return region_of(Tilts(rewards, groups=groups, weights=weights), n_lam, l1_max, seed)


def region_of(tilts: Tilts, n_lam: int, l1_max: float, seed: int) -> Region:
    """`feasible_region` of samples that are already set up."""
    checks.integer("n_lam", n_lam)
    checks.integer("seed", seed, 0)
    checks.numbers(l1_max=l1_max)
    if n_lam < 1:
        raise UserError(f"n_lam must be at least 1, got {n_lam!r}")
    if not 0 < l1_max < np.inf:
        raise UserError(f"l1_max must be positive and finite, got {l1_max!r}")
    m = len(tilts.mean)
    # m + 1 shares of 1 without the last: uniform over the corner below the simplex.
    shares = np.random.default_rng(seed).dirichlet(np.ones(m + 1), size=n_lam)[:, :m]
    policies = tilts.at(l1_max * shares / tilts.scale)
    desirable = np.asarray((policies.levels >= tilts.mean - 1e-12 * tilts.scale).all(axis=1))
    return Region(policies, desirable, tilts.mean)


def spread_directions(m: int, count: int = 60, *, columns: Sequence[int] | None = None) -> np.ndarray:
    """(K, m) directions ≥ 0 of length 1. columns: the values covered, default all; the others are 0.

    For two values evenly spaced by angle; for three on a triangular lattice with at least `count` points, row by row;
    for more the axes and then random directions, always the same.

    >>> from fastalign import palette
    >>> palette.spread_directions(2, 3).round(3)
    array([[1.   , 0.   ],
           [0.707, 0.707],
           [0.   , 1.   ]])
    """
    checks.integer("m", m, 1)
    checks.integer("count", count)
    if columns is not None and (isinstance(columns, str) or not isinstance(columns, Iterable)):
        raise UserError(f"columns must be several of the {m} values, got {checks.shown(columns)}")
    columns = list(range(m)) if columns is None else list(columns)
    for column in columns:
        if not isinstance(column, int | np.integer) or not 0 <= column < m:
            raise UserError(f"columns must be from 0 to {m - 1}, of {m} values, got {checks.shown(column)}")
    d = len(columns)
    if d == 1:
        rows = np.ones((1, 1))
    elif d == 2:
        angle = np.linspace(0, np.pi / 2, max(2, count))
        rows = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    elif d == 3:
        sides = next(h for h in range(1, count + 2) if (h + 1) * (h + 2) // 2 >= count)
        bars = np.array(list(combinations(range(sides + 2), 2)))
        rows = np.stack([bars[:, 0], bars[:, 1] - bars[:, 0] - 1, sides + 1 - bars[:, 1]], axis=1).astype(float)
    else:
        drawn = np.abs(np.random.default_rng(0).standard_normal((max(0, count - d), d)))
        rows = np.concatenate([np.eye(d), drawn])
    directions = np.zeros((len(rows), m))
    directions[:, columns] = np.maximum(rows, 0.0) / np.linalg.norm(rows, axis=1, keepdims=True)
    return directions
