"""Trainers on the fused losses: DPO, GRPO, PPO, distillation, reward models. TRL and peft are imported only on use."""

from typing import TYPE_CHECKING

from fastalign._base.lazy import lazy

if TYPE_CHECKING:
    from fastalign.train.distill import DistillConfig, DistillTrainer
    from fastalign.train.dpo import DPOConfig, DPOTrainer
    from fastalign.train.grpo import GRPOConfig, GRPOTrainer
    from fastalign.train.ppo import PPOConfig, PPOTrainer
    from fastalign.train.reward import RewardConfig, RewardTrainer
    from fastalign.train.value_head import AutoModelForCausalLMWithValueHead
else:
    _HOMES = {
        "DPOConfig": "dpo",
        "DPOTrainer": "dpo",
        "DistillConfig": "distill",
        "DistillTrainer": "distill",
        "GRPOConfig": "grpo",
        "GRPOTrainer": "grpo",
        "PPOConfig": "ppo",
        "PPOTrainer": "ppo",
        "AutoModelForCausalLMWithValueHead": "value_head",
        "RewardConfig": "reward",
        "RewardTrainer": "reward",
    }
    __getattr__, __dir__ = lazy(__name__, _HOMES)

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "DPOConfig",
    "DPOTrainer",
    "DistillConfig",
    "DistillTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardTrainer",
]
