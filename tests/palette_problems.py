"""Random palettes from gentle to cruel, an exact linear-programming test of whether one can be reached, and λ in
forty digits."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import mpmath
import numpy as np
from scipy.optimize import linprog

KINDS = ("normal", "heavy tails", "bounded", "whole numbers", "skewed", "few samples", "near collinear")
PLACES = ("inside", "mean", "sample", "edge", "just inside", "outside", "far outside", "largest")
SENSES = (">=", "<=", "==", "mixed")


def random_problem(seed: int, dtype=np.float64):
    """(rewards (n, m) of dtype, palette (m,), senses, what it is)."""
    rng = np.random.default_rng(seed)
    kind, place = rng.choice(KINDS), rng.choice(PLACES)
    sense = rng.choice(SENSES, p=[0.55, 0.1, 0.15, 0.2])
    m, n = int(rng.integers(1, 6)), int(rng.integers(1, 8)) if kind == "few samples" else int(rng.integers(8, 80))
    x = rng.normal(size=(n, m)) @ (np.eye(m) + 0.4 * rng.normal(size=(m, m)))
    if kind == "heavy tails":
        x = rng.standard_cauchy(size=(n, m))
    elif kind == "bounded":
        x = np.tanh(2 * x)
    elif kind == "whole numbers":
        x = rng.integers(0, 4, (n, m)).astype(float)
    elif kind == "skewed":
        x = -np.exp(0.8 * x)
    elif kind == "near collinear" and m > 1:
        x[:, -1] = x[:, 0] + 10.0 ** rng.integers(-6, -2) * x[:, -1]
    x *= 10.0 ** rng.integers(-6, 7, m)
    if rng.random() < 0.3:
        x += 10.0 ** rng.integers(-3, 3) * np.abs(x).max(axis=0)
    if rng.random() < 0.2:
        x = np.repeat(x, rng.integers(1, 4, n), axis=0)
    if m > 1 and rng.random() < 0.2:  # a duplicated or a constant value
        x[:, rng.integers(m)] = x[:, rng.integers(m)] if rng.random() < 0.6 else x[0, 0]
    rewards = x.astype(dtype)
    x = rewards.astype(np.float64)
    senses = [str(s) for s in (rng.choice(SENSES[:3], m) if sense == "mixed" else [sense] * m)]
    palette = _palette_at(place, rng, x, senses)
    return rewards, palette, senses, f"seed {seed}: {kind}, {place}, {n} x {m}, {' '.join(senses)}"


def random_problem_of_prompts(seed: int, dtype=np.float64):
    """The same with few samples in up to three prompts, in any order, and their numbers (n,) last."""
    rewards, _, senses, message = random_problem(seed, dtype)
    rng = np.random.default_rng(seed + 1_000_000)
    rewards = rewards[: int(rng.integers(1, 15))]
    groups = rng.integers(0, rng.integers(1, 4), len(rewards)) * 7 - 3
    place = rng.choice(PLACES)
    palette = _palette_at(place, rng, mixtures(rewards, groups), senses)
    return rewards, palette, senses, f"{message}; {place}, prompts {groups.tolist()}", groups


def mixtures(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The means of every choice of one sample a prompt: the corners of what policies per prompt can reach."""
    each = [rewards[groups == g].astype(np.float64) for g in np.unique(groups)]
    return np.array([np.mean(choice, axis=0) for choice in product(*each)])


def _palette_at(place: str, rng, x: np.ndarray, senses) -> np.ndarray:
    m, mean, deviation = x.shape[1], x.mean(axis=0), x.std(axis=0)
    inside = rng.dirichlet(np.ones(len(x))) @ x
    # The face that lies farthest in some direction: its corners' mixtures are on the edge.
    d = np.array([{">=": 1.0, "<=": -1.0, "==": rng.choice([-1.0, 1.0])}[s] for s in senses]) * rng.random(m)
    corner = x[np.argmax(x @ (d / np.where(deviation > 0, deviation, 1)))]
    other = x[rng.integers(len(x))]
    return {
        "inside": inside,
        "mean": mean,
        "sample": other,
        "edge": 0.5 * corner + 0.5 * other,
        "just inside": corner + 10.0 ** -rng.integers(2, 9) * (mean - corner),
        "outside": corner + 10.0 ** -rng.integers(0, 7) * (corner - mean) * rng.random(),
        "far outside": mean + 50 * d * deviation,
        "largest": np.where(d > 0, x.max(axis=0), x.min(axis=0)),
    }[place]


