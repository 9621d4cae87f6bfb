"""Ways to specify a palette, and the equivalent RLHF objective."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fastalign._base.errors import UserError
from fastalign.palette.inputs import Array, as_rewards, reject_nonfinite
from fastalign.palette.quantile import quantile_palette

UNITS = ("deviations", "absolute", "relative")
_TERM = re.compile(r"\s*([^<>=]+?)\s*(==|>=|<=|=)\s*([^<>=]+?)\s*")
_FROM_MEAN = re.compile(r"mean\s*([+-]\s*[0-9.eE+-]+?)\s*(sd|%|)")


def raised_palette(rewards: Array, amounts: Array | Mapping[int, float], *, unit: str = "deviations") -> np.ndarray:
    """The palette mean + amounts: raises some values and keeps at least the mean of those whose amount is 0.

    rewards: (n, m). amounts: (m,), or a mapping from column number to amount, 0 for the others. unit: "deviations" of
    each reward (raise by one standard deviation: 1), "absolute", or "relative" to the mean's size (0.1: by 10 %).
    Returns (m,) float64. Raises UserError on an unknown unit or column, and NaN or infinite rewards.
    """
    mean, deviation = _moments(rewards)
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
    """The palette with target `level` in one column and none in the others (their minimum, which all samples reach)."""
    rewards = as_rewards(rewards)
    palette = rewards.min(axis=0).astype(np.float64)
    if not np.isfinite(palette).all():
        reject_nonfinite(rewards)
    palette[_column(value, rewards.shape[1])] = level
    return palette


def parse_palette(text: str, names: Sequence[str], rewards: Array) -> tuple[np.ndarray, list[str]]:
    """A palette in words: the levels (m,), and "==", ">=" or "<=" for each of `names`.

    text: bare numbers in the order of `names`, or terms `name=what`, comma-separated, each name once, where "=" means
    at least, "==" exactly, "<=" at most. what: a number, mean, mean+1sd, mean-0.2, mean+10%, q80 (the 80 % quantile,
    or the mean where that is higher) or free (no target). `rest=what` sets all names not given.
    rewards: (n, m), whose columns are `names`. Raises UserError, in one line, on text that it cannot parse.
    """
    fields = [field.strip() for field in text.split(",") if field.strip()]
    if "=" not in text and Path(text).suffix == ".json":
        raise UserError(
            f"palette must be levels, such as {names[0]}=mean+1sd, got the file {text}: palette files go to "
            "`fastalign select`, `eval`, `pareto`, `sample` and `train`, as --palette"
        )
    if not any("=" in field for field in fields):
        try:
            levels = [float(field) for field in fields]
        except ValueError:
            raise UserError(f"palette must be numbers or name=number, comma-separated, got {text!r}") from None
        if len(levels) != len(names):
            raise UserError(f"palette must have {len(names)} levels ({', '.join(names)}), got {len(levels)}")
        return np.array(levels), [">="] * len(names)
    targets: dict[str, tuple[str, str]] = {}
    for field in fields:
        term = _TERM.fullmatch(field)
        if term is None:
            raise UserError(f"palette must be numbers or name=number, comma-separated, got {text!r}")
        name, sense, what = term.groups()
        if name in targets or (name not in names and name != "rest"):
            raise UserError(
                f"palette must name each of {', '.join(names)} once, got {name!r}{' again' * (name in targets)}"
            )
        targets[name] = (">=" if sense == "=" else sense, what)
    rest = targets.pop("rest", None)
    missing = [name for name in names if name not in targets]
    if rest is not None:
        targets |= dict.fromkeys(missing, rest)
    elif missing:
        raise UserError(
            f"palette must name each of {', '.join(names)} once, got {', '.join(targets)}: add {', '.join(missing)} or "
            "rest=mean"
        )
    rewards = as_rewards(rewards)
    mean, deviation = _moments(rewards)
    levels, senses = np.empty(len(names)), []
    for j, name in enumerate(names):
        sense, what = targets[name]
        levels[j] = _level(what, sense, rewards, j, mean[j], deviation[j])
        senses.append(sense)
    return levels, senses


def lambda_of_rlhf(beta: float, weights: Array) -> np.ndarray:
    """λ = w / β: max_p E_p[w·R] − β KL(p ‖ p0) is solved by p ∝ p0 exp(w·R / β)."""
    if not beta > 0:
        raise UserError(f"beta must be positive, got {beta}")
    return np.asarray(weights, dtype=np.float64) / beta


def rlhf_of_lambda(lam: Array) -> tuple[float, np.ndarray]:
    """(β, w) with λ = w / β and Σ |w| = 1: the KL penalty and the reward weights whose RLHF optimum is p_λ."""
    lam = np.asarray(lam, dtype=np.float64)
    total = float(np.abs(lam).sum())
    if not 0 < total < np.inf:
        raise UserError(f"lam must be finite and not all 0, got {lam.tolist()}")
    return 1.0 / total, lam / total


def _level(what: str, sense: str, rewards: np.ndarray, j: int, mean: float, deviation: float) -> float:
    if what == "mean":
        return float(mean)
    if what == "free":
        if sense == "==":
            raise UserError("palette must have a level after ==, got free")
        return float(rewards[:, j].min() if sense == ">=" else rewards[:, j].max())
    if re.fullmatch(r"q[0-9.]+", what):
        percent = float(what[1:]) if what.count(".") < 2 else np.nan
        if not 0 <= percent <= 100:
            raise UserError(f"palette must ask for quantiles from q0 to q100, got {what!r}")
        return float(quantile_palette(rewards[:, j : j + 1], percent / 100)[0])
    moved = _FROM_MEAN.fullmatch(what)
    try:
        if moved is None:
            return float(what)
        amount = float(moved[1].replace(" ", ""))
    except ValueError:
        raise UserError(f"palette must be numbers, mean, mean+1sd, mean+10%, q80 or free, got {what!r}") from None
    return float(mean + amount * {"sd": deviation, "%": abs(mean) / 100, "": 1.0}[moved[2]])


def _moments(rewards) -> tuple[np.ndarray, np.ndarray]:
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
