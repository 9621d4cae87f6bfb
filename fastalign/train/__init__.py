"""Trainers on the fused losses: DPO, PPO, reward models. TRL and peft are imported only when one is asked for."""

from __future__ import annotations

import importlib

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


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
