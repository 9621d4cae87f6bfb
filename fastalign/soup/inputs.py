"""Inputs' files: open for a whole merge, and the same at its end as at its beginning."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fastalign._base.errors import UserError
from fastalign.soup.checkpoint import Checkpoint, File

_OTHER_FILES = 256  # that a process has open besides


@contextmanager
def opened(checkpoints: Sequence[Checkpoint]) -> Iterator[dict[Path, int]]:
    """Every file's descriptor."""
    with ExitStack() as stack:
        found: dict[Path, int] = {}
        for file in files_of(checkpoints):
            if file.path not in found:
                found[file.path] = os.open(file.path, os.O_RDONLY)
                stack.callback(os.close, found[file.path])
        yield found


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files as far as the system lets it, where a merge needs more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UserError(
            f"this merge has {count:,} files open at once, the system allows {hard:,}: make fewer soups at once"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def files_of(checkpoints: Sequence[Checkpoint]) -> Iterator[File]:
    for one in checkpoints:
        yield from one.files


def unchanged(checkpoints: Sequence[Checkpoint]) -> None:
    """Raises UserError where a file is not what it was when its header was read."""
    for file in files_of(checkpoints):
        status = os.stat(file.path)
        if (status.st_size, status.st_mtime_ns) != (file.size, file.modified):
            raise UserError(f"{file.path}: changed while it was read; nothing was made of it")
