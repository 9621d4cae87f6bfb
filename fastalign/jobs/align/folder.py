"""The output folder of `fastalign align`: its settings, what each stage cost, and the lock against another run."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastalign._base import outputs
from fastalign._base.errors import UserError
from fastalign._base.files import check_folder, read_json, write_json
from fastalign.jobs.align.budget import Budget

KIND = "align_job"
RESULT = "align"
PARTS = ("train", "heldout")  # folders of candidates


class Folder:
    """`out`, locked within `with`. settings: JSON values that determine the job.

    result: what a finished job with these settings wrote there, else None. Raises UserError, one line: the folder holds
    something else, or a job with other settings, and overwrite is not set; there is nothing to `resume`.
    """

    def __init__(self, out: str | os.PathLike[str], settings: Mapping[str, Any], *, resume: bool, overwrite: bool):
        self.out: Path = Path(out)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.align: Path = self.out / "align.json"
        self._ledger: Path = self.out / "job.json"
        check_folder(self.out)
        had = read_json(self._ledger, kind=KIND) if self._ledger.is_file() else None
        if had is None and self.out.is_dir() and any(self.out.iterdir()) and not overwrite:
            raise UserError(f"{out}: exists, and was not made by `fastalign align`; --overwrite writes into it")
        if had is not None and not overwrite:
            knobs = () if self.align.is_file() else ("budget",)  # more may be given to go on
            outputs.check_same(out, had.get("settings"), self.settings, knobs=knobs)
        self._anew = overwrite
        self._content: dict[str, Any] = (
            {**had, "settings": self.settings}
            if had is not None and not overwrite
            else {"kind": KIND, "settings": self.settings, "stages": {}}
        )
        self.result: dict[str, Any] | None = None
        if had is not None and not overwrite:
            if self.align.is_file():
                self.result = read_json(self.align, kind=RESULT)
                outputs.say(f"{out}: already there, finished by a run with the same settings")
            else:
                outputs.say(f"{out}: resuming an interrupted run with the same settings")
        elif resume and not outputs.ask(f"{out}: there is nothing to resume; begin a run?"):
            raise UserError(f"{out}: there is nothing to resume; leave out --resume to begin")
        self._lock: int | None = None
        self._new: list[Path] = []  # folders made for it

    def __enter__(self) -> Folder:
        self._new = [folder for folder in (self.out, *self.out.parents) if not folder.exists()]
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.out, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(f"{self.out}: another run is writing it") from None
        if self._anew:
            self._clear()
        self._write()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        assert self._lock is not None
        os.close(self._lock)
        if isinstance(error, KeyboardInterrupt) and not error.args:
            error.args = (f"{self.out}: stopped; the same command goes on from what is finished",)
        if error is not None and not self._made():
            self._ledger.unlink(missing_ok=True)
            for folder in (*(self.out / name for name in PARTS), *self._new):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()

    def _made(self) -> bool:
        """Whether there is any file besides the ledger."""
        return any(path.is_file() and path != self._ledger for path in self.out.rglob("*"))

    def _clear(self) -> None:
        """Remove what an earlier job of this command made, except a model, whose own job replaces it."""
        if not self._ledger.is_file():
            return
        for name in ("align.json", "report.html", "texts.jsonl", "palette.json"):
            (self.out / name).unlink(missing_ok=True)
        for folder in (*PARTS, "round-[0-9]*"):
            for path in [*self.out.glob(f"{folder}/*.parquet"), *self.out.glob(f"{folder}/palette.json")]:
                path.unlink()
            for path in self.out.glob(f"{folder}/distilled-[0-9]"):
                shutil.rmtree(path)

    def part(self, name: str) -> Path:
        folder = self.out / name
        folder.mkdir(exist_ok=True)
        return folder

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, float]]:
        """Counts the seconds within, of all runs together, also if it is interrupted; the block sets "tokens"."""
        had = self._content["stages"].get(name, {"seconds": 0.0, "tokens": 0})
        stage, began = dict(had), time.perf_counter()
        try:
            yield stage
        finally:
            stage["seconds"] = had["seconds"] + time.perf_counter() - began
            self._content["stages"][name] = stage
            self._write()

    def spent(self, name: str | None = None) -> tuple[float, float]:
        """(seconds, tokens) of one stage, or of all."""
        stages = self._content["stages"]
        chosen = stages.values() if name is None else [stages[name]] if name in stages else []
        return sum(one["seconds"] for one in chosen), sum(one["tokens"] for one in chosen)

    def left(self, budget: Budget) -> Budget:
        return budget.less(*self.spent())

    def decided(self, name: str, decide: Callable[[], Any]) -> Any:
        """What `decide` returned when it was first asked: a resumed job goes on with the same."""
        decisions = self._content.setdefault("decided", {})
        if name not in decisions:
            decisions[name] = decide()
            self._write()
        return decisions[name]

    def with_cost(self, result: Mapping[str, Any]) -> dict[str, Any]:
        seconds, tokens = self.spent()
        return {"kind": RESULT, "version": 1, **result, "cost": {"tokens": int(tokens), "seconds": round(seconds, 2)}}

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        write_json(self.align, result)
        return result

    def _write(self) -> None:
        write_json(self._ledger, self._content)
