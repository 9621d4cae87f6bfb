"""Protects existing files from a command's outputs: an input is never replaced, other results only on request.

A finished output contains a record of its job (`Job.record`: JSON under "made", tables in their note). A second run
of the same job reuses it; another job is refused before anything is read or computed.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastalign._base import fingerprint, tables
from fastalign._base.errors import UserError
from fastalign._base.files import STDOUT, check_folder, check_target, write_json
from fastalign._base.work_folder import sha256

FINGERPRINTS = ("model_content", "contents")
_SAY: ContextVar[Callable[[str], None] | None] = ContextVar("say", default=None)
_ASK: ContextVar[Callable[[str], bool] | None] = ContextVar("ask", default=None)


@dataclass(frozen=True)
class Job:
    """Everything that determines an output. settings: JSON values. inputs: files, folders, or hub names, by role."""

    command: str
    inputs: Mapping[str, str | os.PathLike[str]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The record stored in outputs: inputs by their content."""
        digests = {name: _digest(path) for name, path in self.inputs.items()}
        return json.loads(json.dumps({"command": self.command, "inputs": digests, **self.settings}))


def claim(
    out: str | os.PathLike[str],
    job: Job,
    *,
    overwrite: bool = False,
    files: Sequence[Path] = (),
    figures: Path | None = None,
) -> dict[str, Any] | None:
    """The job's record if `out` has to be made; None if it exists already, made by this job.

    files, figures: written together with it, files and a folder of SVG and PNG; their digests go into the record
    (`making`). Raises UserError, one line, if one of them is an input, is not a file, or exists from another job and
    may not be overwritten.
    """
    out = Path(out)
    targets = [*([out] if str(out) != STDOUT else []), *files]
    if figures is not None:
        check_folder(figures)
    for path in targets:
        check_target(path)
    for path in [*targets, *([figures] if figures else [])]:
        not_an_input(path, job.inputs.values())
    record, had = job.record(), recorded(out)
    if overwrite:
        return record
    if had is None and out in targets and out.exists():
        raise _not_this_commands(out)
    if had is not None:
        check_same_job(out, had, record)
    recorded_files = (had or {}).get("companions", {})
    there = _existing(files, figures)
    if had is not None and had.get("unfinished"):
        return record
    for name, path in there.items():
        if recorded_files.get(name) != sha256(path):
            raise UserError(f"{path}: exists, and is not what this command wrote; --overwrite replaces it")
    whole = all(path.exists() for path in files) and recorded_files.keys() <= there.keys()
    if (
        had is None
        or not whole
        or (figures and not any(name.startswith(f"{figures.name}/") for name in recorded_files))
    ):
        return record
    say_already_there(out)
    return None


