"""A training run's folder, its log and its progress line: the same for every `fastalign train` command.

<out>/               the model as transformers reads it, its tokenizer, and (with LoRA) the adapter in adapter/
<out>/run.json       what the run was asked for; a resumed run must ask for the same
<out>/log.jsonl      one object a logged step
<out>/checkpoints/   while the run goes on
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastalign.data.files import atomic_write, read_json, write_json
from fastalign.errors import UserError

KIND = "training_run"
_CHECKPOINT = re.compile(
    r"checkpoint-\d+|step-\d+|\.step-\d+\.\d+\.partial"
)  # transformers' names, and ppo_checkpoint's
_CARD = "README.md"  # TRL writes one beside them


def is_main() -> bool:
    """Whether this process writes; the others of a torchrun only work."""
    return int(os.environ.get("RANK", "0")) == 0


class Run:
    """The folder `out` of one run. `settings`: JSON values that make the run what it is."""

    def __init__(self, out: str | os.PathLike, settings: Mapping[str, Any], *, resume: bool):
        self.out = Path(out)
        self.settings = json.loads(json.dumps(dict(settings)))
        self.checkpoints = self.out / "checkpoints"
        self.logs = self.out / "log.jsonl"
        if self.out.is_file():
            raise UserError(f"{out}: must be a folder, this is a file")
        there = self.checkpoints.is_dir() and any(self.checkpoints.iterdir())
        if there and not resume:
            raise UserError(
                f"{self.checkpoints} holds checkpoints of an interrupted run: go on with --resume, or remove it"
            )
        self.resumes = there
        if resume and (self.out / "run.json").is_file():
            self._same(read_json(self.out / "run.json", kind=KIND)["settings"])

    def begin(self, step: int) -> None:
        """Make the folder; training goes on after `step`, so what an interrupted run logged beyond it is forgotten."""
        if not is_main():
            return
        if self.resumes:
            self._rewind(step)
        else:
            self.logs.unlink(missing_ok=True)
        write_json(self.out / "run.json", {"kind": KIND, "version": 1, "settings": self.settings})

    def _same(self, had: dict[str, Any]) -> None:
        for name in {**had, **self.settings}:
            if had.get(name) != self.settings.get(name):
                rule = "use the same settings to resume, or another output"
                was, asked = had.get(name), self.settings.get(name)
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

    def finish(self) -> None:
        """The checkpoints go; what else lies among them stays."""
        if not is_main() or not self.checkpoints.is_dir():
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
