"""The options of the jobs that train: keywords in Python, options on the command line, what a resumed run must match.

A field's annotation is the help of its option. `cli.options` has that of options which other commands have too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, TypedDict

from fastalign._base.errors import UserError
from fastalign.jobs.run import check_counts

KNOBS = (  # what is trained does not depend on them
    "save_steps", "log_steps", "resume", "overwrite", "show_progress", "until", "precompute_ref", "report",
    "device", "push_to_hub",
)  # fmt: skip
_COUNTS = (
    "batch_size", "gradient_accumulation_steps", "num_iterations", "max_steps", "max_new_tokens", "seed", "save_steps",
    "log_steps",
)  # fmt: skip
ENDLESS = 10**6  # max_steps of a training that `until` ends
LearningRate = Annotated[float, "Learning rate of the optimiser."]
SaveSteps = Annotated[int, "Steps between checkpoints."]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of a job."""

    rule: ClassVar[str] = "positive and finite"

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} must be {self.rule}, got {getattr(self, name)}")

    def record(self, **more: Any) -> dict[str, Any]:
        """With `more`, what a run must have the same to resume."""
        return more | {one.name: getattr(self, one.name) for one in fields(self) if one.name not in KNOBS}


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Settings):
    """Checked settings of every training job. Raises UserError.

    epochs, max_steps: if given, max_steps takes precedence. resume, overwrite: see `jobs.run.Run`. until: see
    `trainers.train`.
    """

    gradient_accumulation_steps: Annotated[int, "Number of batches per optimiser step."] = 1
    epochs: Annotated[float, "Passes over the prompts."] = 1.0
    max_steps: Annotated[int | None, "Stop after this many steps."] = None
    lora_r: Annotated[int | None, "Train LoRA adapters of this rank and merge them at the end."] = None
    chat: Annotated[bool | None, "Use the chat template; default: if the model has one."] = None
    seed: int = 0
    save_steps: SaveSteps = 100
    resume: bool = False
    overwrite: bool = False
    show_progress: bool = False
    until: Callable[[float, float], bool] | None = None

    def __post_init__(self) -> None:
        check_counts(**{name: count for name, count in vars(self).items() if name in _COUNTS})
        self._check_positive("learning_rate", "epochs")

    def _check_not_negative(self, name: str) -> None:
        if not 0 <= getattr(self, name) < float("inf"):
            raise UserError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TrainerSettings(TrainingSettings):
    """Of the jobs that run transformers' Trainer."""

    log_steps: Annotated[int, "Steps between log lines."] = 1


@dataclass(frozen=True, kw_only=True)
class PairSettings(TrainerSettings):
    """Of the jobs that train on preference pairs.

    chat: pairs of text become messages; None: if the tokenizer has a chat template, unless the pairs' candidates were
    sampled without it.
    """

    epochs: Annotated[float, "Passes over the pairs."] = 1.0
    max_length: Annotated[int, "Maximum number of tokens in prompt and completion."] = 1024
    rule: ClassVar[str] = "positive"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("max_length")


@dataclass(frozen=True, kw_only=True)
class DPOSettings(PairSettings):
    """loss_type: one of TRL's, or several separated by commas. precompute_ref: even if not every pair will be used; if
    every pair will, this is done anyway."""

    learning_rate: LearningRate = 5e-6
    batch_size: Annotated[int, "Pairs per batch."] = 4
    beta: Annotated[float, "Strength of the KL penalty towards the initial model."] = 0.1
    loss_type: Annotated[str, "sigmoid, ipo, hinge, robust ...; several, separated by commas."] = "sigmoid"
    precompute_ref: Annotated[bool, "Compute the reference's log-probabilities once and cache them on disk."] = False
    dtype: str = "auto"

    def __post_init__(self) -> None:
        from fastalign.losses.preference import LOSS_TYPES

        super().__post_init__()
        self._check_positive("beta")
        types = self.loss_types
        if wrong := [name for name in types if name not in LOSS_TYPES] or ([] if types else ["none"]):
            raise UserError(f"loss_type must be of {', '.join(LOSS_TYPES)}, at least one, got {wrong[0]}")

    @property
    def loss_types(self) -> list[str]:
        return [name.strip() for name in self.loss_type.split(",") if name.strip()]


