"""A folder for a job's finished parts: marked as ours, locked by one run at a time; only our own files are ever
removed.

The mark is a file of JSON lines that serves as the folder's ledger: the job, then each file before it is written (so
that a killed run's leftovers are recognised) and again when it is complete, with its digest. A folder or link of that
name without a mark belongs to somebody else: it is neither emptied nor followed nor taken over.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastalign._base.errors import UserError
from fastalign._base.files import become, flushes

MARK = ".fastalign-work"
_KIND = "work folder"
# files.atomic_write's name, and soup/outputs.py's.
_HALF = re.compile(r"\.(?P<whole>.+)\.\d+\.partial|(?P<other>.+)\.partial")


class WorkFolder:
    """A folder locked by this process: see `hold`. job: the job it was started for, None if it is new."""

    path: Path
    job: dict[str, Any] | None

    def __init__(self, path: Path, mark: int):
        self.path, self._mark = path, mark
        self.job, self._files = _read(mark, path)

    def begin(self, job: Mapping[str, Any], *, anew: bool = False) -> None:
        """Continue `job`; files of another job (with `anew`, of any job) are removed."""
        begun: dict[str, Any] = json.loads(json.dumps(dict(job)))
        if self.job != begun or anew:
            self.clear()
            os.ftruncate(self._mark, 0)
            self.job = begun
            self._write({"kind": _KIND, "job": begun})
        for path in self._there():
            if self._name(path) not in self._files:  # half a file
                path.unlink()

    def making(self, name: str) -> Path:
        """The path of a file about to be written; its folder is created."""
        self._files[name] = {}
        self._write({"file": name})
        path = self.path / name
        if path.parent != self.path and (path.parent.is_symlink() or not path.parent.is_dir()):
            path.parent.mkdir()
        return path

    def made(self, digests: Mapping[str, str], note: Any = None) -> None:
        """Marks files as complete. note: JSON stored with each."""
        made = {name: {"digest": digest, "note": note} for name, digest in digests.items()}
        self._files |= made
        self._write(*({"file": name, **row} for name, row in made.items()), sync=flushes())

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the finished files at the time they were completed."""
        return {name: row["digest"] for name, row in self._files.items() if "digest" in row}

    def note(self, name: str) -> Any:
        """The note given to `made`."""
        return self._files[name].get("note")

    def whole(self) -> list[Path]:
        """The finished files that are unchanged (their digest equals `sha256`), in the order of their names."""
        entries = ((self.path / name, digest) for name, digest in sorted(self.digests.items()))
        return [path for path, digest in entries if path.is_file() and sha256(path) == digest]

    def foreign(self) -> list[Path]:
        """Files in the folder that are not ours."""
        ours = {*self._there(), self.path / MARK, *((self.path / name).parent for name in self._files)}
        return sorted(path for path in self.path.rglob("*") if path not in ours)

    def clear(self) -> None:
        """Remove our files, and our folders that are then empty."""
        for path in self._there():
            path.unlink()
        for folder in {(self.path / name).parent for name in self._files} - {self.path}:
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
        self._files = {}

    def remove(self) -> None:
        """`clear`, and remove the folder if it is then empty."""
        self.clear()
        (self.path / MARK).unlink()
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def become(self, target: Path) -> None:
        """Rename the folder to `target`, replacing an existing folder."""
        become(self.path, target)
        (target / MARK).unlink()

    def _name(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def _there(self) -> list[Path]:
        """Our existing files, complete and incomplete; links to other folders are not followed."""
        folders = {(self.path / name).parent for name in self._files}
        existing = []
        for folder in folders:
            if folder != self.path and folder.is_symlink():
                continue
            for path in folder.iterdir() if folder.is_dir() else ():
                half = _HALF.fullmatch(path.name)
                whole = path.with_name(half["whole"] or half["other"]) if half else path
                if {self._name(path), self._name(whole)} & self._files.keys() and (path.is_symlink() or path.is_file()):
                    existing.append(path)
        return existing

    def _write(self, *rows: Mapping[str, Any], sync: bool = False) -> None:
        data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        try:
            if os.write(self._mark, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if sync:
                os.fsync(self._mark)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path / MARK)) from None


@contextmanager
def hold(path: Path, *, writes: Path, what: str = "run", keeps: str | None = None) -> Iterator[WorkFolder]:
    """The work folder at `path`, created if needed and locked against other runs. writes, what: the output that it is
    for, and what writes it. keeps: what its finished files are, if the same job resumes from them; shown on an
    interrupt.

    An empty folder is removed afterwards, with the parents created for it. Raises UserError, one line, if another run
    has it locked, or if it is not ours.
    """
    above = list(itertools.takewhile(lambda folder: not folder.exists(), path.parents))
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        if path.is_symlink() or not path.is_dir():
            raise _not_ours(path) from None
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if not _locked(folder, path):
            raise UserError(f"{writes}: another {what} is writing it")
        mark = _open_mark(path)
        try:
            work = WorkFolder(path, mark)
            yield work
        except KeyboardInterrupt as stopped:
            if keeps and work.digests and not stopped.args:
                stopped.args = (f"interrupted; finished {keeps} are kept, and the same command resumes from them",)
            raise
        finally:
            os.close(mark)
            if _is(folder, path) and [one.name for one in path.iterdir()] == [MARK]:
                (path / MARK).unlink()
                path.rmdir()
                with suppress(OSError):  # not empty: it stays
                    for one in above:
                        one.rmdir()
    finally:
        os.close(folder)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _locked(folder: int, path: Path) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return _is(folder, path)  # otherwise the other run has finished and removed the folder


def _is(folder: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(folder), os.stat(path))
    except FileNotFoundError:
        return False


def _open_mark(path: Path) -> int:
    mark = path / MARK
    marked = mark.is_file() and not mark.is_symlink()
    if not marked and any(path.iterdir()):
        raise _not_ours(path)
    return os.open(mark, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)


def _read(mark: int, path: Path) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The job (None if there is none yet) and the files."""
    with open(mark, "rb", closefd=False) as file:
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]  # the last line may be cut off in the middle
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        if (rows and rows[0]["kind"] != _KIND) or (not rows and sum(1 for _ in path.iterdir()) > 1):
            raise ValueError
        files = {row["file"]: {key: row[key] for key in ("digest", "note") if key in row} for row in rows[1:]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _not_ours(path) from None
    os.ftruncate(mark, len(whole))
    return rows[0]["job"] if rows else None, {name: row for name, row in files.items() if _plain(name)}


def _plain(name: str) -> bool:
    """Whether it is the name of a file inside the folder; a ledger may have been written by anyone."""
    parts = Path(name).parts if isinstance(name, str) else ()
    return 1 <= len(parts) <= 2 and not os.path.isabs(name) and ".." not in parts and "\0" not in name


def _not_ours(path: Path) -> UserError:
    return UserError(
        f"{path}: is the folder for unfinished work, and is not fastalign's: move it or choose another output"
    )
