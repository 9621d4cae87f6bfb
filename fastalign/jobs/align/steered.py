"""Reinforcement learning to a palette, into a run folder: λ·R less the KL to the base, λ steered (`train.steering`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign._base.files import read_json, write_json
from fastalign.decode.candidates import Candidates
from fastalign.jobs import ppo, trainers
from fastalign.jobs import run as runs
from fastalign.jobs.grpo import prompt_rows
from fastalign.jobs.settings import GRPOOptions, GRPOSettings
from fastalign.rewards import references
from fastalign.train.ppo_checkpoint import newest
from fastalign.train.replay import Replay
from fastalign.train.steering import STATE, Baselines, Rule, Steering, key_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

PROMPTS, GENERATIONS = 8, 8  # of a step of GRPO
RESPONSES = 32  # of a step of PPO
LEAST_LAM = 1e-6


def train_grpo(
    model: str,
    scored: Candidates,
    rewards: Sequence[str],
    solution: Mapping[str, Any],
    out: Path,
    *,
    steered: bool = True,
    **options: Unpack[GRPOOptions],
) -> dict[str, Any]:
    """Train a model to a palette by GRPO, from its own scored candidates; see `train.steering`.

    solution: of `steps.solve_palette`; λ begins at its "lambda" and is steered to its "solved_for", or stays where it
    began. options: of `jobs.grpo.train_grpo`. Returns what is in <out>/result.json, with the last "lambda" and the
    "tokens".
    """
    from fastalign.train.grpo_config import GRPOConfig
    from fastalign.train.steered_grpo import SteeredGRPOTrainer

    names = references.names(rewards)
    size = min(PROMPTS, len(scored.prompts)) * GENERATIONS
    step: GRPOOptions = {"batch_size": size, "num_generations": GENERATIONS, "save_steps": 10}
    fixed: GRPOOptions = {"advantage": "rloo", "loss_type": "dr_grpo", "beta": 1.0}
    settings = GRPOSettings(**(step | options | fixed))
    of = {"values": list(rewards), "solution": dict(solution), "steered": steered}
    of["prompts"] = runs.rows_hash(scored.prompts)
    record = settings.record(command="align grpo", model=model, **of)
    adapters = runs.lora(settings.lora_r, "CAUSAL_LM")
    run = runs.Run(out, record, resume=False, overwrite=settings.overwrite, inputs=ppo.inputs_of(model, rewards))
    if run.result is not None:
        return run.result
    steering = begin(solution, steered)
    with runs.quiet(), run:
        loaded, tokenizer = runs.load_policy(model, settings.dtype, run.out)
        rows = prompt_rows(scored.prompts, tokenizer, None)
        with runs.one_line():
            args = GRPOConfig(
                **trainers.arguments(run, settings.save_steps, settings.log_steps),
                lr_scheduler_type="constant_with_warmup", warmup_steps=3, advantage=settings.advantage,
                loss_type=settings.loss_type, num_generations=settings.num_generations, beta=settings.beta,
                kl_in_reward=True, max_completion_length=settings.max_new_tokens,
            )  # fmt: skip
            make = partial(
                SteeredGRPOTrainer, loaded, ppo.read_values(rewards), args, rows, processing_class=tokenizer,
                peft_config=adapters, steering=steering, baselines=baselines(scored, names, rows["prompt"]),
                replay=Replay(scored, scored.reward_array(names), [key_of(prompt) for prompt in rows["prompt"]]),
            )  # fmt: skip
        shown = {name: f"level/{name}" for name in names} | {"KL": "kl"}
        trainer, speed = trainers.train(run, "grpo", make, shown, settings.show_progress, settings.until)
        runs.save(trainer.accelerator.unwrap_model(trainer.model), tokenizer, run.out)
    return run.finish({
        "steps": trainer.state.global_step, "tokens_per_second": speed, "tokens": trainer._total_train_tokens,
        "lambda": dict(zip(names, steering.lam.tolist(), strict=True)), "holds": steering.holds,
    })  # fmt: skip


def train_ppo(
    model: str,
    scored: Candidates,
    rewards: Sequence[str],
    solution: Mapping[str, Any],
    out: Path,
    *,
    max_new_tokens: int,
    steered: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """As `train_grpo`, by PPO; options: of `jobs.ppo.train_ppo`."""
    steering, names = begin(solution, steered), references.names(rewards)
    lam = np.abs(steering.lam).sum()
    steer = PPOSteer(names, steering, baselines(scored, names, scored.prompts), solution)
    return ppo.train_ppo(
        model,
        scored.prompts,
        rewards,
        (steering.lam / lam if lam else np.ones(len(names))).tolist(),
        out,
        max_new_tokens=max_new_tokens,
        batch_size=min(RESPONSES, len(scored.prompts)),
        save_steps=10,
        steer=steer,
        **options,
    )


def begin(solution: Mapping[str, Any], steered: bool) -> Steering:
    """At the solution's λ; where it is not steered, λ stays there."""
    return Steering.of(solution, Rule() if steered else Rule(gain=0.0, rate=0.0, hold=0))


def baselines(scored: Candidates, names: Sequence[str], prompts: Sequence[Any]) -> Baselines:
    means = scored.reward_array(names).astype(np.float64).mean(axis=1)
    return Baselines({key_of(prompt): mean for prompt, mean in zip(prompts, means, strict=True)}, means.mean(axis=0))


class PPOSteer(ppo.Steer):
    """`jobs.ppo.Steer` by a `Steering`: PPO maximises w·R − β KL, w = λ β and β = 1 / Σ |λ|, whose optimum is p_λ."""

    def __init__(self, names: Sequence[str], steering: Steering, baselines: Baselines, solution: Mapping[str, Any]):
        self.names, self.steering, self.baselines = names, steering, baselines
        self.settings: Any = {**solution, "rule": steering.rule._asdict()}

    def weights(self, trainer: Any, prompts: Sequence[str], scores: np.ndarray) -> np.ndarray:
        keys = [key_of(prompt) for prompt in prompts]
        grouped = scores.astype(np.float64)[:, None]
        apart = scores - np.array([self.baselines.of.get(key, self.baselines.mean) for key in keys])
        lam = self.steering.update(self.baselines.levels(keys, grouped), np.atleast_2d(np.cov(apart.T)))
        scale = max(float(np.abs(lam).sum()), LEAST_LAM)
        trainer.kl_ctl.value = 1.0 / scale
        return lam / scale

    @property
    def holds(self) -> bool:
        return self.steering.holds

    def result(self) -> dict[str, Any]:
        lam = dict(zip(self.names, self.steering.lam.tolist(), strict=True))
        return {"lambda": lam, "holds": self.steering.holds}

    def save(self, folder: Path) -> None:
        write_json(newest(folder) / STATE, self.steering.state())

    def load(self, folder: Path) -> None:
        path = newest(folder) / STATE
        if path.is_file():  # it is written last
            self.steering.restore(read_json(path))
