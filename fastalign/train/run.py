"""A training run's folder, its log and its progress line: the same for every `fastalign train` command.

<out>/               the model as transformers reads it, its tokenizer, and (with LoRA) the adapter in adapter/
<out>/run.json       what the run was asked for; one that goes on must ask for the same
<out>/log.jsonl      one object a logged step
<out>/checkpoints/   while the run goes on
<out>/result.json    when it has ended: what came of it, and which files it wrote
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastalign.data import fingerprint, outputs
from fastalign.data.files import atomic_write, check_folder, read_json, write_json
from fastalign.errors import UserError

KIND, RESULT = "training_run", "training_result"
_CHECKPOINT = re.compile(
    r"checkpoint-\d+|step-\d+|\.step-\d+\.\d+\.partial"
)  # transformers' names, and ppo_checkpoint's
_LAST = ("trainer_state.json", "state.json")
_CARD = "README.md"  # TRL writes one beside them


def is_main() -> bool:
    """Whether this process writes; the others of a torchrun only work."""
    return int(os.environ.get("RANK", "0")) == 0


class Run:
    """The folder `out` of one run. settings: JSON values that make the run what it is; inputs: models and reward models.

    result: of a run of these settings that has ended there. resumes: whether one was interrupted there, and this goes on.
    Raises UserError, one line: the folder is an input; it holds another run or something else, and is not to be overwritten; there
    is nothing to `resume`.
    """

    def __init__(
        self, out: str | os.PathLike, settings: Mapping[str, Any], *, resume: bool, overwrite: bool = False,
        inputs: Sequence[str] = (),
    ):  # fmt: skip
        self.out = Path(out)
        contents = {name: fingerprint.of_model(name) for name in inputs}
        self.settings = json.loads(json.dumps({**settings, "contents": contents}))
        self.checkpoints = self.out / "checkpoints"
        self.logs = self.out / "log.jsonl"
        check_folder(self.out)
        outputs.not_an_input(self.out, inputs)
        had, ended = self._had(), self._ended()
        self._new = not self.out.is_dir() or not any(self.out.iterdir())
        self._old_files = ended.get("files", []) if ended else []
        if had is None and self.out.is_dir() and any(self.out.iterdir()) and not overwrite:
            raise UserError(f"{out}: exists, and is no training run's; --overwrite writes into it")
        if had is not None and not overwrite:
            self._same(had)
        same = had == self.settings
        whole = ended is not None and all((self.out / name).is_file() for name in self._old_files)
        self.result = ended if same and whole and not overwrite else None
        self.resumes = same and self.result is None and bool(self._kept())
        if resume and self.result is None and not self.resumes:
            raise UserError(f"{out}: there is nothing to resume; leave out --resume to begin")
        if self.result is not None:
            outputs.say(f"{out}: there already, a run of the same settings has ended")
        elif self.resumes:
            outputs.say(f"{out}: going on from {self._kept()[-1].name}, where a run of the same settings was stopped")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind, *_) -> None:
        """Of a run that was refused, or stopped before its first checkpoint, nothing stays behind."""
        if kind is None or not self._new or self._kept() or not is_main():
            return
        self._remove_checkpoints()
        shutil.rmtree(self.out / "runs", ignore_errors=True)  # TensorBoard's
        for path in (self.out / "run.json", self.logs):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.out.rmdir()

    def _had(self) -> dict[str, Any] | None:
        there = (self.out / "run.json").is_file()
        return read_json(self.out / "run.json", kind=KIND)["settings"] if there else None

    def _ended(self) -> dict[str, Any] | None:
        there = (self.out / "result.json").is_file()
        return read_json(self.out / "result.json", kind=RESULT) if there else None

    def _kept(self) -> list[Path]:
        """The whole checkpoints, in the order of their steps; trainer_state.json and state.json are written last."""
        found = self.checkpoints.glob("*/*state.json")
        kept = [path.parent for path in found if _CHECKPOINT.fullmatch(path.parent.name) and path.name in _LAST]
        return sorted(kept, key=lambda path: int(path.name.rpartition("-")[2]))

    def begin(self, step: int) -> None:
        """Make the folder; training goes on after `step`, so what an interrupted run logged beyond it is forgotten."""
        if not is_main():
            return
        if self.resumes:
            self._rewind(step)
        else:
            self.logs.unlink(missing_ok=True)
            self._remove_checkpoints()
        (self.out / "result.json").unlink(missing_ok=True)
        self._before = self._files()
        write_json(self.out / "run.json", {"kind": KIND, "version": 1, "settings": self.settings})

    def _same(self, had: dict[str, Any]) -> None:
        for name in {**had, **self.settings}:
            if had.get(name) != self.settings.get(name):
                rule = "use the same settings to go on, another output, or --overwrite"
                was, asked = had.get(name), self.settings.get(name)
                if name == "contents":
                    raise UserError(f"{self.out} was made with another model of that name: {rule}")
                raise UserError(f"{self.out} was made with {name}={was!r}, this run asks for {asked!r}: {rule}")

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one object to the log; numbers that are not finite are left out."""
        if not is_main():
            return
        plain = {k: v for k, v in row.items() if not isinstance(v, float) or abs(v) < float("inf")}
        with self.logs.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")

    def _rewind(self, step: int) -> None:
        if not self.logs.is_file():
            return
        kept = []
        for line in self.logs.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # cut off in the middle
                continue
            if row.get("step", 0) <= step:
                kept.append(line + "\n")
        with atomic_write(self.logs) as beside:
            beside.write_text("".join(kept), encoding="utf-8")

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Keep what came of it and return it; the checkpoints go, and what an overwritten run wrote and this one did not."""
        result = {"kind": RESULT, "version": 1, **result, "settings": self.settings}
        if not is_main():
            return result
        files = self._files()
        result["files"] = sorted(name for name, state in files.items() if self._before.get(name) != state)
        for name in {*self._old_files} - {*result["files"]}:
            (self.out / name).unlink(missing_ok=True)
        write_json(self.out / "result.json", result)
        self._remove_checkpoints()
        return result

    def _files(self) -> dict[str, tuple[int, int]]:
        """The model's and its like in the folder, with what tells whether they are written anew."""
        own = ("run.json", "log.jsonl", "result.json", "checkpoints", "runs")
        found = (path for path in self.out.rglob("*") if path.is_file())
        states = {path.relative_to(self.out): path.stat() for path in found}
        return {name.as_posix(): (s.st_ino, s.st_mtime_ns) for name, s in states.items() if name.parts[0] not in own}

    def _remove_checkpoints(self) -> None:
        """What else lies among them stays."""
        if not self.checkpoints.is_dir():
            return
        for path in self.checkpoints.iterdir():
            if _CHECKPOINT.fullmatch(path.name) and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
        (self.checkpoints / _CARD).unlink(missing_ok=True)
        if not any(self.checkpoints.iterdir()):
            self.checkpoints.rmdir()


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write a model for `from_pretrained` into `out`: adapters merged, and beside it in adapter/ on their own."""
    if not is_main():
        return
    from fastalign.train.value_head import _staged

    with _staged(out) as beside:
        if hasattr(model, "peft_config"):
            model.save_pretrained(beside / "adapter", selected_adapters=["default"])
            model = model.merge_and_unload()
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def rows_hash(rows: Any) -> str:
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()[:16]


def lora(r: int | None, task: str):
    """peft's LoraConfig of rank r on its usual layers, alpha 2r; None for None. task: "CAUSAL_LM" or "SEQ_CLS"."""
    if r is None:
        return None
    if not (isinstance(r, int) and r >= 1):
        raise UserError(f"lora_r must be an integer, at least 1, got {r!r}")
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("lora_r needs the package peft: pip install fastalign[trl]") from None
    return LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.0, task_type=task)


