"""Projected Newton on one palette's dual within bounds on λ, as a generator: it yields the μ at which it needs a pass.

Bertsekas 1982, with the model over the bounds solved exactly by an active set, and a safeguarded line search. μ is λ
in units of the rewards' standard deviations. csrc/map_newton.cpp is the same iteration compiled, for rewards in memory;
tests/palette/test_palette_native.py checks that both give the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MAX_PASSES = 200
# Beyond this λ (in standard deviations) a policy is on single samples, and only the feasibility test can decide.
HUGE = 1e12
# Where g is flat the residual may be met while λ is still off: take up to this many more steps, until λ moves by 10 tol
# or less.
POLISH_STEPS = 3


class Minima(NamedTuple):
    """The last point of each of K palettes. certificate: μ / |μ| if `certified`, a direction in which all samples fall
    short."""

    mu: np.ndarray  # (K, m)
    value: np.ndarray  # (K,)
    gradient: np.ndarray  # (K, m)
    ess: np.ndarray  # (K,)
    residual: np.ndarray  # (K,)
    passes: np.ndarray  # (K,) over all rows
    certificate: np.ndarray  # (K, m)
    certified: np.ndarray  # (K,) bool


@dataclass
class Point:
    """The dual at μ: value, gradient, Hessian; the largest score μ·(R_i − c) of any sample; effective sample size."""

    mu: np.ndarray
    value: float
    gradient: np.ndarray
    hessian: np.ndarray
    top: float
    ess: float


def minimise(
    evaluate: Callable[[np.ndarray, np.ndarray], list[Point]],
    points: list[Point],
    skip: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
    tol: float,
) -> Minima:
    """Runs all palettes' iterations in step, so that one pass serves every palette that is not finished.

    evaluate(ks, μ (len(ks), m)) -> their Points. points: the starting points, from a first pass. skip: (K,) those to
    leave there.
    """
    count, m = len(points), len(lower)
    points, passes = list(points), np.ones(count, dtype=np.int64)
    certificate, certified = np.full((count, m), np.nan), np.zeros(count, dtype=bool)
    steps = {int(k): newton(points[k], lower, upper, tol) for k in np.flatnonzero(~skip)}
    sent: dict = dict.fromkeys(steps)
    while sent:
        trials = {}
        for k, point in sent.items():
            try:
                trials[k] = steps[k].send(point)
            except StopIteration as stop:
                points[k], proof = stop.value
                if proof is not None:
                    certificate[k], certified[k] = proof, True
        sent = {}
        if trials:
            passes[list(trials)] += 1
            sent = dict(zip(trials, evaluate(np.array(list(trials)), np.array(list(trials.values()))), strict=True))
    mu, value, gradient, ess = (
        np.array([getattr(p, name) for p in points]) for name in ("mu", "value", "gradient", "ess")
    )
    left = np.array([residual(p.mu, p.gradient, lower, upper) for p in points])
    return Minima(mu, value, gradient, ess, left, passes, certificate, certified)


def residual(mu: np.ndarray, gradient: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> float:
    """max_j |μ_j − clip(μ_j − γ_j, lower_j, upper_j)|, which is 0 only at the minimum over the bounds."""
    return float(np.abs(mu - np.minimum(np.maximum(mu - gradient, lower), upper)).max())


def newton(
    point: Point, lower: np.ndarray, upper: np.ndarray, tol: float
) -> Generator[np.ndarray, Point, tuple[Point, np.ndarray | None]]:
    """Yields the μ to evaluate and receives its Point; returns (last point, certificate or None). Starts at `point`."""
    # With finite bounds the minimum exists for any palette, so a certificate does not end the search.
    bounded = bool(np.isfinite(upper - lower).all())
    certificate, polished = None, 0
    for _ in range(MAX_PASSES):
        size = float(np.sqrt(point.mu @ point.mu))
        # max_i μ·(R_i − c) < 0: no mixture of the samples reaches c (Farkas). The distance is at least -top / size.
        if certificate is None and point.top < -tol * size:
            certificate = point.mu / size
            if not bounded:
                return point, certificate
        left = residual(point.mu, point.gradient, lower, upper)
        if left == 0.0 or size > HUGE:
            return point, certificate
        step = model_minimum(point.hessian, point.gradient, point.mu, lower, upper) - point.mu
        slope = float(point.gradient @ step)
        length = float(np.sqrt(step @ step))
        if not slope < 0.0:
            return point, certificate
        if left <= tol:
            if length <= 10 * tol * size or polished == POLISH_STEPS:
                return point, certificate
            polished += 1
        reach = 1e3 * (1.0 + size) / max(1e-300, length)
        if reach < 1.0:
            step, slope = step * reach, slope * reach
        t = 1.0
        for _ in range(40):
            trial = yield np.minimum(np.maximum(point.mu + t * step, lower), upper)
            # Near the minimum g no longer changes beyond its last bits; then the residual has to decrease.
            if trial.value <= point.value + 1e-4 * t * slope or (
                trial.value <= point.value + 1e-12 * (1.0 + abs(point.value))
                and residual(trial.mu, trial.gradient, lower, upper) < 0.5 * left
            ):
                break
            if left <= tol:
                return point, certificate
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


def model_minimum(
    hessian: np.ndarray, gradient: np.ndarray, x: np.ndarray, lower: np.ndarray, upper: np.ndarray
) -> np.ndarray:
    """argmin over lower ≤ z ≤ upper of ½ (z−x)ᵀ H (z−x) + gradient·(z−x), from a feasible x, by a primal active set."""
    diagonal = np.diagonal(hessian)
    # For a constant reward, or a policy on a single sample, there is nothing to divide by.
    h = hessian.copy()
    h.flat[:: len(x) + 1] = np.maximum(diagonal, 1e-14 * float(diagonal.max()) + 1e-280)
    z, g = x.copy(), gradient
    movable = lower < upper
    free = ((x > lower) | (g < 0.0)) & ((x < upper) | (g > 0.0)) & movable
    for _ in range(10 * len(x) + 20):
        f = free.nonzero()[0]
        if len(f):
            whole = len(f) == len(x)
            step = np.linalg.solve(h if whole else h[f[:, None], f], -(g if whole else g[f]))
            at = z[f]
            goal = at + step
            below, above = goal < lower[f], goal > upper[f]
            out = below | above
            if out.any():
                end = np.where(below, lower[f], upper[f])[out]
                room = (end - at[out]) / step[out]
                t = float(room.min())
                z[f] = at + t * step
                hit = room <= t
                z[f[out][hit]] = end[hit]
                free[f[out][hit]] = False
                g = gradient + h @ (z - x)
                continue
            z[f] = goal
            g = gradient + h @ (z - x)
        wrong = np.where(free | ~movable, 0.0, np.where(z <= lower, -g, g))
        j = int(wrong.argmax())
        if wrong[j] <= 1e-13 * (1.0 + abs(gradient[j])):
            break
        free[j] = True
    return z