def deviations(rewards: np.ndarray, groups=None) -> np.ndarray:
    """Each reward's deviation, within groups, or its size where it has none: the units of the tolerance."""
    ids = np.zeros(len(rewards), dtype=int) if groups is None else np.unique(groups, return_inverse=True)[1]
    variance = np.mean([rewards[ids == g].var(axis=0) for g in range(ids.max() + 1)], axis=0)
    deviation, size = np.sqrt(variance), np.abs(rewards).max(axis=0)
    return np.where(deviation > 1e-14 * size, deviation, np.where(size > 0, size, 1.0))


def exact_slack(rewards: np.ndarray, palette: np.ndarray, senses, unit=None) -> float:
    """max t such that some mixture meets every constraint with t deviations to spare (an equality: within -t).

    By linear programming in floating point, and in rational numbers where that comes out near 0.
    """
    unit = deviations(rewards) if unit is None else unit
    rows = []
    for j, sense in enumerate(senses):
        gap = [(Fraction(float(r)) - Fraction(float(palette[j]))) / Fraction(float(unit[j])) for r in rewards[:, j]]
        rows += [gap] if sense != "<=" else []
        rows += [[-g for g in gap]] if sense != ">=" else []
    a = np.array([[float(g) for g in row] for row in rows])
    n = len(rewards)
    # heavy tails and far palettes: each constraint in units of its own size, t with it
    result = linprog(
        np.r_[np.zeros(n), -1],
        A_ub=np.c_[-a, np.ones(len(a))],
        b_ub=np.zeros(len(a)),
        A_eq=[[1.0] * n + [0.0]],
        b_eq=[1.0],
        bounds=[(0, None)] * n + [(None, None)],
        method="highs",
    )
    if result.status == 0 and abs(result.fun) > 1e-5:
        return -result.fun
    return float(_rational_slack(rows))


def _rational_slack(rows: list[list[Fraction]]) -> Fraction:
    """max t with Σ w_i rows[j][i] − t − s_j = 0, Σ w = 1, w, s ≥ 0: the simplex method in rational numbers.

    Columns: the weights, then t, then the slacks; the basis is held as its inverse.
    """
    count, n = len(rows), len(rows[0])
    size = count + 1

    def column(i):
        if i < n:
            return [row[i] for row in rows] + [Fraction(1)]
        if i == n:
            return [Fraction(-1)] * count + [Fraction(0)]
        return [Fraction(-int(i - n - 1 == j)) for j in range(count)] + [Fraction(0)]

    first = max(range(n), key=lambda i: min(row[i] for row in rows))
    tight = min(range(count), key=lambda j: rows[j][first])
    basis = [first, n] + [n + 1 + j for j in range(count) if j != tight]
    inverse = _inverse([[column(i)[r] for i in basis] for r in range(size)])
    values = [row[-1] for row in inverse]  # of the basic columns, for the right-hand side (0, ..., 0, 1)
    degenerate = 0
    while True:
        prices = inverse[basis.index(n)]  # t's row: what one unit of a column costs t
        costs = [sum(p * row[i] for p, row in zip(prices, rows, strict=False)) + prices[-1] for i in range(n)]
        costs += [Fraction(0)] + [-p for p in prices[:-1]]
        candidates = [i for i, cost in enumerate(costs) if cost < 0 and i not in basis]
        if not candidates:
            return values[basis.index(n)]
        # the steepest; after a step that moved nothing the first (Bland), which cannot go round in circles
        enter = candidates[0] if degenerate else min(candidates, key=lambda i: costs[i])
        along = [sum(a * b for a, b in zip(row, column(enter), strict=True)) for row in inverse]
        leaving = [(values[r] / along[r], basis[r], r) for r in range(size) if along[r] > 0 and basis[r] != n]
        step, _, r = min(leaving)
        degenerate = step == 0
        inverse[r] = [x / along[r] for x in inverse[r]]
        for other in range(size):
            if other != r and along[other]:
                inverse[other] = [x - along[other] * y for x, y in zip(inverse[other], inverse[r], strict=True)]
        basis[r] = enter
        values = [row[-1] for row in inverse]


