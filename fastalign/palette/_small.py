"""One palette over a few rows in one call of the engine: there, the numpy around a solve takes longer than the solve.

It answers the ordinary case alone. Whatever is out of the ordinary, from a bad argument to a palette out of reach, goes
the way of `_problem`, whose answers these are but for rounding.
"""

from __future__ import annotations

from math import log

import numpy as np

from fastalign import backend
from fastalign.palette._engine import MOST_VALUES, keeps
from fastalign.palette._inputs import as_palettes, as_rewards, as_sign, check_options
from fastalign.palette._problem import too_thin
from fastalign.palette._uniqueness import ridge


def solve_small(rewards, palette, sense, tol: float) -> dict | None:
    """Every field of PaletteSolution, or None where this is not for here."""
    on_cpu = isinstance(rewards, np.ndarray) or getattr(getattr(rewards, "device", None), "type", "") == "cpu"
    if not (on_cpu and np.ndim(palette) == 1 and backend.engine_runs()):
        return None
    check_options(tol, None)
    rewards = as_rewards(rewards)
    n, m = rewards.shape
    if m > MOST_VALUES or not keeps(n, m):
        return None
    palettes, sign = as_palettes(palette, m), as_sign(sense, m)
    out = np.empty(2 * m + 4)
    passes = backend.engine.map_small(out, rewards, palettes, sign, log(n), tol, ridge(m))
    if not passes:
        return None
    lam, levels, (kl, ess, residual, gap) = out[:m], out[m : 2 * m], out[2 * m :]
    return {
        "lam": lam, "levels": levels, "kl": kl, "ess": ess, "kkt_residual": residual, "duality_gap": gap,
        "feasible": np.True_, "iterations": np.int64(passes), "unique": np.True_,
        "nearly_infeasible": too_thin(ess, lam, n, 0), "nearest": None, "certificate": None, "scaling": None,
    }  # fmt: skip