@dataclass(frozen=True, kw_only=True)
class RewardSettings(PairSettings):
    """values: names of several heads, see `RewardConfig`. held_out: 0: none. report: a page (.html) or figures (.png,
    .svg) of the evaluation. center: see `bradley_terry_loss`."""

    values: Sequence[str] | None = None
    held_out: Annotated[float, "Share of the prompts held out for evaluation."] = 0.1
    report: str | os.PathLike[str] | None = None
    learning_rate: LearningRate = 1e-5
    batch_size: Annotated[int, "Pairs per batch."] = 8
    center: Annotated[float, "Weight of a penalty that centres scores at 0; 0.01 is usual."] = 0.0

    def __post_init__(self) -> None:
        from fastalign._base.numbers import number

        super().__post_init__()
        number("center", self.center, least=0.0)
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out must be at least 0 and below 1, got {self.held_out}")
        if self.report is not None and not self.held_out:
            raise UserError("report needs held-out pairs, got held_out 0")


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TrainerSettings):
    """chat: None: as the candidates were drawn if that is known, else if there is a chat template and no prompt is a
    dialogue in text."""

    learning_rate: Annotated[float | None, "Learning rate of the optimiser; default: 1e-5, or 1e-4 with --lora-r."] = (
        None
    )
    batch_size: Annotated[int, "Prompts per batch, each with all its candidates."] = 8
    chat: Annotated[bool | None, "Use the chat template; default: as the candidates were sampled."] = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 1e-5 if self.lora_r is None else 1e-4)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class GRPOSettings(TrainerSettings):
    """advantage: see `losses.group_advantages`. loss_type: see `losses.grpo_loss`. num_generations: divides
    `completions`. chat: None: if there is a template and no prompt is a dialogue in text."""

    advantage: Annotated[
        str, "How rewards become advantages: grpo, batch, dr_grpo, rloo, gdpo (each value separately), rank."
    ] = "grpo"
    loss_type: Annotated[str, "dapo, grpo, dr_grpo, bnpo, cispo, sapo, luspo or vespo."] = "dapo"
    learning_rate: LearningRate = 1e-6
    num_generations: Annotated[int, "Completions per prompt."] = 8
    batch_size: Annotated[int, "Completions per batch."] = 32
    num_iterations: Annotated[int, "Steps on the same completions."] = 1
    max_new_tokens: int = 32
    temperature: Annotated[float, "Temperature of sampling, and of the log-probabilities."] = 1.0
    beta: Annotated[float, "Weight of the KL penalty towards the initial model."] = 0.0
    dtype: str = "auto"
    save_steps: SaveSteps = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_not_negative("beta")
        g, step = self.num_generations, self.completions
        if not (isinstance(g, int) and g >= 2 and step % g == 0):
            rule = f"num_generations must be at least 2 and divide the {step} completions of a step"
            raise UserError(f"{rule}, batch_size · gradient_accumulation_steps, got {g!r}")

    @property
    def completions(self) -> int:
        """How many a step has."""
        return self.batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True, kw_only=True)
