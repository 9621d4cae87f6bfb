"""Does the result hold its palette on prompts that it has not seen? Levels, errors and a verdict for each value."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastalign._base.error_bars import standard_error
from fastalign._base.units import alternatives, decimals

MET, WITHIN, MISSED, IMPOSSIBLE, FREE = "met", "met within error", "missed by", "impossible", "not asked"
WATCHED = "watched"  # a reward that was no part of what was optimised
ERRORS = 2.0  # standard errors within which a level counts as met


@dataclass(frozen=True)
class Level:
    """One value's row; levels are means over the held-out prompts, in the reward's own units.

    asked, op: the level and ">=", "<=" or "=="; None if nothing was asked. base: of the base model. predicted: of p_λ
    by the prompts that λ was solved on. realised, se: of the result, with its standard error over prompts (None for
    one prompt). change_se: the standard error of realised - base, prompt by prompt. std: of the base's candidates.
    """

    name: str
    asked: float | None
    op: str | None
    base: float
    predicted: float | None
    realised: float | None
    se: float | None
    change_se: float | None
    std: float
    verdict: str

    @property
    def wish(self) -> str:
        if self.asked is None:
            return "not asked"
        return f"{self.op} {self.show(self.asked)}"

    @property
    def fell(self) -> bool:
        """Whether nobody asked about it and it lies below the base by more than its error."""
        if self.asked is not None or self.realised is None or self.change_se is None:
            return False
        return self.base - self.realised > ERRORS * self.change_se

    def show(self, level: float | None) -> str:
        return "–" if level is None else f"{level:.{decimals(self.std)}f}"

    def to_json(self) -> dict[str, Any]:
        names = ("asked", "op", "base", "predicted", "realised", "se", "verdict")
        return {name: getattr(self, name) for name in names}


def judge(op: str | None, asked: float | None, realised: float, se: float | None, std: float) -> str:
    """The verdict: "met", "met within error" (of two standard errors), "missed by 0.0123", or "not asked"."""
    if asked is None or op is None:
        return FREE
    short = {">=": asked - realised, "<=": realised - asked, "==": abs(realised - asked)}[op]
    if short <= 1e-9 * (abs(asked) + std):  # the rounding of rewards
        return MET
    return WITHIN if short <= ERRORS * (se or 0.0) else f"{MISSED} {short:.4g}"


def levels(
    names: Sequence[str],
    asked: Sequence[float | None],
    ops: Sequence[str],
    *,
    base: np.ndarray,
    predicted: Sequence[float | None],
    realised: np.ndarray,
    watched: Collection[str] = (),
) -> list[Level]:
    """The rows, from rewards on the held-out prompts: base (P, N, m) of the base model, realised (P, k, m). watched:
    names of rewards that were not optimised, for which nothing is predicted."""
    before, after = base.mean(axis=1, dtype=np.float64), realised.mean(axis=1, dtype=np.float64)
    se, change = standard_error(after), standard_error(after - before)
    rows = []
    for j, name in enumerate(names):
        std, level = float(base[..., j].std(dtype=np.float64)), float(after[:, j].mean())
        error = _number(se[j])
        rows.append(
            Level(
                name=name,
                asked=asked[j],
                op=None if asked[j] is None else ops[j],
                base=float(before[:, j].mean()),
                predicted=predicted[j],
                realised=level,
                se=error,
                change_se=_number(change[j]),
                std=std,
                verdict=WATCHED if name in watched else judge(ops[j], asked[j], level, error, std),
            )
        )
    return rows


def impossible(
    names: Sequence[str], asked: Sequence[float | None], ops: Sequence[str], base: np.ndarray
) -> list[Level]:
    """The rows of a palette that no reweighting reaches; base (P, N, m) on the prompts on which that is proved."""
    rows = []
    for j, name in enumerate(names):
        column, free = base[..., j], asked[j] is None
        rows.append(
            Level(
                name=name, asked=asked[j], op=None if free else ops[j], base=float(column.mean(dtype=np.float64)),
                predicted=None, realised=None, se=None, change_se=None, std=float(column.std(dtype=np.float64)),
                verdict=FREE if free else IMPOSSIBLE,
            )
        )  # fmt: skip
    return rows


def headline(rows: Sequence[Level], conflicts: Sequence[Sequence[str]] = ()) -> str:
    """One sentence. conflicts: of a palette that no reweighting reaches, the groups of values that cannot be had."""
    if conflicts:
        wishes = {row.name: f"{row.name} {row.wish}" for row in rows}
        what = alternatives([[wishes[name] for name in group] for group in conflicts])
        return f"No reweighting of the model's answers reaches {what}."
    asked = [row for row in rows if row.asked is not None]
    missed = [f"{row.name} ({row.verdict})" for row in asked if row.verdict.startswith(MISSED)]
    if missed:
        return f"Not every value holds on held-out prompts: {', '.join(missed)}."
    return "Every value asked for holds on held-out prompts." if asked else "Nothing was asked for."


def _number(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None