def _inverse(matrix: list[list[Fraction]]) -> list[list[Fraction]]:
    size = len(matrix)
    work = [[*row, *(Fraction(int(i == j)) for j in range(size))] for i, row in enumerate(matrix)]
    for i in range(size):
        pivot = next(r for r in range(i, size) if work[r][i] != 0)
        work[i], work[pivot] = work[pivot], work[i]
        work[i] = [x / work[i][i] for x in work[i]]
        for r in range(size):
            if r != i and work[r][i]:
                work[r] = [x - work[r][i] * y for x, y in zip(work[r], work[i], strict=True)]
    return [row[size:] for row in work]


def precise_lambda(rewards, palette, senses, lam, groups=None, digits: int = 40):
    """λ × standard deviation in forty digits by Newton on the values in `lam`'s support; the KKT residual there in
    deviations; and how far the last step still went: along a direction in which the dual hardly falls, λ is not to be
    known."""
    unit = deviations(rewards, groups)
    ids = np.zeros(len(rewards), dtype=int) if groups is None else np.unique(groups, return_inverse=True)[1]
    members = [np.flatnonzero(ids == g) for g in range(ids.max() + 1)]
    active, last = np.flatnonzero(lam), 0.0
    with mpmath.workdps(digits):
        x = [
            [
                (mpmath.mpf(float(r)) - mpmath.mpf(float(c))) / mpmath.mpf(float(u))
                for r, c, u in zip(row, palette, unit, strict=True)
            ]
            for row in rewards
        ]
        mu = [mpmath.mpf(float(lam[j])) * mpmath.mpf(float(unit[j])) for j in active]
        for step in range(7):
            scores = [mpmath.fsum(m * row[j] for m, j in zip(mu, active, strict=True)) for row in x]
            p = [mpmath.mpf(0)] * len(x)  # of each group, which all count alike
            for rows in members:
                top = max(scores[i] for i in rows)
                e = {i: mpmath.exp(scores[i] - top) for i in rows}
                total = mpmath.fsum(e.values()) * len(members)
                for i in rows:
                    p[i] = e[i] / total
            level = lambda rows, j: mpmath.fsum(p[i] * x[i][j] for i in rows)  # noqa: B023, E731
            each = [[level(rows, j) * len(members) for j in range(len(palette))] for rows in members]
            mean = [mpmath.fsum(own[j] for own in each) / len(members) for j in range(len(palette))]
            if step == 6 or not len(active):
                break
            cov = mpmath.matrix(len(active))
            for a, j in enumerate(active):
                for b, k in enumerate(active):
                    cov[a, b] = mpmath.fsum(
                        p[i] * (x[i][j] - own[j]) * (x[i][k] - own[k])
                        for rows, own in zip(members, each, strict=True)
                        for i in rows
                    )
            delta = mpmath.lu_solve(cov, mpmath.matrix([-mean[j] for j in active]))
            mu = [m + d for m, d in zip(mu, delta, strict=True)]
            last = max(abs(float(d)) for d in delta)
        left = mpmath.mpf(0)
        for j, sense in enumerate(senses):
            m = mu[list(active).index(j)] if j in active else mpmath.mpf(0)
            moved = m - mean[j]
            left = max(left, abs(m - (max(moved, 0) if sense == ">=" else min(moved, 0) if sense == "<=" else moved)))
        out = np.zeros(len(palette))
        out[active] = [float(m) for m in mu]
        return out, float(left), last
