"""Ways to specify a palette, and the equivalent RLHF objective."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fastalign._base.errors import UserError
from fastalign.palette.inputs import Array, as_rewards, reject_nonfinite

UNITS = ("deviations", "absolute", "relative")


def raised_palette(rewards: Array, amounts: Array | Mapping[int, float], *, unit: str = "deviations") -> np.ndarray:
    """The palette mean + amounts: raises some values and keeps at least the mean of those whose amount is 0.

    rewards: (n, m). amounts: (m,), or a mapping from column number to amount, 0 for the others. unit: "deviations" of
    each reward (raise by one standard deviation: 1), "absolute", or "relative" to the mean's size (0.1: by 10 %).
    Returns (m,) float64. Raises UserError on an unknown unit or column, and NaN or infinite rewards.

    >>> import numpy as np
    >>> from fastalign import palette
    >>> rewards = np.array([[0.0, 4.0], [2.0, 8.0]])
    >>> palette.raised_palette(rewards, [0.5, 0.0])
    array([1.5, 6. ])
    >>> palette.raised_palette(rewards, {1: 0.1}, unit="relative")
    array([1. , 6.6])
    """
    mean, deviation = moments(rewards)
    if unit not in UNITS:
        raise UserError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
    if isinstance(amounts, dict):
        given, amounts = amounts, np.zeros(len(mean))
        for j, amount in given.items():
            amounts[_column(j, len(mean))] = amount
    amounts = np.asarray(amounts, dtype=np.float64)
    if amounts.shape != mean.shape or not np.isfinite(amounts).all():
        raise UserError(f"amounts must be {len(mean)} finite numbers, got {amounts.tolist()}")
    return mean + amounts * {"deviations": deviation, "absolute": 1.0, "relative": np.abs(mean)}[unit]


def single_value_palette(rewards: Array, value: int, level: float) -> np.ndarray:
    """The palette with target `level` in one column and none in the others (their minimum, which all samples reach).

    >>> import numpy as np
    >>> from fastalign import palette
    >>> palette.single_value_palette(np.array([[0.0, 4.0], [2.0, 8.0]]), 0, 1.5)
    array([1.5, 4. ])
    """
    rewards = as_rewards(rewards)
    palette = rewards.min(axis=0).astype(np.float64)
    if not np.isfinite(palette).all():
        reject_nonfinite(rewards)
    palette[_column(value, rewards.shape[1])] = level
    return palette


def lambda_of_rlhf(beta: float, weights: Array) -> np.ndarray:
    """λ = w / β: max_p E_p[w·R] − β KL(p ‖ p0) is solved by p ∝ p0 exp(w·R / β).

    >>> from fastalign import palette
    >>> palette.lambda_of_rlhf(0.5, [1.0, 0.4])
    array([2. , 0.8])
    """
    if not beta > 0:
        raise UserError(f"beta must be positive, got {beta}")
    return np.asarray(weights, dtype=np.float64) / beta


def rlhf_of_lambda(lam: Array) -> tuple[float, np.ndarray]:
    """(β, w) with λ = w / β and Σ |w| = 1: the KL penalty and the reward weights whose RLHF optimum is p_λ.

    >>> from fastalign import palette
    >>> beta, weights = palette.rlhf_of_lambda([3.0, 1.0])
    >>> beta, weights.tolist()
    (0.25, [0.75, 0.25])
    """
    lam = np.asarray(lam, dtype=np.float64)
    total = float(np.abs(lam).sum())
    if not 0 < total < np.inf:
        raise UserError(f"lam must be finite and not all 0, got {lam.tolist()}")
    return 1.0 / total, lam / total


def moments(rewards) -> tuple[np.ndarray, np.ndarray]:
    rewards = as_rewards(rewards)
    with np.errstate(all="ignore"):
        mean, deviation = rewards.mean(axis=0, dtype=np.float64), rewards.std(axis=0, dtype=np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(deviation).all()):
        reject_nonfinite(rewards)
    return mean, deviation


def _column(j, m: int) -> int:
    if not (isinstance(j, (int, np.integer)) and 0 <= j < m):
        raise UserError(f"values must be column numbers from 0 to {m - 1}, got {j!r}")
    return int(j)
