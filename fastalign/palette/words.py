"""A palette in words: "positive>=0.55, harmless>=base, coherence<=q70"."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.files import check_input, kind_of
from fastalign.palette.ask import moments
from fastalign.palette.inputs import Array, as_rewards
from fastalign.palette.quantile import quantile_palette

SUFFIXES = (".json", ".yaml", ".yml")  # of files with a palette in words
FREE = "free"
_TERM = re.compile(r"\s*([^<>=]+?)\s*(==|>=|<=|=)\s*([^<>=]+?)\s*")
_NUMBER = r"[0-9.]+(?:[eE][+-]?[0-9]+)?"
_FROM_BASE = re.compile(rf"(?:base|mean)\s*([+-])\s*({_NUMBER})\s*(sd|%|)")
_UNIT_ALONE = re.compile(rf"([+-])\s*({_NUMBER})\s*(sd|%)")  # "+10%": from the base
_SIDES = (">=", "<=", "==", "=")


def parse_palette(
    text: str | Mapping[str, Any], names: Sequence[str], rewards: Array, *, rest: str | None = None
) -> tuple[np.ndarray, list[str]]:
    """A palette in words: the levels (m,), and "==", ">=" or "<=" for each of `names`.

    text: bare numbers in the order of `names`, or terms `name>=what`, comma-separated, each name once, where ">=" (or
    "=") means at least, "==" exactly, "<=" at most; or a mapping from name to what, with its sense before it if it is
    not "at least" ("<= 0.2"); or a .json or .yaml file with such a mapping, or with a list of terms. what: a number;
    base, the mean of `rewards` (or mean); base+1sd, base-0.2, base+10%, or +1sd and +10% for short; q80 (the 80 %
    quantile, or the mean where that is higher); or free (no target). `rest=what` sets all names not given, and so does
    the argument `rest`.
    rewards: (n, m), whose columns are `names`. Raises UserError, in one line, on text that it cannot parse and on
    bounds that contradict each other.

    >>> import numpy as np
    >>> from fastalign import palette
    >>> rewards = np.array([[0.0, 4.0], [2.0, 8.0]])
    >>> palette.parse_palette("good>=base+0.5sd, long<=7", ["good", "long"], rewards)
    (array([1.5, 7. ]), ['>=', '<='])
    """
    terms = read_terms(text, names)
    if isinstance(terms, np.ndarray):
        return _finite(terms), [">="] * len(names)
    rewards = as_rewards(rewards)
    mean, deviation = moments(rewards)

    def level(name: str, sense: str, what: str) -> float:
        j = names.index(name)
        return _level(what, sense, rewards[:, j : j + 1], float(mean[j]), float(deviation[j]))

    targets: dict[str, tuple[str, str]] = {}
    for name, sense, what in terms:
        if name not in names and name != "rest":
            raise UserError(f"palette must name each of {', '.join(names)} once, got {name!r}")
        if name in targets:
            if name in names:
                bounds = [(side, to, level(name, side, to)) for side, to in (targets[name], (sense, what))]
                _check_bounds(name, bounds, float(mean[names.index(name)]))
            raise UserError(f"palette must name each of {', '.join(names)} once, got {name!r} again")
        targets[name] = (sense, what)
    named = [name for name in names if name in targets]
    missing = [name for name in names if name not in targets]
    others = targets.get("rest", None if rest is None or not named else (">=", rest))
    if missing and others is None:
        raise UserError(
            f"palette must name each of {', '.join(names)} once, got {', '.join(named) or 'none'}: add "
            f"{', '.join(missing)} or rest=mean"
        )
    wishes = {name: targets.get(name, others) or (">=", FREE) for name in names}
    senses = [wishes[name][0] for name in names]
    return _finite([level(name, *wishes[name]) for name in names]), senses


def read_terms(text: str | Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, str, str]] | np.ndarray:
    """(name, sense, what) of each term of a palette in words; or the levels (m,), if they are bare numbers."""
    if not isinstance(text, Mapping):
        if "=" not in text and Path(text).suffix.lower() in SUFFIXES:
            text = _read(text, names)
    if isinstance(text, Mapping):
        fields = [
            f"{name}{what if str(what).lstrip().startswith(_SIDES) else f'={what}'}" for name, what in text.items()
        ]
    else:
        fields = [field.strip() for field in text.split(",") if field.strip()]
    shown = text if isinstance(text, str) else ", ".join(fields)
    form = f"palette must be numbers or terms such as name>=0.5 or name<=q80, comma-separated, got {shown!r}"
    if not any("=" in field for field in fields):
        try:
            levels = np.array([float(field) for field in fields])
        except ValueError:
            raise UserError(form) from None
        if len(levels) != len(names):
            raise UserError(f"palette must have {len(names)} levels ({', '.join(names)}), got {len(levels)}")
        return levels
    terms = [_TERM.fullmatch(field) for field in fields]
    found = [term.groups() for term in terms if term is not None]
    if len(found) < len(fields):
        raise UserError(form)
    return [(name, ">=" if sense == "=" else sense, what) for name, sense, what in found]


def absolute(text: str | Mapping[str, Any], names: Sequence[str]) -> set[str]:
    """The names for which a palette in words has a number, not a level relative to the base."""
    return {name for name, what in _whats(text, names).items() if _is_number(what)}


def free(text: str | Mapping[str, Any], names: Sequence[str]) -> set[str]:
    """The names for which a palette in words, whose rest is free, asks for nothing."""
    return {name for name, what in _whats(text, names).items() if what == FREE}


def _whats(text: str | Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    terms = read_terms(text, names)
    if isinstance(terms, np.ndarray):
        return dict(zip(names, map(str, terms), strict=True))
    given = {name: what for name, _, what in terms}
    return {name: given.get(name, given.get("rest", FREE)) for name in names}


def _finite(levels: Sequence[float] | np.ndarray) -> np.ndarray:
    for level in levels:
        if not math.isfinite(level):
            raise UserError(f"palette must be finite, got {level}")
    return np.asarray(levels)


def _is_number(what: str) -> bool:
    try:
        float(what)
    except ValueError:
        return False
    return True


def _read(path: str, names: Sequence[str]) -> str | Mapping[str, Any]:
    check_input(path)
    if kind_of(path) == "palette":
        raise UserError(
            f"palette must be levels, such as {names[0]}=mean+1sd, got the file {path}: palette files go to "
            "`fastalign select`, `eval`, `pareto`, `sample` and `train`, as --palette"
        )
    import yaml

    with open(path, encoding="utf-8") as file:
        try:
            text = file.read()
            content, root = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)  # JSON is YAML
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{os.fspath(path)}: cannot be read as YAML: {str(error).splitlines()[0]}") from None
    if isinstance(content, list) and all(isinstance(term, str) for term in content):
        return ",".join(content)
    keys = [key.value for key, _ in root.value] if isinstance(content, Mapping) else []
    if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:  # YAML takes the last
        raise UserError(f"{path}: must name each value once, got {twice[0]!r} again")
    if isinstance(content, Mapping) and content and not any(isinstance(x, list | Mapping) for x in content.values()):
        return {str(name): what for name, what in content.items()}
    raise UserError(f"{path}: must map each value to its level, such as {names[0]}: base+1sd")


def _check_bounds(name: str, bounds: Sequence[tuple[str, str, float]], base: float) -> None:
    """Raises UserError for bounds that contradict each other, and for a band; each is (sense, what, level)."""
    both = " and ".join(f"{name} {sense} {what}" for sense, what, _ in bounds)
    least = max((level for sense, _, level in bounds if sense != "<="), default=-np.inf)
    most = min((level for sense, _, level in bounds if sense != ">="), default=np.inf)
    if least > most:
        raise UserError(f"palette must have bounds that one level can meet, got {both}")
    if {sense for sense, _, _ in bounds} == {">=", "<="}:
        short = [f"{name} {sense} {what}" for sense, what, x in bounds if (base < x if sense == ">=" else base > x)]
        way = f"the base, {base:.4g}, misses only {short[0]}" if short else f"the base, {base:.4g}, meets both"
        raise UserError(f"palette must have one bound for each value, got {both}: {way}")


def _level(what: str, sense: str, column: np.ndarray, mean: float, deviation: float) -> float:
    """column: (n, 1)."""
    if what in ("base", "mean"):
        return mean
    if what == FREE:
        if sense == "==":
            raise UserError("palette must have a level after ==, got free")
        return float(column.min() if sense == ">=" else column.max())
    if re.fullmatch(r"q[0-9.]+", what):
        percent = float(what[1:]) if what.count(".") < 2 else np.nan
        if not 0 <= percent <= 100:
            raise UserError(f"palette must ask for quantiles from q0 to q100, got {what!r}")
        return float(quantile_palette(column, percent / 100)[0])
    moved = _FROM_BASE.fullmatch(what) or _UNIT_ALONE.fullmatch(what)
    try:
        if moved is None:
            return float(what)
        amount = float(moved[1] + moved[2])
    except ValueError:
        raise UserError(f"palette must be numbers, mean, mean+1sd, mean+10%, q80 or free, got {what!r}") from None
    return float(mean + amount * {"sd": deviation, "%": abs(mean) / 100, "": 1.0}[moved[3]])
