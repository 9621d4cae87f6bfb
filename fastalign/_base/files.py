"""Atomic writes: a file is written beside the target, flushed to disk, then renamed over it."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from fastalign._base.errors import UserError

STDOUT = "-"  # as the path of a JSON file
JSON, HTML = (".json",), (".html", ".htm")  # endings
_FLUSHES: ContextVar[bool] = ContextVar("flushes", default=True)


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary path (file or folder, yours to create) that becomes `path` when the block succeeds.

    A link stays, and its target is replaced; a file's permissions stay. On an error or an interrupt the temporary is
    removed and `path` is unchanged. Raises UserError unless `path` is a file, absent or an empty folder (or, with
    `replace`, any folder, which is removed with its contents). An OSError without a file name gets `path`.
    """
    target = Path(os.path.realpath(path))
    status = _status(path)
    if status is not None and not (stat.S_ISDIR(status.st_mode) and (replace or not any(target.iterdir()))):
        check_target(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield beside
        if status is not None and not beside.is_dir():
            check_target(path)
            os.chmod(beside, stat.S_IMODE(status.st_mode))
        _sync(beside)
        become(beside, target)
        sync(target.parent)
    except OSError as error:
        other = error.filename is not None and not Path(os.fsdecode(error.filename)).is_relative_to(beside)
        if error.errno is None or other:
            raise
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), str(path)) from error
    except Exception as error:
        if (failed := write_error(error, path)) is not None:
            raise failed from error
        raise
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)


def write_error(error: BaseException, path: str | os.PathLike[str]) -> OSError | None:
    """The OSError, with `path`, behind an error of safetensors' or torch's writer; None if a system error did not cause
    it."""
    text = str(error)
    if match := re.search(r"\(os error (\d+)\)", text):
        return OSError(int(match[1]), os.strerror(int(match[1])), str(path))
    if "inline_container.cc" in text or "PytorchStreamWriter failed" in text:  # torch does not say why
        return OSError(errno.EIO, "cannot be written; the disk may be full", str(path))
    return None


def become(beside: Path, target: Path) -> None:
    """Rename a file or folder; an existing folder of the new name is removed once the new one is in place."""
    if not (beside.is_dir() and target.is_dir()):
        os.replace(beside, target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    os.replace(target, old)
    os.replace(beside, target)
    shutil.rmtree(old, ignore_errors=True)


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises UserError, one line, if `path` exists and is not a file, or if its folder cannot be written; long jobs
    check this before they start."""
    status = _status(path)
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: must be a file or absent, it is {_kind(status)}")
    _check_writable(path, Path(os.path.realpath(path)).parent)


def check_ending(name: str, path: str | os.PathLike[str], endings: Sequence[str]) -> None:
    """Raise UserError, one line, for an output whose name says another format than those that are written. name: of the
    argument. A path without an ending says none."""
    ending = Path(path).suffix.lower()
    if ending and ending not in endings:
        raise UserError(f"{name} must end in {' or '.join(endings)}, got {os.fspath(path)!r}")


def check_input(path: str | os.PathLike[str]) -> None:
    """Raises FileNotFoundError or UserError, one line, if `path` is not a readable file."""
    if not Path(path).is_file():
        status = _status(path)
        if status is None:
            raise FileNotFoundError(f"{path}: no such file")
        raise UserError(f"{path}: must be a file, this is {_kind(status)}")


def check_folder(path: str | os.PathLike[str]) -> None:
    """The same for a path that must be a folder or absent."""
    status = _status(path)
    if status is not None and not stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path}: must be a folder, this is {_kind(status)}")
    _check_writable(path, Path(os.path.realpath(path)))


def _check_writable(path: str | os.PathLike[str], folder: Path) -> None:
    """folder: the folder in which `path` will be written."""
    nearest = nearest_folder(folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written, {nearest} is {'read-only' if nearest.is_dir() else 'no folder'}")


def nearest_folder(folder: Path) -> Path:
    """The folder itself, or its nearest existing parent."""
    folder = folder.absolute()
    return next(one for one in (folder, *folder.parents) if one.exists())


def _kind(status: os.stat_result) -> str:
    kinds = {stat.S_ISREG: "a file", stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket"}
    return next((name for is_kind, name in kinds.items() if is_kind(status.st_mode)), "a device")


def _status(path: str | os.PathLike[str]) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in it
        return None


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically; to stdout if the path is "-". NaN and infinities are refused, because
    JSON has none."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    if str(path) == STDOUT:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str], *, kind: str | None = None) -> Any:
    """Read a JSON file; with `kind`, it must be an object whose "kind" is that.

    Raises FileNotFoundError or UserError with one line that names the file.
    """
    path = Path(path)
    check_input(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deep to be read as JSON") from None
    if kind is not None and not (isinstance(value, dict) and value.get("kind") == kind):
        came = value.get("kind") if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{path}: must be a fastalign {kind} file, got kind {came!r}")
    return value


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """The "kind" of a JSON file of ours; None for any other file."""
    try:
        value = read_json(path)
    except (UserError, OSError, UnicodeDecodeError):
        return None
    kind = value.get("kind") if isinstance(value, dict) else None
    return kind if isinstance(kind, str) else None


@contextmanager
def unflushed() -> Iterator[None]:
    """Disables flushing within it; the operating system writes the data later."""
    token = _FLUSHES.set(False)
    try:
        yield
    finally:
        _FLUSHES.reset(token)


def flushes() -> bool:
    return _FLUSHES.get()


def _sync(path: Path) -> None:
    if path.is_dir():
        for child in path.rglob("*"):
            if child.is_file():
                sync(child)
    sync(path)


def sync(path: Path) -> None:
    """Flush one file, or a folder's entries, to the disk."""
    if not flushes():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
