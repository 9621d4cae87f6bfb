"""Palettes given as quantiles of the rewards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastalign._base.errors import UserError
from fastalign.ops import checks
from fastalign.palette.inputs import Array, as_rewards, reject_nonfinite


def quantile_palette(rewards: Array, q: float, *, values: Sequence[int] | None = None) -> np.ndarray:
    """The palette max(mean, q-quantile) in the columns `values` (None: all), the mean in the others.

    rewards: (n, m), numpy array or torch tensor. q: in [0, 1]. values: column numbers. Returns (m,) float64.
    With the humor, helpful and harmless columns this is HHH-q of the MAP paper (arXiv 2410.19198, section 4). Each
    quantile can be reached on its own, but all together possibly not; `solve` decides that. Raises UserError on a q
    outside [0, 1], a column that does not exist, and NaN or infinite rewards.

    >>> import numpy as np
    >>> from fastalign import palette
    >>> rewards = np.array([[0.0, 4.0], [1.0, 5.0], [2.0, 9.0]])
    >>> palette.quantile_palette(rewards, 0.75)
    array([1.5, 7. ])
    >>> palette.quantile_palette(rewards, 0.75, values=[0])
    array([1.5, 6. ])
    """
    rewards = as_rewards(rewards)
    check_quantile("q", q)
    m = rewards.shape[1]
    columns = range(m) if values is None else list(values)
    for j in columns:
        if not (isinstance(j, (int, np.integer)) and 0 <= j < m):
            raise UserError(f"values must be column numbers from 0 to {m - 1}, got {j!r}")
    with np.errstate(all="ignore"):
        palette = rewards.mean(axis=0, dtype=np.float64)
    if not np.isfinite(palette).all():
        reject_nonfinite(rewards)
    for j in columns:
        # Interpolated in float32 the quantile would be rounded, which changes λ's fourth digit on steep palettes.
        palette[j] = max(palette[j], float(np.quantile(rewards[:, j].astype(np.float64), q)))
    return palette


def check_quantile(name: str, q: float) -> None:
    """Raises UserError, with the name it was given by, unless q is in [0, 1]."""
    checks.numbers(**{name: q})
    if not 0 <= q <= 1:
        raise UserError(f"{name} must lie between 0 and 1, got {q}")
