"""Trainers on the fused losses: DPO, PPO, reward models. TRL and peft are imported only when one is asked for."""

from fastalign._base.lazy import lazy

_HOMES = {
    "DPOConfig": "dpo",
    "DPOTrainer": "dpo",
    "PPOConfig": "ppo",
    "PPOTrainer": "ppo",
    "AutoModelForCausalLMWithValueHead": "value_head",
    "RewardConfig": "reward",
    "RewardTrainer": "reward",
}
__all__ = list(_HOMES)
__getattr__, __dir__ = lazy(__name__, _HOMES)
