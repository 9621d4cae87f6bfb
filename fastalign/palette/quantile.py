"""Palettes written as quantiles of the rewards at hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def quantile_palette(rewards, q: float, *, values: Sequence[int] | None = None) -> np.ndarray:
    """The palette max(mean, q-quantile) in the columns `values` (None: all), the mean in the others.

    rewards: (n, m), numpy array or torch tensor. q: in [0, 1]. values: column numbers. Returns (m,) float64.
    With the humor, helpful and harmless columns this is HHH-q of the MAP paper (arXiv 2410.19198, section 4). Each
    quantile can be reached by itself; all at once may not be, which `solve` finds out.
    Raises ValueError on a q outside [0, 1], a column that does not exist, and NaN or infinite rewards.
    """
    from fastalign.palette.solve import as_rewards

    rewards = as_rewards(rewards)
    if not 0 <= q <= 1:
        raise ValueError(f"q must lie between 0 and 1, got {q}")
    m = rewards.shape[1]
    columns = range(m) if values is None else list(values)
    for j in columns:
        if not (isinstance(j, (int, np.integer)) and 0 <= j < m):
            raise ValueError(f"values must be column numbers from 0 to {m - 1}, got {j!r}")
    palette = rewards.mean(axis=0, dtype=np.float64)
    if not np.isfinite(palette).all():
        i, j = np.argwhere(~np.isfinite(rewards))[0]
        raise ValueError(f"rewards must be finite, got {rewards[i, j]} in row {i}, column {j}")
    for j in columns:
        palette[j] = max(palette[j], float(np.quantile(rewards[:, j], q)))
    return palette
