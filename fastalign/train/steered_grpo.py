"""GRPO towards a palette: its reward weights are λ, steered by the levels that the policy reaches."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign._base.files import read_json, write_json
from fastalign.train.grpo import GRPOTrainer
from fastalign.train.steering import STATE, Baselines, Steering, key_of, within


class SteeredGRPOTrainer(GRPOTrainer):
    """GRPO whose reward weights are the λ of a `Steering`, which moves after every batch of completions.

    Its config must have kl_in_reward, beta 1 and advantage "rloo": then the optimum at each λ is p_λ. Training ends
    when every level holds. The λ and the levels of each step are logged as lam/NAME and level/NAME.
    """

    def __init__(self, *args: Any, steering: Steering, baselines: Baselines, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not (self.args.kl_in_reward and self.args.beta == 1 and self.how == "rloo"):
            raise UserError("a steered GRPOTrainer needs kl_in_reward=True, beta=1.0 and advantage='rloo'")
        self.steering, self.baselines = steering, baselines
        self.reward_weights.copy_(torch.from_numpy(steering.lam))

    def _advantages(self, prompts: list[Any], rewards: Tensor, log_ratios: Tensor | None) -> Tensor:
        advantages = super()._advantages(prompts, rewards, log_ratios)
        if self._mode == "train":
            self._steer(prompts, rewards.numpy())
        return advantages

    def _steer(self, prompts: list[Any], rewards: np.ndarray) -> None:
        levels = self.baselines.levels([key_of(prompt) for prompt in prompts], rewards)
        apart, degrees = within(rewards), rewards.shape[0] * (rewards.shape[1] - 1)
        lam = self.steering.update(levels, apart.T @ apart / max(degrees, 1))
        self.reward_weights.copy_(torch.from_numpy(lam))
        for j, name in enumerate(self.rewards.names):
            self._logs.metrics["train"][f"lam/{name}"].append(float(lam[j]))
            self._logs.metrics["train"][f"level/{name}"].append(float(self.steering.levels[j]))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.steering.holds:
            self.control.should_training_stop = True
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        write_json(os.path.join(folder, STATE), self.steering.state())  # makes the folder
        super()._save_checkpoint(model, trial)  # trainer_state.json comes last: the checkpoint is complete

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = os.path.join(checkpoint, STATE) if checkpoint is not None else ""
        if os.path.isfile(path):
            self.steering.restore(read_json(path))
            self.reward_weights.copy_(torch.from_numpy(self.steering.lam))
