"""A transformers Trainer in the folder of a run: its arguments, its checkpoints, its log and its progress line."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign._base import progress
from fastalign.jobs import run as runs
from fastalign.jobs.run import Run
from fastalign.jobs.settings import ENDLESS

if TYPE_CHECKING:
    from fastalign.jobs.stopping import Stopping


def arguments(run: Run, save_steps: int, log_steps: int) -> dict[str, Any]:
    """The arguments of transformers' Trainer that every job with such a trainer sets."""
    import torch

    settings, gpu = run.settings, torch.cuda.is_available()
    board = runs.board()
    if board:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.out / "runs")  # the only way to tell transformers
    return {
        "output_dir": str(run.checkpoints), "learning_rate": settings["learning_rate"],
        "num_train_epochs": settings["epochs"], "max_steps": settings["max_steps"] or -1,
        "per_device_train_batch_size": settings["batch_size"],
        "gradient_accumulation_steps": settings["gradient_accumulation_steps"],
        "seed": settings["seed"], "data_seed": settings["seed"],
        # Otherwise accelerate treats processes without a GPU as unrelated.
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": gpu and torch.cuda.is_bf16_supported(), "gradient_checkpointing": gpu, "dataloader_pin_memory": gpu,
        "save_strategy": "steps", "save_steps": save_steps, "save_total_limit": 1, "logging_steps": log_steps,
        "logging_first_step": True, "disable_tqdm": True, "report_to": board or "none",
    }  # fmt: skip


def train(
    run: Run,
    name: str,
    make: Callable[..., Any],
    shown: Mapping[str, str],
    show: bool,
    until: Callable[[float, float], bool] | None = None,
) -> tuple[Any, float]:
    """Make the trainer, given its callbacks, and run it, from its newest checkpoint if there is one; returns (trainer,
    tokens per second). shown: label -> logged figure, in the progress line. until: of seconds and tokens; training ends
    with the step after which it holds."""
    from transformers import PrinterCallback, TrainerState

    from fastalign.jobs.stopping import Stopping

    checkpoint = newest_checkpoint(run.checkpoints) if run.resumes else None
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] if checkpoint else 0
    stopping = Stopping()
    callback = _follow(run, stopping, shown, until)
    with runs.one_line():
        trainer = make(callbacks=[callback])
    run.begin(step)
    trainer.remove_callback(PrinterCallback)
    total = steps(_steps(trainer))
    if checkpoint is not None and step >= total:  # interrupted after its last step; transformers would train one more
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        callback.trainer = trainer
        callback.restore_tokens(trainer.args, trainer.state)
        return trainer, 0.0
    show = show and runs.is_main()
    with stopping, progress.bar(name, total=total, unit="steps", done=step, show=show) as advance:
        callback.trainer, callback.advance = trainer, advance
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stopping.requested(trainer.accelerator):
        stopping.end()
    return trainer, callback.tokens_per_second


def newest_checkpoint(folder: Path) -> Path | None:
    """The latest complete checkpoint; transformers writes trainer_state.json last."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def steps(most: float) -> float:
    """For the progress line: infinite where `until` ends the training."""
    return most if most < ENDLESS else math.inf


def _steps(trainer: Any) -> int:
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    per_epoch = -(-len(trainer.get_train_dataloader()) // args.gradient_accumulation_steps)
    return max(1, -(-int(per_epoch * args.num_train_epochs * 1000) // 1000))


def _follow(
    run: Run, stopping: Stopping, shown: Mapping[str, str], until: Callable[[float, float], bool] | None
) -> Any:
    """A callback for transformers' Trainer: writes its logs to the run's log and the progress line, and stops on
    request.

    Set `trainer` and `advance` (of a `progress.bar`) once they exist. shown: label -> logged figure, for the line.
    Checkpoints store the figures since the last log, so that a resumed run logs the same.
    """
    from transformers import TrainerCallback

    class Follow(TrainerCallback):
        trainer: Any = None
        advance: Any = None
        stopped = False
        tokens_per_second = 0.0

        def on_train_begin(self, args, state, control, **_):
            self.restore_tokens(args, state)
            self.began, self.tokens = time.perf_counter(), self.trainer._total_train_tokens
            if since := self._kept(args, state):
                self.trainer._tr_loss.fill_(since["loss"])
                self.trainer._globalstep_last_logged = since["logged"]
                self.trainer._metrics["train"].update(since["metrics"])

        def restore_tokens(self, args, state):
            if "_total_train_tokens" in vars(self.trainer):  # TRL's own, which its checkpoints do not keep
                self.trainer._total_train_tokens = self._kept(args, state).get("tokens", 0)

        def _kept(self, args, state) -> dict[str, Any]:
            kept = self._since_log(args, state)
            return json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}

        def on_step_end(self, args, state, control, **_):
            seconds = time.perf_counter() - self.began
            self.tokens_per_second = (self.trainer._total_train_tokens - self.tokens) / max(seconds, 1e-9)
            self.advance(1)
            if until is not None and until(seconds, self.trainer._total_train_tokens):
                control.should_training_stop = True
            if stopping.requested(self.trainer.accelerator):
                self.stopped = control.should_save = control.should_training_stop = True

        def on_log(self, args, state, control, logs=None, **_):
            logs = {name: value for name, value in (logs or {}).items() if isinstance(value, (int, float))}
            if self.stopped and "loss" not in logs:  # TRL's summary of a whole run
                return
            if state.is_world_process_zero:
                run.log({"step": state.global_step, **logs})
            if "loss" in logs:
                figures = "  ".join(f"{label} {logs[name]:.4f}" for label, name in shown.items() if name in logs)
                self.advance(0, f"{self.tokens_per_second:,.0f} tokens/s  {figures}")

        def on_save(self, args, state, control, **_):
            loss, logged = self.trainer._tr_loss.item(), self.trainer._globalstep_last_logged
            since = {"loss": loss, "logged": logged, "metrics": dict(self.trainer._metrics["train"])}
            since["tokens"] = self.trainer._total_train_tokens
            self._since_log(args, state).write_text(json.dumps(since), encoding="utf-8")

        def _since_log(self, args, state) -> Path:
            return run.checkpoints / f"checkpoint-{state.global_step}" / f"since_log_{args.process_index}.json"

    return Follow()