class PPOSettings(TrainingSettings):
    """mini_batch_size: None: batch_size / gradient_accumulation_steps, at most 8. kl_target: what the KL coefficient is
    adapted to, starting from init_kl_coef. chat: None: if there is a template and no prompt is a dialogue in text."""

    learning_rate: LearningRate = 1.41e-5
    batch_size: Annotated[int, "Rollouts per step."] = 32
    mini_batch_size: Annotated[int | None, "Rollouts per mini-batch of the optimiser."] = None
    epochs: Annotated[int, "Passes over the prompts."] = 1
    ppo_epochs: Annotated[int, "Passes over each step's rollouts."] = 4
    max_new_tokens: int = 32
    init_kl_coef: Annotated[float, "Initial weight of the KL penalty."] = 0.2
    kl_target: Annotated[float, "Target KL per response, in nats, for the adaptive weight."] = 6.0
    dtype: str = "auto"
    save_steps: SaveSteps = 25

    def __post_init__(self) -> None:
        check_counts(epochs=self.epochs)
        super().__post_init__()
        self._check_positive("kl_target")
        self._check_not_negative("init_kl_coef")
        if self.mini_batch_size is None:
            share = max(1, self.batch_size // self.gradient_accumulation_steps)
            size = next(size for size in range(min(8, share), 0, -1) if share % size == 0)
            object.__setattr__(self, "mini_batch_size", size)


@dataclass(frozen=True, kw_only=True)
class AlignSettings(Settings):
    """Checked settings of `jobs.align.job.align`. Raises UserError.

    how: "decode": texts drawn from p_λ among the candidates. A trained model: "distill", "dpo", "grpo", "ppo"; see
        `align.methods`. "auto": decode if enough candidates can be had, else grpo. Or a function of your own (job,
        folder for the model, what is left of the budget) that trains a model and returns how many tokens it took.
    watch: rewards that the proof measures too, and nothing is optimised for: one that falls while those asked for rise
        says that these are over-optimised (arXiv 2210.10760).
    candidates: per prompt. budget: fewer candidates, and a shorter training, where it binds.
    lora_r: 0: all weights; None: 16 for distill and grpo, else 0.
    rounds: levels and KL are always measured against the base. allow_infeasible: go on to a palette just inside the
        nearest one that can be reached. resume, overwrite: see `align.folder.Folder`.
    """

    how: str | Callable[[Any, Any, Any], float] = "auto"
    watch: Sequence[str] = ()
    candidates: int = 32
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    heldout: Annotated[float, "Share of the prompts held out, on which the result is proved."] = 0.5
    texts_per_prompt: Annotated[int | None, "Texts of the result per prompt; default 1, of a trained model 4."] = None
    budget: Annotated[str | None, "Limit of time or tokens for the whole job: 20m, 90s, 1h or 200000t."] = None
    learning_rate: Annotated[float | None, "Learning rate of the optimiser; default: that of the method."] = None
    lora_r: Annotated[
        int | None, "Rank of LoRA adapters, merged at the end; 0: all weights. Default: 16 for distill, grpo; else 0."
    ] = None
    rounds: Annotated[int, "Rounds of training; each starts from the model and candidates of the one before."] = 1
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    allow_infeasible: Annotated[bool, "If the palette is proved impossible, go on with one near it; exit 0."] = False
    push_to_hub: Annotated[str | None, "Upload the trained model and its card to this repository of the hub."] = None
    resume: bool = False
    overwrite: bool = False
    show_progress: bool = False

    def __post_init__(self) -> None:
        from fastalign.data.sampling import SamplingSettings

        if self.texts_per_prompt is not None:
            check_counts(texts_per_prompt=self.texts_per_prompt)
        if self.learning_rate is not None:
            self._check_positive("learning_rate")
        check_counts(rounds=self.rounds, candidates=self.candidates)
        if self.rounds > 1 and self.how in ("auto", "decode"):
            raise UserError(
                f"rounds must be 1 for how {self.how}: only a trained model begins another, got {self.rounds}"
            )
        SamplingSettings(self.candidates, self.max_new_tokens, self.temperature, top_p=self.top_p, seed=self.seed)
        if self.push_to_hub is not None and self.how == "decode":
            raise UserError(f"push_to_hub needs a trained model, and how is decode: got {self.push_to_hub!r}")

    def record(self, **more: Any) -> dict[str, Any]:
        made = super().record(**more)
        if callable(self.how):
            made["how"] = getattr(self.how, "__name__", "own")
        if not self.watch:
            del made["watch"]  # earlier versions had none
        return made


class TrainingOptions(TypedDict, total=False):
    """The keywords of every training job, which `TrainingSettings` describes."""

    batch_size: int
    gradient_accumulation_steps: int
    max_steps: int | None
    lora_r: int | None
    chat: bool | None
    seed: int
    save_steps: int
    resume: bool
    overwrite: bool
    show_progress: bool
    until: Callable[[float, float], bool] | None


class TrainerOptions(TrainingOptions, total=False):
    epochs: float
    log_steps: int


class PairOptions(TrainerOptions, total=False):
    learning_rate: float
    max_length: int


class DPOOptions(PairOptions, total=False):
    beta: float
    loss_type: str
    precompute_ref: bool
    dtype: str


class RewardOptions(PairOptions, total=False):
    values: Sequence[str] | None
    held_out: float
    report: str | os.PathLike[str] | None
    center: float


class DistillOptions(TrainerOptions, total=False):
    learning_rate: float | None
    dtype: str


class GRPOOptions(TrainerOptions, total=False):
    advantage: str
    loss_type: str
    learning_rate: float
    num_generations: int
    num_iterations: int
    max_new_tokens: int
    temperature: float
    beta: float
    dtype: str


class PPOOptions(TrainingOptions, total=False):
    learning_rate: float
    epochs: int
    mini_batch_size: int | None
    ppo_epochs: int
    max_new_tokens: int
    init_kl_coef: float
    kl_target: float
    dtype: str


class AlignOptions(TypedDict, total=False):
    how: str | Callable[[Any, Any, Any], float]
    watch: Sequence[str]
    candidates: int
    max_new_tokens: int
    temperature: float
    top_p: float
    heldout: float
    texts_per_prompt: int | None
    budget: str | None
    learning_rate: float | None
    lora_r: int | None
    rounds: int
    dtype: str
    device: str
    seed: int
    allow_infeasible: bool
    push_to_hub: str | None
    resume: bool
    overwrite: bool
    show_progress: bool
