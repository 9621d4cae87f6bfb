"""Rows of a data set: a local JSONL, JSON, CSV, Parquet or Arrow file, or a hub name, as a list of objects."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastalign._base.errors import UserError
from fastalign._base.files import check_input
from fastalign._base.hub import check_reachable

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".feather")


def read(name_or_path: str | os.PathLike[str], *, split: str = "train", what: str = "data") -> list[dict[str, Any]]:
    """The rows of a file of rows, or of a split of a hub data set; at least one.

    what: its name in messages ("pairs"). Raises FileNotFoundError or UserError, one line that names the file.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir():
        raise UserError(f"{name}: {what} must be a file ({', '.join(SUFFIXES)}), this is a folder")
    if path.exists():
        check_input(path)
        if suffix not in SUFFIXES:
            raise UserError(f"{name}: {what} must be a {', '.join(SUFFIXES)} file, got {suffix or 'no suffix'}")
        no_split(name, split)
        rows = local(path)
    elif suffix in SUFFIXES or path.is_absolute() or name.startswith((".", "~")) or not name.strip():
        raise FileNotFoundError(f"{name}: no such file of {what}")
    else:
        rows = [dict(row) for row in from_hub(name, split=split, what=what)]
    if not rows:
        raise UserError(f"{name}: contains no {what}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{name}: row {i} must be an object, got {type(row).__name__}")
    return rows


def no_split(source: str, split: str) -> None:
    """Raises UserError if another split than the default is requested for data without splits."""
    if split != "train":
        raise UserError(f"split must be left out for {source}: it is no data set of the hub, got {split!r}")


def from_hub(name: str, *, split: str, what: str) -> Any:
    """A data set by its hub name, as `datasets.Dataset`; UserError in one line if it cannot be loaded."""
    try:
        import datasets
    except ImportError:
        rule = "and a hub name needs the package 'datasets': pip install 'fastalign[trl]'"
        raise UserError(f"{name}: no such file of {what}, {rule}") from None
    if not (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir():
        check_reachable(name, "README.md", dataset=True, hint=f"no such file of {what}")
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # each builder has its own errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: no such file of {what}, and not available from the hub: {reason}") from None


def local(path: Path, columns: Callable[[list[str]], list[str]] | None = None) -> list[Any]:
    """The rows of a file with one of SUFFIXES: objects, or whatever a JSON file has instead.

    columns: which of the existing columns to read, if the format allows skipping others. Raises UserError, one line.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path, columns)
    if suffix in (".arrow", ".feather"):
        return _arrow(path, columns)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    if suffix == ".csv":
        return _csv(path, text)
    if suffix == ".json":
        rows = _parse(path, text, "") if text.strip() else []
        if not isinstance(rows, list):
            raise UserError(f"{path}: a .json file must hold a list, got {type(rows).__name__}")
        return rows
    return [_parse(path, line, f" line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parquet(path: Path, columns: Callable[[list[str]], list[str]] | None) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        return file.read(columns and columns(file.schema_arrow.names)).to_pylist()
    except UserError:  # from `columns`
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        # ValueError: bytes that are not text, dates beyond the calendar.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a Parquet file that can be read ({reason})") from None


def _arrow(path: Path, columns: Callable[[list[str]], list[str]] | None) -> list[dict[str, Any]]:
    """Arrow's file format (Feather), or its stream, in which datasets keeps its files."""
    import pyarrow as pa

    try:
        with pa.OSFile(str(path)) as file:
            try:
                table = pa.ipc.open_file(file).read_all()
            except pa.ArrowInvalid:
                file.seek(0)
                table = pa.ipc.open_stream(file).read_all()
            return (table.select(columns(table.column_names)) if columns else table).to_pylist()
    except UserError:  # from `columns`
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not an Arrow file that can be read ({reason})") from None


def _csv(path: Path, text: str) -> list[dict[str, Any]]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # the library's own limit is 131,072 characters
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV file ({error})") from None
    for i, row in enumerate(rows):
        if None in row:
            raise UserError(f"{path}: row {i} has more cells than the header has columns")
    return rows


def _parse(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}:{where} is not JSON ({error})") from None
    except RecursionError:
        raise UserError(f"{path}:{where} is nested too deep to be read as JSON") from None
