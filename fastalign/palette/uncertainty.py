"""How well λ and the levels hold on other samples of the same model: standard errors, bootstrap, held-out data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastalign._base.error_bars import standard_error
from fastalign._base.errors import UserError
from fastalign.ops import checks
from fastalign.palette.feasibility import INWARD
from fastalign.palette.inputs import Array, Sense, as_groups, as_rewards, as_weights
from fastalign.palette.solve import check_arguments, one_palette, solve


@dataclass(frozen=True)
class StandardErrors:
    """Standard errors. lam (m,): of λ, 0 where a constraint is slack. levels (m,): of the levels of p_λ beyond these
    samples."""

    lam: np.ndarray
    levels: np.ndarray


@dataclass(frozen=True)
class Bootstrap:
    """lam (B, m) and levels (B, m) of each resample, NaN if it could not reach the palette; feasible: the share that
    could."""

    lam: np.ndarray
    levels: np.ndarray
    feasible: float

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """The percentile interval of λ, (m,) and (m,), over the resamples that reach the palette."""
        checks.numbers(level=level)
        tail = (1 - level) / 2
        return tuple(np.nanquantile(self.lam, (tail, 1 - tail), axis=0))


@dataclass(frozen=True)
class HeldOut:
    """levels (m,): reached on samples not used for λ, mean over the folds; error (m,): its standard error.

    met: for each value, whether the level exceeds the palette or is within two standard errors of it.
    ess: effective sample size on the held-out folds, summed. feasible: whether every fold's training part reached it.
    """

    levels: np.ndarray
    error: np.ndarray
    met: np.ndarray
    ess: float
    feasible: bool


def standard_errors(
    rewards: Array, lam: Array, *, groups: Array | None = None, weights: Array | None = None
) -> StandardErrors:
    """Sandwich standard errors of λ at `lam` (m,), a solution of `solve` on the same rewards, groups and weights.

    λ solves Σ_i w_i e^{λ·R_i} (R_i − c) = 0 for the values that bind, an M-estimator with Jacobian C = Cov_λ(R):
    Var λ = C⁻¹ V C⁻¹, V = Σ p_i² (R_i − E_λ R)(R_i − E_λ R)ᵀ; V is also the variance of the levels at fixed λ, which to
    first order is the error of the policy's levels (White 1982). With groups the prompts are the random sample: V is
    the covariance of the groups' levels divided by the number of groups. NaN for a single group or sample.

    >>> import numpy as np
    >>> from fastalign import palette
    >>> rewards = np.random.default_rng(0).normal(size=(1000, 1))
    >>> solution = palette.solve(rewards, [0.5])
    >>> palette.standard_errors(rewards, solution.lam).lam.round(3)
    array([0.043])
    """
    check_arguments(rewards, (), weights)
    checks.arrays(lam=lam)
    rewards, lam = as_rewards(rewards), np.asarray(lam, dtype=np.float64)
    n, m = rewards.shape
    if lam.shape != (m,) or not np.isfinite(lam).all():
        raise UserError(f"lam must be {m} finite numbers, got {lam.tolist()}")
    p, ids, count = _law(rewards, lam, groups, weights)
    mean, cov, meat = np.zeros((count, m)), np.zeros((m, m)), np.zeros((m, m))
    for rows in _chunks(n):
        for j in range(m):
            mean[:, j] += np.bincount(ids[rows], p[rows] * rewards[rows, j], minlength=count)
    for rows in _chunks(n):
        apart = rewards[rows].astype(np.float64) - mean[ids[rows]]
        weighted = p[rows, None] * apart
        cov += weighted.T @ apart / count
        if groups is None:
            meat += weighted.T @ weighted
    if groups is not None:
        apart = mean - mean.mean(axis=0)
        meat = apart.T @ apart / count**2
    if (n if groups is None else count) < 2:
        meat = np.full((m, m), np.nan)  # a single unit has no standard error
    binding = np.flatnonzero(lam)
    error = np.zeros(m)
    if len(binding):
        inverse = np.linalg.pinv(cov[np.ix_(binding, binding)], hermitian=True)
        variance = np.diagonal(inverse @ meat[np.ix_(binding, binding)] @ inverse)
        error[binding] = np.sqrt(np.maximum(variance, 0.0))  # negative only by rounding
    return StandardErrors(error, np.sqrt(np.diagonal(meat)))


def bootstrap(
    rewards: Array,
    palette: Array,
    *,
    draws: int = 200,
    seed: int = 0,
    groups: Array | None = None,
    weights: Array | None = None,
    sense: Sense = ">=",
) -> Bootstrap:
    """`solve` on `draws` resamples of the rows (with groups: of whole groups) drawn with replacement."""
    check_arguments(rewards, palette, weights, sense)
    checks.integer("seed", seed, 0)
    rewards = as_rewards(rewards)
    n, m = rewards.shape
    palette = one_palette(palette, m)
    weights = np.ones(n) if weights is None else as_weights(weights, n)
    checks.integer("draws", draws)
    if draws < 1:
        raise UserError(f"draws must be at least 1, got {draws}")
    rng = np.random.default_rng(seed)
    members = None
    if groups is not None:
        ids = np.unique(as_groups(groups, n), return_inverse=True)[1]
        order = np.argsort(ids, kind="stable")
        members = np.split(order, np.cumsum(np.bincount(ids))[:-1])
    lam, levels = np.full((draws, m), np.nan), np.full((draws, m), np.nan)
    for b in range(draws):
        if members is None:
            counts = np.bincount(rng.integers(0, n, n), minlength=n)
            if not (counts * weights).any():
                continue
            solution = solve(rewards, palette, weights=counts * weights, sense=sense)
        else:
            drawn = [members[g] for g in rng.integers(0, len(members), len(members))]
            rows = np.concatenate(drawn)
            again = np.repeat(np.arange(len(drawn)), [len(g) for g in drawn])
            solution = solve(rewards[rows], palette, groups=again, weights=weights[rows], sense=sense)
        if solution.feasible:
            lam[b], levels[b] = solution.lam, solution.levels
    return Bootstrap(lam, levels, float(np.isfinite(lam[:, 0]).mean()))


def held_out(
    rewards: Array,
    palette: Array,
    *,
    folds: int = 5,
    seed: int = 0,
    groups: Array | None = None,
    weights: Array | None = None,
    sense: Sense = ">=",
) -> HeldOut:
    """λ solved on all folds but one, and the levels it reaches on that one: is the palette reached on unseen data?

    Folds are random sets of rows (with groups: of whole groups). A training part that cannot reach the palette is
    solved for its nearest reachable one, just inside.

    >>> import numpy as np
    >>> from fastalign import palette
    >>> rewards = np.random.default_rng(0).normal(size=(1000, 1))
    >>> palette.held_out(rewards, [0.5], seed=0).met
    array([ True])
    """
    check_arguments(rewards, palette, weights, sense)
    checks.integer("seed", seed, 0)
    rewards = as_rewards(rewards)
    n, m = rewards.shape
    palette = one_palette(palette, m)
    weights = np.ones(n) if weights is None else as_weights(weights, n)
    units = np.arange(n) if groups is None else np.unique(as_groups(groups, n), return_inverse=True)[1]
    count = int(units.max()) + 1
    checks.integer("folds", folds)
    if not 2 <= folds <= count:
        raise UserError(f"folds must lie between 2 and the number of samples or prompts, {count}, got {folds}")
    fold = (np.random.default_rng(seed).permutation(count) % folds)[units]
    levels, variance, ess, feasible = np.zeros(m), np.zeros(m), 0.0, True
    own = []  # each group's levels
    for f in range(folds):
        train, test = np.flatnonzero(fold != f), np.flatnonzero(fold == f)

        def part(rows: np.ndarray) -> dict[str, Any]:
            return {"groups": None if groups is None else units[rows], "weights": weights[rows]}

        solution = solve(rewards[train], palette, sense=sense, **part(train))
        if solution.scaling is not None:  # infeasible
            feasible = False
            before = np.average(rewards[train], axis=0, weights=weights[train])
            inside = before + INWARD * solution.scaling * (palette - before)
            solution = solve(rewards[train], inside, sense=sense, **part(train))
        p, ids, groups_here = _law(rewards[test], solution.lam, part(test)["groups"], weights[test])
        levels += (p @ rewards[test].astype(np.float64)) / groups_here / folds
        if groups is None:
            variance += (standard_errors(rewards[test], solution.lam, **part(test)).levels / folds) ** 2
        else:
            own.append(np.stack([np.bincount(ids, p * rewards[test, j]) for j in range(m)], axis=1))
        ess += float((1.0 / np.bincount(ids, p * p)).sum())
    error = np.sqrt(variance) if groups is None else standard_error(np.concatenate(own))
    from fastalign.palette.inputs import as_sign

    sign = as_sign(sense, m)
    miss = np.where(sign == 0, np.abs(levels - palette), sign * (palette - levels))
    return HeldOut(levels, error, miss <= 2 * error, ess, feasible)


def _law(rewards, lam, groups, weights) -> tuple[np.ndarray, np.ndarray, int]:
    """p_λ of each row within its group (n,), the group indices 0.. (n,), and the number of groups."""
    n = len(rewards)
    ids = np.zeros(n, dtype=np.int64) if groups is None else np.unique(as_groups(groups, n), return_inverse=True)[1]
    weights = np.ones(n) if weights is None else as_weights(weights, n)
    score = np.concatenate([rewards[rows].astype(np.float64) @ lam for rows in _chunks(n)])
    count = int(ids.max()) + 1
    top = np.full(count, -np.inf)
    np.maximum.at(top, ids, np.where(weights > 0, score, -np.inf))
    p = weights * np.exp(score - top[ids])
    return p / np.bincount(ids, p, minlength=count)[ids], ids, count


def _chunks(n: int, size: int = 1 << 18):
    return [slice(start, min(n, start + size)) for start in range(0, n, size)]
