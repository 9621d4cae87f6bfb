"""Reads and checks the palette files of `fastalign map`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastalign._base.errors import UserError
from fastalign._base.files import read_json
from fastalign._base.numbers import number

VERSION = 1
LARGEST = 1e100  # of a number: rewards are float32, and results computed with them must not overflow
SENSES = (">=", "<=", "==")
ROWS = ("lambda", "palette", "sense", "free", "levels", "before", "solved_for", "nearest")  # one entry for each value
NUMBERS = ("kl", "ess", "kkt_residual")
WHOLE = ("lambda", "palette", "sense", "before", "levels", "kl", "ess", "kkt_residual", "feasible", "candidates")


def read(path: str | os.PathLike[str], *needed: str) -> dict[str, Any]:
    """The file's object, with its "values" and the other needed entries: "lambda", "palette", "sense", "kl" ...

    Entries that are not needed are checked as well if present and not null, so that a file is valid or not for every
    reader. Raises FileNotFoundError or UserError, one line that names the file.
    """
    content = read_json(path, kind="palette")
    if (version := content.get("version", VERSION)) != VERSION:
        raise UserError(
            f"{path}: version must be {VERSION}, got {version!r:.60}: run this fastalign's `map` again, with "
            "--overwrite"
        )
    for name in ("values", *needed):
        if name not in content:
            raise UserError(
                f"{path}: lacks {name!r}, which a palette file has; run `fastalign map` again, with --overwrite"
            )
    values = content["values"]
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise UserError(f"{path}: values must be a list of names, got {values!r:.60}")
    if not "".join(values).isprintable():
        raise UserError(f"{path}: values must be names that can be printed, got {values!r:.60}")
    if len(set(values)) < len(values):
        raise UserError(f"{path}: values must be different, got {', '.join(values)}")
    there = [name for name in (*ROWS, *NUMBERS, "feasible") if name in needed or content.get(name) is not None]
    for name in there:
        where, value = f"{path}: {name}", content[name]
        if name == "feasible" and not isinstance(value, bool):
            raise UserError(f"{where} must be true or false, got {value!r:.60}")
        if name in NUMBERS:
            _number(where, value)
        elif name in ROWS:
            _row(where, value, name, len(values))
    return content


def of_values(path: str | os.PathLike[str], solution: Mapping[str, Any], names: Sequence[str]) -> list[int]:
    """The index of each of `names` among the file's values. Raises UserError, naming the file, for a missing one."""
    for name in names:
        if name not in solution["values"]:
            raise UserError(f"{path}: its values are {', '.join(solution['values'])}, it has no {name}")
    return [solution["values"].index(name) for name in names]


def check_carried(path: str | os.PathLike[str], solution: Mapping[str, Any], rewards: Iterable[str]) -> None:
    """Raises UserError, naming the file, if one of its values is not among the rewards."""
    rewards = list(rewards)
    for name in solution["values"]:
        if name not in rewards:
            raise UserError(f"{path}: has a target for {name}, but the rewards are {', '.join(rewards)}")


def targets(solution: Mapping[str, Any]) -> list[str]:
    """Each value's target, in the format of `fastalign map`: ">= 0.5000", "<= 0.2000", "== 0.1000" or "free"."""
    free = solution.get("free") or [False] * len(solution["values"])
    rows = zip(solution["palette"], solution["sense"], free, strict=True)
    return ["free" if nothing or level is None else f"{sense} {level:.4f}" for level, sense, nothing in rows]


def in_words(solution: Mapping[str, Any]) -> str:
    """The file's targets, in the format of `palette.parse_palette`."""
    free = solution.get("free") or [False] * len(solution["values"])
    rows = zip(solution["values"], solution["sense"], solution["palette"], free, strict=True)
    return ",".join(
        f"{name}>=free" if nothing or level is None else f"{name}{sense}{level!r}"
        for name, sense, level, nothing in rows
    )


def _row(where: str, row: Any, name: str, count: int) -> None:
    if not isinstance(row, list) or len(row) != count:
        raise UserError(f"{where} must be a list of {count}, one for each value, got {row!r:.60}")
    for i, x in enumerate(row):
        if name == "sense" and x not in SENSES:
            raise UserError(f"{where}[{i}] must be one of {', '.join(SENSES)}, got {x!r:.60}")
        if name == "free" and not isinstance(x, bool):
            raise UserError(f"{where}[{i}] must be true or false, got {x!r:.60}")
        if name not in ("sense", "free") and not (name == "palette" and x is None):  # None: no target
            _number(f"{where}[{i}]", x)


def _number(where: str, x: Any) -> None:
    if isinstance(x, (str, bool)):  # a number as text cannot be calculated with
        raise UserError(f"{where} must be a number, got {x!r:.60}")
    if abs(number(where, x)) > LARGEST:
        raise UserError(f"{where} must lie within ±{LARGEST:g}, got {x:g}")
