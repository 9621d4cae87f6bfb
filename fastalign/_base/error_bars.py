"""Standard errors of means and shares, and how they are printed: never smaller than the independent units allow."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastalign._base.units import counted

if TYPE_CHECKING:
    import numpy as np


def standard_error(means: np.ndarray, axis: int = 0) -> np.ndarray:
    """Standard error of the mean over an axis of independent units, such as prompts; NaN for fewer than two."""
    import numpy as np  # imported here: commands must start without it

    means = np.asarray(means, dtype=np.float64)
    count = means.shape[axis]
    if count < 2:
        return np.full(np.delete(means.shape, axis), np.nan)
    return means.std(axis=axis, ddof=1) / math.sqrt(count)


def plus_minus(mean: float, error: float | None, count: int, *, unit: str = "prompt", digits: int = 3) -> str:
    """ "0.371 ± 0.030"; without an error, or for fewer than two units, "0.371 ± n/a (1 prompt)"."""
    if error is None or not math.isfinite(error) or count < 2:
        return f"{mean:.{digits}f} ± n/a ({counted(count, unit)})"
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def wilson(share: float, count: float, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's 95 % interval for a share of `count` independent trials (Wilson 1927); all of [0, 1] for none."""
    if not count:
        return 0.0, 1.0
    middle, shrink = (share + z * z / (2 * count)), 1 + z * z / count
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, (middle - half) / shrink), min(1.0, (middle + half) / shrink)
