"""Palette files, as `fastalign map` writes them: what is read of one is checked here."""

from __future__ import annotations

import os
from typing import Any

from fastalign.data.files import read_json
from fastalign.data.numbers import number
from fastalign.errors import UserError

SENSES = (">=", "<=", "==")


def read(path: str | os.PathLike, *needed: str) -> dict[str, Any]:
    """The file's object, with its "values" and what else is needed of it: "lambda", "palette", "sense", "kl" ...

    Raises FileNotFoundError or UserError, one line that names the file.
    """
    found = read_json(path, kind="palette")
    for name in ("values", *needed):
        if name not in found:
            raise UserError(f"{path}: lacks {name!r}, which a palette file has; run `fastalign map` again")
    values = found["values"]
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise UserError(f"{path}: values must be a list of names, got {values!r:.60}")
    if len(set(values)) < len(values):
        raise UserError(f"{path}: values must be different, got {', '.join(values)}")
    for name in needed:
        if name == "kl":
            number(f"{path}: kl", found[name])
        elif name in ("lambda", "palette", "sense"):
            _row(f"{path}: {name}", found[name], name, len(values))
    return found


def _row(where: str, row: Any, name: str, count: int) -> None:
    if not isinstance(row, list) or len(row) != count:
        raise UserError(f"{where} must be a list of {count}, one for each value, got {row!r:.60}")
    for i, x in enumerate(row):
        if name == "sense" and x not in SENSES:
            raise UserError(f"{where}[{i}] must be one of {', '.join(SENSES)}, got {x!r:.60}")
        if name == "lambda" or (name == "palette" and x is not None):  # None: no level is asked of this value
            number(f"{where}[{i}]", x)
