"""A training run's folder and its log: the same for every `fastalign train` command.

<out>/               the model as transformers reads it, its tokenizer, and (with LoRA) the adapter in adapter/
<out>/run.json       the run's settings; a resumed run must have the same
<out>/log.jsonl      one object per logged step
<out>/checkpoints/   during the run
<out>/result.json    at the end: the results, and the files written
<out>/previous/      while a finished run is overwritten: its run.json, log.jsonl and result.json
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import json
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign._base import fingerprint, outputs
from fastalign._base.errors import UserError
from fastalign._base.files import atomic_write, check_folder, nearest_folder, read_json, write_error, write_json
from fastalign._base.units import size

if TYPE_CHECKING:
    pass

KIND, RESULT = "training_run", "training_result"
_RECORDS = ("run.json", "log.jsonl", "result.json")
# transformers' names, and ppo_checkpoint's.
_CHECKPOINT = re.compile(r"checkpoint-\d+|step-\d+|\.step-\d+\.\d+\.partial")
_LAST = ("trainer_state.json", "state.json")
_KNOB = "precompute_ref"  # saves memory only; earlier versions counted it as a setting
PATIENCE = 60  # seconds that one process waits for the first
_CARD = "README.md"  # TRL writes one there


def is_main() -> bool:
    """Whether this process writes files; under torchrun only the first one does."""
    return int(os.environ.get("RANK", "0")) == 0


class Run:
    """The folder `out` of one run. settings: JSON values that determine the run; inputs: models and reward models.

    result: of a finished run with these settings in the folder. resumes: whether this continues an interrupted one.
    Raises UserError, one line: the folder is an input; it contains another run or something else and overwrite is not
    set; there is nothing to `resume`.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        settings: Mapping[str, Any],
        *,
        resume: bool,
        overwrite: bool = False,
        inputs: Sequence[str] = (),
    ):
        self.out: Path = Path(out)
        contents = {name: fingerprint.of_model(name) for name in inputs}
        self.settings: dict[str, Any] = json.loads(json.dumps({**settings, "contents": contents}))
        self._lock: int | None = None
        self.checkpoints: Path = self.out / "checkpoints"
        self.logs: Path = self.out / "log.jsonl"
        check_folder(self.out)
        outputs.not_an_input(self.out, inputs, folder=True)
        self.previous: Path = self.out / "previous"
        # An attempt to overwrite this run was interrupted.
        if not overwrite and self._settings_in(self.previous) == self.settings:
            if is_main():
                self._hold()
                self._restore()
                self._release()
            else:
                self._wait_for_restored()
        had, ended = self._settings_in(self.out), self._result_in(self.out)
        self._new = not self.out.is_dir() or not any(self.out.iterdir())
        self._old_files = (ended or self._result_in(self.previous) or {}).get("files", [])
        if had is None and self.out.is_dir() and any(self.out.iterdir()) and not overwrite:
            raise UserError(f"{out}: exists, and was not made by a training run; --overwrite writes into it")
        if had is not None and not overwrite:
            outputs.check_same(self.out, had, self.settings)
        same = had == self.settings
        whole = ended is not None and all((self.out / name).is_file() for name in self._old_files)
        self.result: dict[str, Any] | None = ended if same and whole and not overwrite else None
        self.resumes: bool = same and self.result is None and bool(self._kept())
        nothing = f"{out}: there is nothing to resume"
        if resume and self.result is None and not self.resumes and not outputs.ask(f"{nothing}; begin a run?"):
            raise UserError(f"{nothing}; leave out --resume to begin")
        if self.result is not None:
            outputs.say(f"{out}: already there, finished by a run with the same settings")
        elif self.resumes:
            outputs.say(f"{out}: resuming from {self._kept()[-1].name} of an interrupted run with the same settings")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Removes everything of a run that was refused, or stopped before its first checkpoint; an interrupt's message
        says what is kept."""
        kept = self._kept()
        if isinstance(error, KeyboardInterrupt) and not error.args:
            where = f"; the same command resumes from {kept[-1]}" if kept else " before its first checkpoint"
            error.args = (f"{self.out}: stopped{where}",)
        self._release()
        if not (kind is None or kept or not is_main()):
            self._clear()
        if error is not None and (failed := write_error(error, self.out)) is not None:
            raise failed from error

    def _clear(self) -> None:
        """Remove the files of a run that made no checkpoint."""
        if self._settings_in(self.previous) is not None:
            self._restore()
        if not self._new:
            return
        self._remove_checkpoints()
        shutil.rmtree(self.out / "runs", ignore_errors=True)  # TensorBoard's
        for path in (self.out / "run.json", self.logs):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.out.rmdir()

    @staticmethod
    def _settings_in(folder: Path) -> dict[str, Any] | None:
        try:
            settings = read_json(folder / "run.json", kind=KIND)["settings"]
        except FileNotFoundError:  # or another process has moved it just now
            return None
        return {name: value for name, value in settings.items() if name != _KNOB}

    @staticmethod
    def _result_in(folder: Path) -> dict[str, Any] | None:
        path = folder / "result.json"
        return read_json(path, kind=RESULT) if path.is_file() else None

    def _set_aside(self) -> None:
        """Move a finished run's record to `previous`, run.json last: it identifies a complete record there."""
        self.previous.mkdir(exist_ok=True)
        for name in reversed(_RECORDS):
            if (self.out / name).is_file():
                os.replace(self.out / name, self.previous / name)

    def _restore(self) -> None:
        """Put back the record of the finished run, whose model is still there, in place of the unfinished one's."""
        self._remove_checkpoints()
        for name in reversed(_RECORDS):
            if (self.previous / name).is_file():
                os.replace(self.previous / name, self.out / name)
        self.previous.rmdir()

    def _wait_for_restored(self) -> None:
        """Wait for the first process to restore it: there is no process group yet, and run.json leaves `previous`
        last."""
        until = time.monotonic() + PATIENCE
        while (self.previous / "run.json").is_file():
            if time.monotonic() > until:
                raise UserError(f"{self.previous}: the first process did not put it back")
            time.sleep(0.02)

    def _kept(self) -> list[Path]:
        """The complete checkpoints, in the order of their steps; trainer_state.json and state.json are written last."""
        states = self.checkpoints.glob("*/*state.json")
        kept = [path.parent for path in states if _CHECKPOINT.fullmatch(path.parent.name) and path.name in _LAST]
        return sorted(kept, key=lambda path: int(path.name.rpartition("-")[2]))

    def begin(self, step: int) -> None:
        """Create the folder. Training continues after `step`: later lines in an interrupted run's log are removed."""
        if not is_main():
            return
        self.out.mkdir(parents=True, exist_ok=True)
        self._hold()
        if self.resumes:
            self._rewind(step)
        else:
            if (self.out / "result.json").is_file():
                self._set_aside()
            self.logs.unlink(missing_ok=True)
            self._remove_checkpoints()
        self._before = self._files()
        write_json(self.out / "run.json", {"kind": KIND, "version": 1, "settings": self.settings})

    def _hold(self) -> None:
        """Lock the folder against other runs until this one ends. Raises UserError."""
        self._lock = os.open(self.out, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._release()
            raise UserError(f"{self.out}: another run is writing it") from None

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one object to the log, without non-finite numbers."""
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
        """Write and return the result. Removes checkpoints, and files of an overwritten run that this one did not
        write."""
        import torch

        from fastalign.ops import products

        used = {"products": products.choice(torch.float32)}
        result = {"kind": RESULT, "version": 1, **result, **used, "settings": self.settings}
        if not is_main():
            return result
        files = self._files()
        result["files"] = sorted(name for name, state in files.items() if self._before.get(name) != state)
        for name in {*self._old_files} - {*result["files"]}:
            (self.out / name).unlink(missing_ok=True)
        write_json(self.out / "result.json", result)
        self._remove_checkpoints()
        shutil.rmtree(self.previous, ignore_errors=True)
        return result

    def _files(self) -> dict[str, tuple[int, int]]:
        """The folder's model files and the like, with what shows whether they are written again."""
        own = (*_RECORDS, "checkpoints", "runs", "previous")
        files = (path for path in self.out.rglob("*") if path.is_file())
        states = {path.relative_to(self.out): path.stat() for path in files}
        return {name.as_posix(): (s.st_ino, s.st_mtime_ns) for name, s in states.items() if name.parts[0] not in own}

    def _remove_checkpoints(self) -> None:
        """Remove the checkpoints; other files among them stay."""
        if not self.checkpoints.is_dir():
            return
        for path in self.checkpoints.iterdir():
            if _CHECKPOINT.fullmatch(path.name) and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
        (self.checkpoints / _CARD).unlink(missing_ok=True)
        if not any(self.checkpoints.iterdir()):
            self.checkpoints.rmdir()


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write a model for `from_pretrained` into `out`, with adapters merged; the adapters alone also go into adapter/ if
    the base model has a name."""
    if not is_main():
        return
    from fastalign.train.value_head import staged

    with staged(out) as beside:
        if hasattr(model, "peft_config"):
            if model.peft_config["default"].base_model_name_or_path:
                model.save_pretrained(beside / "adapter", selected_adapters=["default"])
            model = model.merge_and_unload()
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def load_policy(name: str, dtype: str, out: Path) -> tuple[Any, Any]:
    """The model to train and its tokenizer. From an adapter's folder: the base with the adapter merged, all weights
    trainable. Raises UserError if the disk of `out` has no room for it."""
    from fastalign.models.loading import load_causal_lm

    model: Any
    model, tokenizer = load_causal_lm(name, dtype=dtype, device="cpu")
    if hasattr(model, "peft_config"):
        outputs.say(f"{name}: an adapter, is merged into its base before training")
        model = model.merge_and_unload().requires_grad_(True)
        model.name_or_path = ""  # an adapter trained on it does not fit the base
    needed, free = sum(p.nbytes for p in model.parameters()), shutil.disk_usage(nearest_folder(out)).free
    if needed > free:
        raise UserError(f"{out}: the model needs {size(needed)}, the disk has {size(free)} free")
    return model, tokenizer


def rows_hash(rows: Any) -> str:
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()[:16]


def check_counts(**given: int | None) -> None:
    """Raise UserError for anything but an integer of at least 1 (seed: 0); max_steps may be None."""
    for name, count in given.items():
        least = 0 if name == "seed" else 1
        if (name, count) != ("max_steps", None) and not (isinstance(count, int) and least <= count < 1 << 32):
            raise UserError(f"{name} must be an integer, at least {least}, got {count!r}")


def lora(r: int | None, task: str) -> Any:
    """peft's LoraConfig of rank r on its default layers, alpha 2r; None for None. task: "CAUSAL_LM" or "SEQ_CLS"."""
    if r is None:
        return None
    if not (isinstance(r, int) and r >= 1):
        raise UserError(f"lora_r must be an integer, at least 1, got {r!r}")
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("lora_r needs the package peft: pip install 'fastalign[trl]'") from None
    return LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.0, task_type=task)


def board() -> str | None:
    """ "tensorboard" if it is installed."""
    import importlib.util

    installed = any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX"))
    return "tensorboard" if installed else None


@contextmanager
def quiet() -> Iterator[None]:
    """Hides warnings meant for programmers, and other libraries' progress bars if stderr is not a terminal."""
    from transformers.utils import logging

    from fastalign._base.quiet import quiet_unless_terminal

    datasets: Any = None
    with suppress(ImportError):  # PPO needs none
        datasets = importlib.import_module("datasets")
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
    """Turns another library's error about an argument into one line."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        lines = str(error).strip().splitlines()
        raise UserError(lines[0].replace("`", "") if lines else type(error).__name__) from error
