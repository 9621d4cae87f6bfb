"""A folder for what a job has finished so far: marked as ours, held by one run at a time, emptied of nothing but our
files.

The mark is a file of JSON lines, and the folder's ledger: what job it is for, then each file before it is made (so
that what a killed run left is known for ours) and again when it is whole, with its digest. A folder or link of that
name without a mark is somebody else's: it is neither emptied nor followed nor taken over.
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
    """A folder that this process holds: see `hold`. job: what it was begun for, None where it is new."""

    path: Path
    job: dict[str, Any] | None

    def __init__(self, path: Path, mark: int):
        self.path, self._mark = path, mark
        self.job, self._files = _read(mark, path)

    def begin(self, job: Mapping[str, Any], *, anew: bool = False) -> None:
        """Go on with `job`; the files of another job, or with `anew` of any, are removed."""
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
        """The path of a file that is about to be made; the folder that it lies in is made."""
        self._files[name] = {}
        self._write({"file": name})
        path = self.path / name
        if path.parent != self.path and (path.parent.is_symlink() or not path.parent.is_dir()):
            path.parent.mkdir()
        return path

    def made(self, digests: Mapping[str, str], note: Any = None) -> None:
        """Files are whole. note: JSON that is kept with each."""
        made = {name: {"digest": digest, "note": note} for name, digest in digests.items()}
        self._files |= made
        self._write(*({"file": name, **row} for name, row in made.items()), sync=flushes())

    @property
    def digests(self) -> dict[str, str]:
        """Of the finished files, when they were made."""
        return {name: row["digest"] for name, row in self._files.items() if "digest" in row}

    def note(self, name: str) -> Any:
        """What `made` was given beside the digest."""
        return self._files[name].get("note")

    def whole(self) -> list[Path]:
        """The finished files that are there as they were made, where their digests are `sha256`'s; in the order of
        their names."""
        held = ((self.path / name, digest) for name, digest in sorted(self.digests.items()))
        return [path for path, digest in held if path.is_file() and sha256(path) == digest]

    def foreign(self) -> list[Path]:
        """What lies in the folder and is not ours."""
        ours = {*self._there(), self.path / MARK, *((self.path / name).parent for name in self._files)}
        return sorted(path for path in self.path.rglob("*") if path not in ours)

    def clear(self) -> None:
        """Remove the files that we made, and our folders that are empty then."""
        for path in self._there():
            path.unlink()
        for folder in {(self.path / name).parent for name in self._files} - {self.path}:
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
        self._files = {}

    def remove(self) -> None:
        """`clear`, and the folder goes where nothing else is in it."""
        self.clear()
        (self.path / MARK).unlink()
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def become(self, target: Path) -> None:
        """The folder becomes `target`, in the place of a folder that is there."""
        become(self.path, target)
        (target / MARK).unlink()

    def _name(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def _there(self) -> list[Path]:
        """Our files, whole and half, that are there; a link to another folder is not looked into."""
        folders = {(self.path / name).parent for name in self._files}
        found = []
        for folder in folders:
            if folder != self.path and folder.is_symlink():
                continue
            for path in folder.iterdir() if folder.is_dir() else ():
                half = _HALF.fullmatch(path.name)
                whole = path.with_name(half["whole"] or half["other"]) if half else path
                if {self._name(path), self._name(whole)} & self._files.keys() and (path.is_symlink() or path.is_file()):
                    found.append(path)
        return found

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
    """The work folder at `path`, made where it is not there, held against other runs. writes, what: the output that
    it is for, and what writes it. keeps: what its finished files are, where the same job goes on from them: who
    interrupts it is told.

    A folder in which nothing was made is gone afterwards, with those above it that were made for it. Raises UserError,
    one line: another run holds it, or it is not ours.
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
                stopped.args = (f"interrupted; finished {keeps} are kept, and the same command goes on from them",)
            raise
        finally:
            os.close(mark)
            if _is(folder, path) and [one.name for one in path.iterdir()] == [MARK]:
                (path / MARK).unlink()
                path.rmdir()
                with suppress(OSError):  # what is in use stays
                    for one in above:
                        one.rmdir()
    finally:
        os.close(folder)


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _locked(folder: int, path: Path) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return _is(folder, path)  # else whoever held it has finished, and the folder is gone


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
    """The job, None where there is none yet, and the files."""
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
    """Whether it names a file in the folder or below it: anyone may have written what a ledger says."""
    parts = Path(name).parts if isinstance(name, str) else ()
    return 1 <= len(parts) <= 2 and not os.path.isabs(name) and ".." not in parts and "\0" not in name


def _not_ours(path: Path) -> UserError:
    return UserError(
        f"{path}: unfinished work is kept there, and what is there is not fastalign's: move it or choose another output"
    )
