"""PPOConfig: the options of PPOTrainer, under the names and with the defaults of TRL 0.11."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

from fastalign._base.errors import UserError

KL_PENALTIES = ("kl", "abs", "mse", "full")


@dataclass
class PPOConfig:
    """Settings of a PPO run. Batch sizes count samples per process.

    One `step` uses batch_size rollouts and runs ppo_epochs passes over them; each optimiser step uses mini_batch_size ·
    gradient_accumulation_steps of them, mini_batch_size at a time.
    """

    exp_name: str = field(default_factory=lambda: os.path.basename(sys.argv[0]).removesuffix(".py"))
    seed: int = 0
    log_with: str | None = None  # "wandb", "tensorboard", another of accelerate's trackers by name or as an object
    task_name: str | None = None
    model_name: str | None = "gpt2"  # for the script's own use: the trainer takes a model
    query_dataset: str = "stanfordnlp/imdb"  # likewise
    reward_model: str = "sentiment-analysis:lvwerra/distilbert-imdb"  # likewise
    remove_unused_columns: bool = True  # of a dataset: keeps what a model takes, and "query", "response", "label"
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    accelerator_kwargs: dict[str, Any] = field(default_factory=dict)
    project_kwargs: dict[str, Any] = field(default_factory=dict)
    tracker_project_name: str = "fastalign"
    push_to_hub_if_best_kwargs: dict[str, Any] = field(default_factory=dict)  # must stay empty
    steps: int = 20000  # for the script's own use: it calls `step`
    learning_rate: float = 1.41e-5
    adap_kl_ctrl: bool = True  # adapt the coefficient to reach `target`; False: init_kl_coef is constant
    init_kl_coef: float = 0.2
    kl_penalty: str = "kl"  # per token, d = log p - log p_ref: d, |d|, d²/2 or the exact KL over the vocabulary
    target: float = 6.0  # nats per response
    horizon: float = 10000.0  # samples over which the coefficient adapts
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    batch_size: int = 128
    forward_batch_size: int | None = None  # the old name of mini_batch_size
    mini_batch_size: int = 128
    gradient_accumulation_steps: int = 1
    world_size: int | None = None  # set by the trainer, as are the next four
    is_encoder_decoder: bool | None = None
    is_peft_model: bool | None = None
    global_backward_batch_size: int | None = None
    global_batch_size: int | None = None
    backward_batch_size: int | None = None
    ppo_epochs: int = 4
    max_grad_norm: float | None = None
    optimize_cuda_cache: bool | None = None  # the old name of the next
    optimize_device_cache: bool = False  # hand cached GPU memory back around each step
    early_stopping: bool = False  # end a step's passes once the policy has moved 1.5 · target_kl nats per token
    target_kl: float = 1.0
    compare_steps: int = 1
    ratio_threshold: float = 10.0  # a mini batch whose mean ratio exceeds it is skipped
    use_score_scaling: bool = False  # divide scores by their running deviation
    use_score_norm: bool = False  # and subtract their running mean; needs use_score_scaling
    score_clip: float | None = None
    whiten_rewards: bool = False
    gradient_checkpointing: bool = False
    dataset_num_proc: int | None = None
    disable_dropout: bool = True  # not in TRL 0.11, whose ratios contain dropout's noise

    def __post_init__(self) -> None:
        if self.forward_batch_size is not None:
            warnings.warn("forward_batch_size is the old name of mini_batch_size, which is set to it", stacklevel=3)
            self.mini_batch_size = self.forward_batch_size
        if self.optimize_cuda_cache is not None:
            self.optimize_device_cache = self.optimize_cuda_cache
        for name in ("batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be an integer, at least 1, got {value!r}")
        self.backward_batch_size = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % self.backward_batch_size:
            raise UserError(
                f"batch_size must be a multiple of mini_batch_size · gradient_accumulation_steps = "
                f"{self.mini_batch_size} · {self.gradient_accumulation_steps} = {self.backward_batch_size}, "
                f"got {self.batch_size}"
            )
        if self.kl_penalty not in KL_PENALTIES:
            raise UserError(f"kl_penalty must be one of {', '.join(KL_PENALTIES)}, got {self.kl_penalty!r}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}")
        for name in ("learning_rate", "init_kl_coef", "vf_coef"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)!r}")
        for name in ("cliprange", "cliprange_value", "target", "horizon", "target_kl", "ratio_threshold"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)!r}")
        for name in ("max_grad_norm", "score_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} must be positive or None, got {value!r}")
        if self.use_score_norm and not self.use_score_scaling:
            warnings.warn("use_score_norm has no effect without use_score_scaling", stacklevel=3)
        if self.is_encoder_decoder:
            raise UserError("is_encoder_decoder must be False: only causal models are trained")
        if self.push_to_hub_if_best_kwargs:
            raise UserError("push_to_hub_if_best_kwargs is not supported: call trainer.push_to_hub yourself")

    def to_dict(self) -> dict[str, Any]:
        """The options by name, flattened to one level."""
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            flat |= {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        return flat
