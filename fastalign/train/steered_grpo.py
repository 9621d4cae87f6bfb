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
from fastalign.train.grpo_rollout import Batch, Rollout
from fastalign.train.replay import Replay
from fastalign.train.steering import STATE, Baselines, Steering, covariance, key_of

TRAINED = 0.5  # of the policy's own completions: those of the largest advantages (arXiv 2504.13818)


class SteeredGRPOTrainer(GRPOTrainer):
    """GRPO whose reward weights are the λ of a `Steering`, which moves after every batch of completions.

    Its config must have kl_in_reward, beta 1 and advantage "rloo": then the optimum at each λ is p_λ. Training ends
    when every level holds. The λ and the levels of each step are logged as lam/NAME and level/NAME.

    replay: scored candidates of the base, on which some of the steps train; λ rests in these.
    """

    def __init__(
        self, *args: Any, steering: Steering, baselines: Baselines, replay: Replay | None = None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        if not (self.args.kl_in_reward and self.args.beta == 1 and self.how == "rloo"):
            raise UserError("a steered GRPOTrainer needs kl_in_reward=True, beta=1.0 and advantage='rloo'")
        self.steering, self.baselines, self.replay = steering, baselines, replay
        self.reward_weights.copy_(torch.from_numpy(steering.lam))

    def _generate(self, rows: list[dict[str, Any]]) -> Batch:
        draws = self._step // (self.args.steps_per_generation * self.args.num_iterations)
        if self.replay is None or self._mode != "train":
            return super()._generate(rows)
        if self.replay.turn(draws):
            return self._replayed(self.replay, [row["prompt"] for row in rows][:: self.num_generations], draws)
        return telling(super()._generate(rows))

    def _replayed(self, replay: Replay, prompts: list[Any], draws: int) -> Batch:
        """A batch of candidates, with their advantages under the present policy and λ."""
        rng = np.random.default_rng([self.args.seed, draws, self.accelerator.process_index])
        lam, n = self.reward_weights.numpy(), self.num_generations
        texts = [one for prompt in prompts for one in replay.texts(key_of(prompt), n, lam, rng)]
        prompt_ids = [ids for ids in self._prompts.encode(prompts) for _ in range(n)]
        rollouts = [
            Rollout(ids, one.token_ids, [1] * len(one.token_ids), ref=one.logprobs)
            for ids, one in zip(prompt_ids, texts, strict=True)
        ]
        self._fill("old", rollouts, self.model)
        rewards = torch.from_numpy(np.array([one.rewards for one in texts])).view(len(prompts), n, -1)
        own = [sum(one.old or ()) - sum(one.ref or ()) for one in rollouts]
        advantages = super()._advantages(prompts, rewards, torch.tensor(own, dtype=torch.float64).view(-1, n))
        for one, advantage in zip(rollouts, advantages.flatten().tolist(), strict=True):
            one.advantage = advantage
        lengths = [(len(one.prompt), one.tokens) for one in rollouts]
        ended = [one.completion[-1] in self._ends for one in rollouts]
        self.state.num_input_tokens_seen = self._logs.lengths("train", lengths, ended, self.state.num_input_tokens_seen)
        return Batch(rollouts, sum(one.tokens for one in rollouts))

    def _advantages(self, prompts: list[Any], rewards: Tensor, log_ratios: Tensor | None) -> Tensor:
        advantages = super()._advantages(prompts, rewards, log_ratios)
        if self._mode == "train":
            self._steer(prompts, rewards.numpy())
        return advantages

    def _steer(self, prompts: list[Any], rewards: np.ndarray) -> None:
        levels = self.baselines.levels([key_of(prompt) for prompt in prompts], rewards)
        lam = self.steering.update(levels, covariance(rewards))
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


def telling(batch: Batch) -> Batch:
    """The half of a batch with the largest advantages: a step on the others costs as much and changes little."""
    sizes = [-abs(one.advantage) for one in batch.rollouts]
    kept = sorted(np.argsort(sizes, kind="stable")[: max(round(TRAINED * len(sizes)), 1)].tolist())
    rollouts = [batch.rollouts[i] for i in kept]
    return Batch(rollouts, sum(one.tokens for one in rollouts))
