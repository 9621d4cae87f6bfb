"""Tables in files, in the format that the name's ending says: Parquet (also without an ending) and Arrow, which keep a
note of how they were made, or CSV and JSON Lines, which other programs read and which keep none."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign._base import files
from fastalign._base.errors import UserError
from fastalign._base.files import atomic_write

if TYPE_CHECKING:
    import pyarrow as pa

NOTED = (".parquet", ".arrow", ".feather")
ENDINGS = (*NOTED, ".csv", ".jsonl")
_NOTE = b"fastalign"  # its name in a schema's metadata


def check_ending(path: str | os.PathLike[str], *, noted: bool = False) -> None:
    """Raise UserError, one line, for an output with another ending. noted: only those that keep a note."""
    files.check_ending("out", path, NOTED if noted else ENDINGS)


def keeps_note(path: str | os.PathLike[str]) -> bool:
    """Whether files of this name keep a note."""
    return _ending(path) in ("", *NOTED)


def has_note(path: str | os.PathLike[str]) -> bool:
    """Whether it is a Parquet or Arrow file, whatever its name, with a note of fastalign's."""
    return _note(Path(path)) is not None


def note(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The note of such a file, a JSON object; {} for any other file."""
    try:
        content = json.loads(_note(Path(path)) or b"{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def read(path: Path) -> pa.Table:
    """A Parquet or Arrow file. Raises UserError, one line."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if _begins(path, b"ARROW1"):
        with readable(path, "an Arrow"), pa.OSFile(os.fspath(path)) as file:
            return pa.ipc.open_file(file).read_all()
    with readable(path, "a Parquet"):
        return pq.read_table(path, partitioning=None)


@contextmanager
def readable(path: Path, kind: str, *also: type[Exception]) -> Iterator[None]:
    """Arrow's error, or one of `also`, for a file that it cannot read, as one line that names the file. kind: "a
    Parquet" or "an Arrow"."""
    import pyarrow as pa

    try:
        yield
    except UserError:  # the caller's own
        raise
    except (pa.ArrowException, OSError, *also) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not {kind} file that can be read ({reason})") from None


def write(path: str | os.PathLike[str], table: pa.Table, content: Mapping[str, Any]) -> None:
    """Write a Parquet or Arrow file with a note of this content, completely or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = table.replace_schema_metadata({_NOTE: json.dumps(content, ensure_ascii=False).encode()})
    with atomic_write(path) as beside:
        if _ending(path) in (".arrow", ".feather"):
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            with pa.OSFile(os.fspath(beside), "wb") as file:
                with pa.ipc.new_file(file, table.schema, options=options) as writer:
                    writer.write_table(table)
        else:
            pq.write_table(table, beside, compression="zstd")


def write_plain(path: str | os.PathLike[str], columns: Mapping[str, Sequence[Any]]) -> None:
    """Write a CSV or JSON Lines file, completely or not at all. columns: of equal length, values of JSON."""
    rows = zip(*columns.values(), strict=True)
    with atomic_write(path) as beside, open(beside, "w", encoding="utf-8", newline="") as file:
        if _ending(path) == ".csv":
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)
        else:
            names = list(columns)
            file.writelines(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)


def _ending(path: str | os.PathLike[str]) -> str:
    return Path(path).suffix.lower()


def _begins(path: Path, mark: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(mark)) == mark


def _note(path: Path) -> bytes | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if _begins(path, b"PAR1"):
            return (pq.read_schema(path).metadata or {}).get(_NOTE)
        if _begins(path, b"ARROW1"):
            with pa.OSFile(os.fspath(path)) as file:
                return (pa.ipc.open_file(file).schema.metadata or {}).get(_NOTE)
    except (pa.ArrowException, OSError):  # its reader says what is wrong with it
        pass
    return None
