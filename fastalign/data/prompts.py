"""Prompts: the 64 that come with fastalign, local files, and data sets by their hub name."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path

from fastalign.errors import UserError

COLUMNS = ("prompt", "text")
SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".parquet")
_BUNDLED = Path(__file__).parent / "prompts.jsonl"


def bundled(k: int | None = None) -> list[str]:
    """The prompts that come with fastalign: 64 of 8 kinds (reviews, advice, stories, provocations, ...).

    With k: a subset spread evenly over the kinds (16 has two of each), the same one every time.
    """
    by_kind: dict[str, list[str]] = {}
    for line in _BUNDLED.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_kind.setdefault(row["kind"], []).append(row["prompt"])
    prompts = [prompt for round_ in zip(*by_kind.values(), strict=True) for prompt in round_]
    if k is None:
        return prompts
    if not 1 <= k <= len(prompts):
        raise UserError(f"k must lie in 1..{len(prompts)}, the number of bundled prompts, got {k}")
    return prompts[:k]


def load(name_or_path: str | os.PathLike, *, column: str | None = None, split: str = "train") -> list[str]:
    """Prompts from "bundled", a .jsonl, .json, .csv, .txt or .parquet file, or a data set's hub name.

    column: where the prompts are; by default "prompt", else "text". A .txt file has one prompt a line, a .json
    file a list of strings or of objects. split: of a hub data set.
    Raises FileNotFoundError or UserError, one line: empty file, missing column, blank prompt and its place.
    """
    name = os.fspath(name_or_path)
    if name == "bundled":
        return bundled()
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir():
        raise UserError(f"{name}: prompts must be a file ({', '.join(SUFFIXES)}), this is a folder")
    if not path.is_file():
        if suffix in SUFFIXES or path.is_absolute() or name.startswith((".", "~")):
            raise FileNotFoundError(f"{name}: no such prompt file")
        return _checked(name, _from_hub(name, column, split))
    if suffix not in SUFFIXES:
        raise UserError(f"{name}: prompts must be a {', '.join(SUFFIXES)} file, got {suffix or 'no suffix'}")
    try:
        rows = _read(path, suffix, column)
    except UnicodeDecodeError:
        raise UserError(f"{name}: not a text file in UTF-8") from None
    return _checked(name, rows)


def _read(path: Path, suffix: str, column: str | None) -> list:
    if suffix == ".parquet":
        return _from_parquet(path, column)
    text = path.read_text(encoding="utf-8-sig")
    if suffix == ".txt":
        return text.removesuffix("\n").split("\n") if text else []
    if suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""))
        if not text.strip():
            return []
        wanted = _column(path, rows.fieldnames or (), column)
        return [row[wanted] for row in rows]
    if suffix == ".json":
        rows = _parse(path, text, "") if text.strip() else []
        if not isinstance(rows, list):
            raise UserError(f"{path}: a .json prompt file must hold a list, got {type(rows).__name__}")
    else:
        lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [_parse(path, line, f" line {i}") for i, line in lines]
    return [row if isinstance(row, str) else _field(path, i, row, column) for i, row in enumerate(rows)]


def _parse(path: Path, text: str, where: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}:{where} is not JSON ({error})") from None


def _field(path: Path, i: int, row: object, column: str | None) -> object:
    if not isinstance(row, dict):
        raise UserError(f"{path}: entry {i} must be a string or an object, got {type(row).__name__}")
    return row[_column(path, row, column)]


def _column(source: object, columns: Iterable[str], column: str | None) -> str:
    columns = list(columns)
    for name in (column,) if column else COLUMNS:
        if name in columns:
            return name
    rule = repr(column) if column else " or ".join(map(repr, COLUMNS))
    raise UserError(f"{source}: must have a column {rule}, got {', '.join(map(str, columns)) or 'none'}")


def _from_parquet(path: Path, column: str | None) -> list:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        wanted = _column(path, file.schema_arrow.names, column)
        return file.read([wanted])[wanted].to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a Parquet file that can be read ({reason})") from None


def _from_hub(name: str, column: str | None, split: str) -> list:
    try:
        import datasets
    except ImportError:
        rule = "and a hub name needs the package 'datasets': pip install fastalign[trl]"
        raise UserError(f"{name}: no such prompt file, {rule}") from None
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # each builder has its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: no such prompt file, and not to be had from the hub: {reason}") from None
    return list(rows[_column(name, rows.column_names, column)])


def _checked(source: str, prompts: list) -> list[str]:
    if not prompts:
        raise UserError(f"{source}: holds no prompts")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{source}: prompt {i} must be a string that is not blank, got {prompt!r}")
    return prompts
