"""What a command is about to write, held against what is there: an input is never replaced, other work only when told
to.

A finished output says in itself what job made it (`Job.record`: JSON under "made", Parquet in its metadata). A second
run of the same job takes it as it is; one of another job is refused before anything is read or computed.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastalign._base import fingerprint
from fastalign._base.errors import UserError
from fastalign._base.files import STDOUT, check_folder, check_target, write_json
from fastalign._base.work_folder import sha256

FINGERPRINTS = ("model_content", "contents")
_SAY: ContextVar[Callable[[str], None] | None] = ContextVar("say", default=None)
_ASK: ContextVar[Callable[[str], bool] | None] = ContextVar("ask", default=None)


@dataclass(frozen=True)
class Job:
    """What makes an output what it is. settings: JSON values. inputs: files, folders, or names of a hub, by what they
    are to it."""

    command: str
    inputs: Mapping[str, str | os.PathLike[str]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As outputs keep it: inputs by their content."""
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
    """The job's record where `out` is to be made; None where it is there already, as this job made it.

    files, figures: what is written with it, files and a folder of SVG and PNG; their digests go into the record
    (`making`). Raises UserError, one line: one of them is an input, or no file, or there and not this job's and not
    to be overwritten.
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
        raise UserError(f"{out}: exists, and is not this command's; --overwrite replaces it")
    if had is not None and (name := differing(had, record)):
        made = "of other inputs" if name == "inputs" else f"with {name}={had.get(name)!r}, not {record.get(name)!r}"
        raise UserError(f"{out}: exists, made {made}; --overwrite replaces it")
    held = (had or {}).get("companions", {})
    there = _companions(files, figures)
    if had is not None and had.get("unfinished"):
        return record
    for name, path in there.items():
        if held.get(name) != sha256(path):
            raise UserError(f"{path}: exists, and is not what this command wrote; --overwrite replaces it")
    whole = all(path.exists() for path in files) and held.keys() <= there.keys()
    if had is None or not whole or (figures and not any(name.startswith(f"{figures.name}/") for name in held)):
        return record
    say(f"{out}: there already, made by the same command of the same inputs")
    return None


@contextmanager
def making(
    out: str | os.PathLike[str],
    value: dict[str, Any],
    record: Mapping[str, Any],
    *,
    files: Sequence[Path] = (),
    figures: Path | None = None,
) -> Iterator[None]:
    """Write the object `value` with its record as JSON at `out`, what goes with it in the block, and then the digests
    of that. What an interrupted one left is known again by the record."""
    if (files or figures) and str(out) != STDOUT:
        write_json(out, {**value, "made": {**record, "unfinished": True}})
    yield
    digests = {name: sha256(path) for name, path in _companions(files, figures).items()}
    value["made"] = {**record, "companions": digests} if digests else dict(record)
    write_json(out, value)


def _companions(files: Sequence[Path], figures: Path | None) -> dict[str, Path]:
    """Those that are there, by the names under which a record has them."""
    found = {path.name: path for path in files if path.exists()}
    if figures is not None and figures.is_dir():
        found |= {f"{figures.name}/{path.name}": path for path in figures.iterdir() if path.suffix in (".svg", ".png")}
    return found


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
    """Raises UserError, one line, unless a run at `where` was of the settings that this one asks for.

    had: JSON values; None where something else is there. "model_content" is the fingerprint of "model", which is the
    same model wherever it lies; "contents" maps names to fingerprints. knobs: names that may differ.
    """
    if had is None:
        raise UserError(f"{where}: exists, and is not this command's; --overwrite replaces it")
    wanted = json.loads(json.dumps(wanted, default=str))  # tuples and the like as the file has them
    ignored = {*knobs, *(name for name in FINGERPRINTS if name not in had)}  # earlier versions kept none
    if had.get("model_content") == wanted.get("model_content") is not None:
        ignored.add("model")
    if (name := differing(had, wanted, ignored)) is None:
        return
    if name in FINGERPRINTS:
        raise UserError(
            f"{where} was made with a model whose files have changed since: use those to go on, {otherwise}"
        )
    made = f"{name}={had.get(name)!r}, this run asks for {wanted.get(name)!r}"
    raise UserError(f"{where} was made with {made}: use the same settings to go on, {otherwise}")


def recorded(path: str | os.PathLike[str], key: str = "made") -> dict[str, Any] | None:
    """What a JSON or Parquet file says, under `key`, of the job that made it; None where it is not there or says
    nothing of the kind."""
    path = Path(path)
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            head = file.read(4)
        if head == b"PAR1":
            import pyarrow.parquet as pq

            held = json.loads((pq.read_schema(path).metadata or {}).get(b"fastalign", b"{}"))
        else:
            held = json.loads(path.read_text(encoding="utf-8"))
        made = held.get(key)
    except Exception:  # whatever a stranger's file is: it is not ours
        return None
    return made if isinstance(made, dict) else None


def not_an_input(out: str | os.PathLike[str], inputs: Iterable[Any], *, folder: bool = False) -> None:
    """Raises UserError where `out` is one of these files or folders, by any link, or lies in one of the folders.

    folder: `out` is one that is wholly the command's own, so that no input may lie in it either."""
    there = os.stat(out) if os.path.exists(out) else None
    for path in inputs:
        try:
            found = os.stat(path)
        except (OSError, TypeError, ValueError):
            continue  # a name, and no file
        if there is not None and os.path.samestat(there, found):
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


@contextmanager
def said_by(line: Callable[[str], None], asked: Callable[[str], bool] | None = None) -> Iterator[None]:
    """Within it `say` calls `line`: what a command shows, and Python's callers do not see; and `ask` calls `asked`."""
    tokens = _SAY.set(line), _ASK.set(asked)
    try:
        yield
    finally:
        _SAY.reset(tokens[0])
        _ASK.reset(tokens[1])


def say(line: str) -> None:
    if (to := _SAY.get()) is not None:
        to(line)


def ask(question: str) -> bool:
    """Whether somebody is there to answer, and says yes."""
    return (to := _ASK.get()) is not None and to(question)


def _digest(path: str | os.PathLike[str]) -> str:
    found = Path(os.fspath(path)).expanduser()
    return sha256(found) if found.is_file() else fingerprint.of_model(path)
