"""Alignment one value at a time: each value's λ is solved with the policy of the others as the base.

One round over the values is sequential alignment (MAP, arXiv 2410.19198, section 3.4). Each step minimises the common
dual along one coordinate, so repeated rounds are coordinate descent and approach the simultaneous solution.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastalign._base.errors import UserError
from fastalign.palette.inputs import Array, Sense, as_groups, as_palettes, as_rewards, as_sign, as_weights
from fastalign.palette.solve import solve


def solve_in_turn(
    rewards: Array,
    palette: Array,
    *,
    order: Sequence[int] | None = None,
    rounds: int = 1,
    groups: Array | None = None,
    weights: Array | None = None,
    sense: Sense = ">=",
) -> np.ndarray:
    """λ after each round, (rounds, m), when aligning to one value after the other, starting at λ = 0.

    order: the order of the columns (default: all, from the first on). The other arguments are those of `solve`.
    Raises UserError if one value alone cannot be reached.
    """
    rewards = as_rewards(rewards)
    n, m = rewards.shape
    palette, sign = as_palettes(palette, m)[0], as_sign(sense, m)
    order = list(range(m)) if order is None else list(order)
    if rounds < 1 or sorted(set(order)) != sorted(order) or not set(order) <= set(range(m)):
        raise UserError(
            f"order must name columns from 0 to {m - 1} once and rounds be at least 1, got {order}, {rounds}"
        )
    weights = np.ones(n) if weights is None else as_weights(weights, n)
    ids = np.zeros(n, dtype=np.int64) if groups is None else np.unique(as_groups(groups, n), return_inverse=True)[1]
    lam, path = np.zeros(m), []
    columns = [np.ascontiguousarray(rewards[:, j], dtype=np.float64) for j in range(m)]
    for _ in range(rounds):
        for j in order:
            others = lam.copy()
            others[j] = 0.0
            score = rewards.astype(np.float64) @ others
            top = np.full(ids.max() + 1, -np.inf)
            np.maximum.at(top, ids, np.where(weights > 0, score, -np.inf))
            tilted = weights * np.exp(score - top[ids])
            solution = solve(
                columns[j][:, None],
                palette[j : j + 1],
                groups=groups,
                weights=tilted,
                sense={1: ">=", -1: "<=", 0: "=="}[int(sign[j])],
            )
            if solution.nearest is not None:  # infeasible
                raise UserError(f"value {j} alone cannot reach {palette[j]:.6g}, at best {solution.nearest[0]:.6g}")
            lam[j] = solution.lam[0]
        path.append(lam.copy())
    return np.array(path)
