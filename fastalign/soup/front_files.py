"""The folder of a soup front: its files come in together, once all are made, and one walk at a time makes them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastalign._base import outputs
from fastalign._base.errors import UserError
from fastalign._base.files import check_folder
from fastalign._base.work_folder import WorkFolder, hold, sha256
from fastalign.decode.candidates import Candidates

RECORD = "soups.json"
FIGURES = ("soups.svg", "soups.png")


class Files:
    """Those of `out`, and of `parts` beside it, where new ones are made; see `making`."""

    def __init__(self, out: Path, parts: WorkFolder, overwrite: bool):
        self._out, self._parts, self._overwrite, self._new, self._used = out, parts, overwrite, [], set()

    def measured(self, name: str, wanted: Mapping[str, Any]) -> Candidates | None:
        """A soup's scored candidates, where they are there as `wanted` has it. Raises UserError where others are."""
        self._used.add(name)
        for folder in (self._out, self._parts.path):
            if outputs.recorded(folder / name, "soup") == wanted:
                if folder != self._out:
                    self._new.append(name)
                return Candidates.from_parquet(folder / name, kind="scored")
        self._free(name)
        return None

    def check(self, name: str, *, ours: bool) -> None:
        """Raise UserError where a file that is to be replaced is not `ours`."""
        if not ours:
            self._free(name)

    def _free(self, name: str) -> None:
        if (self._out / name).exists() and not self._overwrite:
            raise UserError(f"{self._out / name}: exists, and is of other soups or settings; --overwrite replaces it")

    @contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """Where to write a file of `out`."""
        path = self._parts.making(name)
        yield path
        self._parts.made({name: sha256(path)})
        self._new.append(name)
        self._used.add(name)

    def settle(self) -> None:
        """What is new comes into `out`, the record last; what an overwritten walk left there goes, its record first."""
        self._out.mkdir(exist_ok=True)
        old = [path for path in self._out.glob("**/*.parquet") if outputs.recorded(path, "soup")]
        if (record := self._out / RECORD).exists() and (RECORD in self._new or self._overwrite):
            old += [self._out / name for name in FIGURES]
            record.unlink()
        for path in old if self._overwrite else ():
            if path.relative_to(self._out).as_posix() not in self._used:
                path.unlink(missing_ok=True)
        for name in sorted(self._new, key=lambda name: name == RECORD):
            (self._out / name).parent.mkdir(exist_ok=True)
            os.replace(self._parts.path / name, self._out / name)
        chosen = self._out / "chosen"
        if chosen.is_dir() and not any(chosen.iterdir()):
            chosen.rmdir()


@contextmanager
def making(
    out: str | os.PathLike, inputs: Iterable[Any], job: Mapping[str, Any], *, overwrite: bool
) -> Iterator[Files]:
    """The files of `out`, held against another walk; those made in the block come into `out` when it has succeeded.

    job: what `<out>.parts` is for; what an interrupted walk of the same left there is taken up. Raises UserError, one line: another
    walk holds it, or left files of another job there and they are not to be overwritten.
    """
    check_folder(out)
    outputs.not_an_input(out, inputs, folder=True)
    out = Path(os.path.realpath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    with hold(out.with_name(f"{out.name}.parts"), writes=out, keeps="soups") as parts:
        if parts.whole() and parts.job != job and not overwrite:
            raise UserError(f"{parts.path}: holds an interrupted run of other soups or settings; --overwrite drops it")
        parts.begin(job)
        files = Files(out, parts, overwrite)
        yield files
        files.settle()
        parts.remove()
