"""Rows of a data set, one after the other: a local JSONL, JSON, CSV, Parquet or Arrow file, or a hub name."""

from __future__ import annotations

import csv
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from fastalign._base.errors import UserError
from fastalign._base.files import check_input
from fastalign._base.hub import check_reachable
from fastalign._base.tables import readable

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".feather")
_TEXTS = (".jsonl", ".json", ".csv")  # also compressed by gzip, with .gz behind
# Usual names of the columns of prompts and of responses.
PROMPTS = ("prompt", "prompts", "messages", "question", "instruction", "query", "input")  # tried in this order
RESPONSES = (
    "response", "responses", "completion", "completions", "text", "texts", "output", "outputs", "answer", "generation",
    "candidate", "candidates",
)  # fmt: skip
BATCH = 1024  # rows of a table that are held at once
_BAD_CELLS = (ValueError,)  # bytes that are not text, dates beyond the calendar


class Rows:
    """Rows of a file or of a data set of the hub, as objects, read anew by each loop over them and never all held.

    A loop raises UserError, one line, for a row that is no object, and if there is none.
    """

    name: str
    what: str

    def __init__(self, name: str, what: str, begin: Callable[[], Iterator[Any]]):
        self.name, self.what, self._begin = name, what, begin

    def __iter__(self) -> Iterator[dict[str, Any]]:
        i = -1
        for i, row in enumerate(self._begin()):
            if not isinstance(row, dict):
                raise UserError(f"{self.name}: row {i} must be an object, got {type(row).__name__}")
            yield row
        if i < 0:
            raise UserError(f"{self.name}: contains no {self.what}")

    def first(self) -> dict[str, Any]:
        return next(iter(self))


def read(name_or_path: str | os.PathLike[str], *, split: str = "train", what: str = "data") -> list[dict[str, Any]]:
    """All rows that `stream` gives, at least one."""
    return list(stream(name_or_path, split=split, what=what))


def stream(name_or_path: str | os.PathLike[str], *, split: str = "train", what: str = "data") -> Rows:
    """The rows of a file of rows, or of a split of a hub data set.

    what: its name in messages ("pairs"). Raises FileNotFoundError or UserError, one line that names the file.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    suffix = suffix_of(path)
    if path.is_dir():
        raise UserError(f"{name}: {what} must be a file ({', '.join(SUFFIXES)}), this is a folder")
    if path.exists():
        check_input(path)
        if suffix not in SUFFIXES:
            raise UserError(f"{name}: {what} must be a {', '.join(SUFFIXES)} file, got {suffix or 'no suffix'}")
        no_split(name, split)
        return Rows(name, what, lambda: local(path))
    if suffix in SUFFIXES or path.is_absolute() or name.startswith((".", "~")) or not name.strip():
        raise FileNotFoundError(f"{name}: no such file of {what}")
    data = from_hub(name, split=split, what=what)
    return Rows(name, what, lambda: map(dict, data))


def suffix_of(path: Path) -> str:
    """In lower case; of a text file that gzip compressed, the suffix before .gz."""
    before, last = ["", *(suffix.lower() for suffix in path.suffixes)][-2:] if path.suffix else ("", "")
    return before if last == ".gz" and before in _TEXTS else last


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


def local(path: Path, columns: Callable[[list[str]], list[str]] | None = None) -> Iterator[Any]:
    """The rows of a file with one of SUFFIXES, one after the other (only of .json it holds all): objects, or whatever a
    JSON file has instead.

    columns: which of the existing columns to read, if the format allows skipping others. Raises UserError, one line.
    """
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return _parquet(path, columns)
    if suffix in (".arrow", ".feather"):
        return _arrow(path, columns)
    return {".csv": _csv, ".json": _json}.get(suffix, _jsonl)(path)


def _parquet(path: Path, columns: Callable[[list[str]], list[str]] | None) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with readable(path, "a Parquet", *_BAD_CELLS):
        file = pq.ParquetFile(path)
        for batch in file.iter_batches(BATCH, columns=columns and columns(file.schema_arrow.names)):
            yield from batch.to_pylist()


def _arrow(path: Path, columns: Callable[[list[str]], list[str]] | None) -> Iterator[dict[str, Any]]:
    """Arrow's file format (Feather), or its stream, in which datasets keeps its files."""
    import pyarrow as pa

    with readable(path, "an Arrow", *_BAD_CELLS), pa.memory_map(str(path)) as file:
        try:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            file.seek(0)
            batches = reader = pa.ipc.open_stream(file)
        wanted = columns and columns(reader.schema.names)
        for batch in batches:
            batch = batch.select(wanted) if wanted else batch
            for start in range(0, batch.num_rows, BATCH):
                yield from batch.slice(start, BATCH).to_pylist()


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    begin = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with begin(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error})") from None


def _jsonl(path: Path) -> Iterator[Any]:
    with _opened(path) as file:
        for i, line in enumerate(file, 1):
            if line.strip():
                yield _parse(path, line, f" line {i}")


def _json(path: Path) -> Iterator[Any]:
    with _opened(path) as file:
        text = file.read()
    rows = _parse(path, text, "") if text.strip() else []
    if not isinstance(rows, list):
        raise UserError(f"{path}: a .json file must hold a list, got {type(rows).__name__}")
    yield from rows


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    # The library's own limit is 131,072 characters; gzip makes a text 1,032 times as small at most.
    limit = max(csv.field_size_limit(), min(1100 * path.stat().st_size, 1 << 30))
    csv.field_size_limit(limit)
    with _opened(path, newline="") as file:  # the line ends within a cell are its text
        try:
            for i, row in enumerate(csv.DictReader(file)):
                if None in row:
                    raise UserError(f"{path}: row {i} has more cells than the header has columns")
                yield row
        except csv.Error as error:
            raise UserError(f"{path}: not a CSV file ({error})") from None


def _parse(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}:{where} is not JSON ({error})") from None
    except RecursionError:
        raise UserError(f"{path}:{where} is nested too deep to be read as JSON") from None
