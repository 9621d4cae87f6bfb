"""Do values measure different things? Their correlations within prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastalign._base.errors import UserError

SAME = 0.98  # correlation from which two values are one


def correlations(rewards: np.ndarray) -> np.ndarray:
    """(m, m) float64: Pearson's correlation of each two values over candidates, within prompts. A value that is
    constant within every prompt correlates with none (0).

    rewards: (P, N, m), finite. Raises UserError on another shape.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 3:
        raise UserError(f"rewards must be (prompts, candidates, values), got shape {rewards.shape}")
    apart = (rewards - rewards.mean(axis=1, keepdims=True)).reshape(-1, rewards.shape[2])
    size = np.sqrt((apart**2).sum(axis=0))
    least = 1e-12 * np.sqrt((rewards**2).sum(axis=(0, 1)))  # rounding
    units = apart / np.where(size > least, size, np.inf)
    result = units.T @ units
    np.fill_diagonal(result, 1.0)
    return np.clip(result, -1.0, 1.0)


def alike(names: Sequence[str], rewards: np.ndarray) -> list[str]:
    """One line for each two values that measure the same thing, or its opposite."""
    if len(names) < 2:
        return []
    table = correlations(rewards)
    return [
        f"{names[i]} and {names[j]} are {'one value' if table[i, j] > 0 else 'opposites'}: their correlation within "
        f"prompts is {table[i, j]:.3f}"
        for i in range(len(names))
        for j in range(i + 1, len(names))
        if abs(table[i, j]) >= SAME
    ]