def board() -> str | None:
    """ "tensorboard" where it is installed."""
    import importlib.util

    found = any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX"))
    return "tensorboard" if found else None


class Progress:
    """Steps done, time left and tokens per second: a bar on a terminal, a line now and then elsewhere, on stderr."""

    def __init__(self, description: str, total: int, *, show: bool = True, every: float = 10.0):
        self.description, self.total, self.every = description, total, every
        self.show = show and is_main()
        self.told, self.tokens_per_second, self.bar = 0.0, 0.0, None
        self.begin()

    def begin(self) -> None:
        """Tokens per second count from here."""
        self.began = time.perf_counter()

    def __enter__(self) -> Progress:
        if self.show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                "{task.description}",
                BarColumn(),
                MofNCompleteColumn(),
                "{task.fields[said]}",
                TimeRemainingColumn(),
            )
            columns = tuple(TextColumn(c, markup=False) if isinstance(c, str) else c for c in columns)
            self.bar = Bar(*columns, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task(self.description, total=self.total, said="")
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, step: int, tokens: float, said: str = "") -> None:
        """step of the run, tokens since the run began, and what else to show."""
        now = time.perf_counter()
        self.tokens_per_second = tokens / max(now - self.began, 1e-9)
        line = f"{self.tokens_per_second:,.0f} tokens/s" + (f"  {said}" if said else "")
        if self.bar is not None:
            self.bar.update(self.task, completed=step, said=line)
        elif self.show and (now - self.told > self.every or step == self.total):
            self.told = now
            print(f"{self.description}: step {step}/{self.total}  {line}", file=sys.stderr, flush=True)


def follow(run: Run, progress: Progress, shown: tuple[str, ...] = ("loss",)):
    """A callback for transformers' Trainer: its logs into the run's log, its steps onto the progress line.

    Set its `trainer` once that is made. shown: which logged figures stand on the line.
    """
    from transformers import TrainerCallback

    class Follow(TrainerCallback):
        trainer: Any = None
        said = ""

        def on_log(self, args, state, control, logs=None, **_):
            logs = {name: value for name, value in (logs or {}).items() if isinstance(value, (int, float))}
            self.said = "  ".join(f"{name} {logs[name]:.4f}" for name in shown if name in logs) or self.said
            if state.is_world_process_zero:
                run.log({"step": state.global_step, **logs})

        def on_step_end(self, args, state, control, **_):
            progress.update(state.global_step, self.trainer._total_train_tokens, self.said)

    return Follow()


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings meant for programmers, and other libraries' bars where stderr is no terminal, are not shown."""
    from transformers.utils import logging

    from fastalign.integrations._loading import quiet_unless_terminal

    try:
        import datasets
    except ImportError:  # PPO needs none
        datasets = None
    silence = datasets is not None and not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    level = logging.get_verbosity()
    if silence:
        datasets.disable_progress_bars()
    logging.set_verbosity_error()
    try:
        with quiet_unless_terminal(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            yield
    finally:
        logging.set_verbosity(level)
        if silence:
            datasets.enable_progress_bars()


@contextmanager
def one_line() -> Iterator[None]:
    """What another library's constructor says against an argument, as one line."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        lines = str(error).strip().splitlines()
        raise UserError(lines[0].replace("`", "") if lines else type(error).__name__) from error
