"""Rows of a data set: a local JSONL, JSON, CSV or Parquet file, or a data set's hub name, as a list of objects."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from fastalign.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read(name_or_path: str | os.PathLike, *, split: str = "train", what: str = "data") -> list[dict[str, Any]]:
    """The rows of a file of rows, or of a split of a hub data set; at least one.

    what: how messages call it ("pairs"). Raises FileNotFoundError or UserError, one line that names the file.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir():
        raise UserError(f"{name}: {what} must be a file ({', '.join(SUFFIXES)}), this is a folder")
    if path.is_file():
        if suffix not in SUFFIXES:
            raise UserError(f"{name}: {what} must be a {', '.join(SUFFIXES)} file, got {suffix or 'no suffix'}")
        rows = _local(path, suffix)
    elif suffix in SUFFIXES or path.is_absolute() or name.startswith((".", "~")) or not name.strip():
        raise FileNotFoundError(f"{name}: no such file of {what}")
    else:
        rows = [dict(row) for row in from_hub(name, split=split, what=what)]
    if not rows:
        raise UserError(f"{name}: holds no {what}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{name}: row {i} must be an object, got {type(row).__name__}")
    return rows


def from_hub(name: str, *, split: str, what: str):
    """A data set by its hub name, as `datasets.Dataset`; UserError in one line where it is not to be had."""
    try:
        import datasets
    except ImportError:
        rule = "and a hub name needs the package 'datasets': pip install fastalign[trl]"
        raise UserError(f"{name}: no such file of {what}, {rule}") from None
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # each builder has its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: no such file of {what}, and not to be had from the hub: {reason}") from None


def _local(path: Path, suffix: str) -> list:
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.read_table(path, partitioning=None).to_pylist()
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: not a Parquet file that can be read ({reason})") from None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    if suffix == ".csv":
        found = list(csv.DictReader(io.StringIO(text, newline="")))
        for i, row in enumerate(found):
            if None in row:
                raise UserError(f"{path}: row {i} has more cells than the header has columns")
        return found
    if suffix == ".json":
        rows = _parse(path, text, "") if text.strip() else []
        if not isinstance(rows, list):
            raise UserError(f"{path}: a .json file must hold a list, got {type(rows).__name__}")
        return rows
    return [_parse(path, line, f" line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parse(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}:{where} is not JSON ({error})") from None
