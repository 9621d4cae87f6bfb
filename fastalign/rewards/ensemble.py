"""Several rewards as one: their mean, the worst of them, their mean less their disagreement, or by rank.

The same text scored by several models of one value shows where they disagree; a policy that is optimised against their
worst, or against mean - c · sd, has less to gain from one model's errors (Coste et al. 2024, arXiv 2310.02743).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.numbers import number
from fastalign.data import rows
from fastalign.rewards.base import Reward, evaluate

HOW = ("mean", "worst", "lcb", "rank")


class Ensemble:
    """Rewards as one; made by `ensemble`. It hands whole conversations to those that read them."""

    reads_messages = True
    name: str
    rewards: list[Reward]
    how: str
    c: float
    base: np.ndarray | None

    def __init__(self, rewards: Sequence[Reward], how: str, name: str, c: float, base: np.ndarray | None):
        self.rewards, self.how, self.name, self.c = list(rewards), how, name, c
        self.base = base  # (n, k), each column sorted

    def __call__(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        scores = np.stack([evaluate(one, prompts, responses) for one in self.rewards], axis=1).astype(np.float64)
        if self.base is not None:
            scores = _ranks(scores, self.base) if self.how == "rank" else _standardised(scores, self.base)
        if self.how == "worst":
            return scores.min(axis=1)
        return scores.mean(axis=1) - (self.c * scores.std(axis=1) if self.how == "lcb" else 0.0)


def ensemble(
    rewards: Sequence[Reward],
    how: str = "mean",
    *,
    c: float = 1.0,
    base: str | os.PathLike[str] | np.ndarray | None = None,
    name: str | None = None,
) -> Ensemble:
    """k rewards as one reward.

    how: "mean"; "worst", the least; "lcb", mean - c · (their standard deviation); "rank", the mean of the shares of the
        base's texts that each scores lower, ties counting half, in [0, 1].
    base: texts of the base model, by whose mean and standard deviation each reward is standardised first, so that
        rewards of other units count alike: a file of candidates (where it has no column of a reward, its texts are
        scored), or the rewards' scores (n, k). "rank" needs it.
    name: of the reward; default: how.

    Raises UserError, one line, for no rewards, another `how`, and a reward that is constant over the base.
    """
    rewards = list(rewards)
    if how not in HOW:
        raise UserError(f"how must be one of {', '.join(HOW)}, got {how!r}")
    if len(rewards) < (2 if how == "lcb" else 1):
        raise UserError(
            f"{how} must be of {'two rewards' if how == 'lcb' else 'one reward'} at least, got {len(rewards)}"
        )
    if isinstance(c, bool) or not isinstance(c, int | float) or not 0 <= c < float("inf"):
        raise UserError(f"c must be a number >= 0, got {c!r}")
    if base is None:
        if how == "rank":
            raise UserError("rank needs base, a file of candidates among which the ranks are")
        return Ensemble(rewards, how, name or how, float(c), None)
    levels = base if isinstance(base, np.ndarray) else _levels(os.fspath(base), rewards)
    levels = np.sort(np.asarray(levels, dtype=np.float64), axis=0)
    if levels.ndim != 2 or levels.shape[1] != len(rewards) or len(levels) < 2 or not np.isfinite(levels).all():
        raise UserError(f"base must be finite scores (n, {len(rewards)}) of two texts at least, got {levels.shape}")
    for one, low, high in zip(rewards, levels[0], levels[-1], strict=True):
        if low == high:
            raise UserError(f"reward {one.name!r} is {low:g} for every text of base: it has no unit there")
    return Ensemble(rewards, how, name or how, float(c), levels)


def _standardised(scores: np.ndarray, base: np.ndarray) -> np.ndarray:
    return (scores - base.mean(axis=0)) / base.std(axis=0)


def _ranks(scores: np.ndarray, base: np.ndarray) -> np.ndarray:
    columns = zip(scores.T, base.T, strict=True)
    ranks = [(np.searchsorted(b, x, "left") + np.searchsorted(b, x, "right")) / (2 * len(b)) for x, b in columns]
    return np.stack(ranks, axis=1)


def _levels(file: str, rewards: Sequence[Reward]) -> np.ndarray:
    """Each reward's scores (n, k) of a file's texts."""
    table = rows.read(file, what="candidates")
    columns: list[Any] = []
    for one in rewards:
        known = next((name for name in (f"reward:{one.name}", one.name) if name in table[0]), None)
        if known is not None:
            columns.append([number(f"{file}: row {i}: {known}", row.get(known)) for i, row in enumerate(table)])
            continue
        prompt = next((name for name in rows.PROMPTS if name in table[0]), None)
        response = next((name for name in rows.RESPONSES if name in table[0] and name != prompt), None)
        if prompt is None or response is None:
            have = ", ".join(table[0])
            raise UserError(f"{file}: must have the column {one.name}, or prompt and response, it has {have}")
        prompts: list[Any] = [row.get(prompt) for row in table]
        texts: list[Any] = [row.get(response) for row in table]
        if any(row.get("is_conversation") for row in table) or not all(isinstance(x, str) for x in [*prompts, *texts]):
            raise UserError(f"{file}: must have the column {one.name} (`fastalign score`), or a text a row to score")
        columns.append(evaluate(one, prompts, texts))
    return np.array(columns, dtype=np.float64).T