def check_same_job(out: str | os.PathLike[str], had: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError, one line, if what is at `out` has the record of another job."""
    if name := differing(had, wanted):
        made = "of other inputs" if name == "inputs" else f"with {name}={had.get(name)!r}, not {wanted.get(name)!r}"
        raise UserError(f"{out}: exists, made {made}; --overwrite replaces it")


def say_already_there(out: str | os.PathLike[str]) -> None:
    say(f"{out}: already there, made by the same command from the same inputs")


@contextmanager
def making(
    out: str | os.PathLike[str],
    value: dict[str, Any],
    record: Mapping[str, Any],
    *,
    files: Sequence[Path] = (),
    figures: Path | None = None,
) -> Iterator[None]:
    """Write the object `value` with its record as JSON at `out`; the block writes the accompanying files, whose digests
    are then added. The record identifies what an interrupted run left."""
    if (files or figures) and str(out) != STDOUT:
        write_json(out, {**value, "made": {**record, "unfinished": True}})
    yield
    digests = {name: sha256(path) for name, path in _existing(files, figures).items()}
    value["made"] = {**record, "companions": digests} if digests else dict(record)
    write_json(out, value)


def _existing(files: Sequence[Path], figures: Path | None) -> dict[str, Path]:
    """The existing ones of these files, by their names in a record."""
    existing = {path.name: path for path in files if path.exists()}
    if figures is not None and figures.is_dir():
        existing |= {
            f"{figures.name}/{path.name}": path for path in figures.iterdir() if path.suffix in (".svg", ".png")
        }
    return existing


def differing(
    had: Mapping[str, Any], wanted: Mapping[str, Any], ignored: Collection[str] = ("companions", "unfinished")
) -> str | None:
    """The first name under which two records have different values."""
    names = (name for name in {**had, **wanted} if name not in ignored)
    return next((name for name in names if had.get(name) != wanted.get(name)), None)


def check_same(
    where: str | os.PathLike[str],
    had: Mapping[str, Any] | None,
    wanted: Mapping[str, Any],
    *,
    knobs: Collection[str] = (),
    otherwise: str = "another output, or --overwrite",
) -> None:
    """Raises UserError, one line, unless a run at `where` had the same settings as this one.

    had: JSON values; None if something else is there. "model_content" is the fingerprint of "model", which may be at
    another path; "contents" maps names to fingerprints. knobs: names that may differ.
    """
    if had is None:
        raise _not_this_commands(where)
    wanted = json.loads(json.dumps(wanted, default=str))  # tuples and the like as the file has them
    ignored = {*knobs, *(name for name in FINGERPRINTS if name not in had)}  # earlier versions kept none
    if had.get("model_content") == wanted.get("model_content") is not None:
        ignored.add("model")
    if (name := differing(had, wanted, ignored)) is None:
        return
    if name in FINGERPRINTS:
        raise UserError(
            f"{where} was made with a model or reward whose files have changed since: use those to resume, {otherwise}"
        )
    made = f"{name}={had.get(name)!r}, this run has {wanted.get(name)!r}"
    raise UserError(f"{where} was made with {made}: use the same settings to resume, {otherwise}")


def recorded(path: str | os.PathLike[str], key: str = "made") -> dict[str, Any] | None:
    """The record of its job in a JSON, Parquet or Arrow file, under `key`; None if there is no file or no record."""
    path = Path(path)
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            is_table = file.read(4) in (b"PAR1", b"ARRO")
        content = tables.note(path) if is_table else json.loads(path.read_text(encoding="utf-8"))
        made = content.get(key)
    except Exception:  # a file of any other kind: it is not ours
        return None
    return made if isinstance(made, dict) else None


def not_an_input(out: str | os.PathLike[str], inputs: Iterable[Any], *, folder: bool = False) -> None:
    """Raises UserError if `out` is one of these files or folders, through any link, or is inside one of the folders.
    The base of an input that is an adapter is an input too.

    folder: `out` is a folder of the command's own, so no input may be inside it either."""
    there = os.stat(out) if os.path.exists(out) else None
    for path in [path for given in inputs for path in _with_base(given)]:
        try:
            status = os.stat(path)
        except (OSError, TypeError, ValueError):
            continue  # a name, not a file
        if there is not None and os.path.samestat(there, status):
            raise UserError(f"{out}: is an input, and cannot be the output")
        if there is not None and there.st_nlink > 1 and stat.S_ISREG(there.st_mode) and os.path.isdir(path):
            names = (one.path for one in os.scandir(path) if one.is_file())
            if name := next((name for name in names if os.path.samestat(os.stat(name), there)), None):
                raise UserError(f"{out}: is {name}, of an input, and cannot be the output")
        inner, outer = Path(os.path.realpath(out)), Path(os.path.realpath(path))
        if os.path.isdir(path) and inner.is_relative_to(outer):
            raise UserError(f"{out}: lies in {path}, an input, and cannot be the output")
        if folder and outer.is_relative_to(inner):
            raise UserError(f"{out}: {path}, an input, lies in it, so it cannot be the output's folder")


def _with_base(path: Any) -> list[Any]:
    try:
        base = fingerprint.base_of(Path(path))
    except (OSError, TypeError, ValueError, UserError):  # not a path, or not a readable adapter
        base = None
    return [path] if base is None else [path, os.path.expanduser(base)]


@contextmanager
def reporting_to(line: Callable[[str], None], ask: Callable[[str], bool] | None = None) -> Iterator[None]:
    """Within it, `say` calls `line` and `ask` calls the given function: commands show messages that Python callers get
    by `logging`, under the name fastalign."""
    tokens = _SAY.set(line), _ASK.set(ask)
    try:
        yield
    finally:
        _SAY.reset(tokens[0])
        _ASK.reset(tokens[1])


def say(line: str) -> None:
    if (to := _SAY.get()) is not None:
        to(line)
    else:
        logging.getLogger("fastalign").info(line)


def ask(question: str) -> bool:
    """Whether a user is present and answers yes."""
    return (to := _ASK.get()) is not None and to(question)


def _digest(path: str | os.PathLike[str]) -> str:
    local = Path(os.fspath(path)).expanduser()
    return sha256(local) if local.is_file() else fingerprint.of_model(path)


def _not_this_commands(path: str | os.PathLike[str]) -> UserError:
    if Path(path).suffix.lower() in (".csv", ".jsonl"):
        return UserError(f"{path}: exists, and such a file does not say how it was made; --overwrite replaces it")
    return UserError(f"{path}: exists, and is not this command's; --overwrite replaces it")
