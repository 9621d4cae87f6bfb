"""Checks of PPOTrainer's arguments: one line with the argument, the rule and the value received."""

from __future__ import annotations

import warnings
from typing import Any

from fastalign._base.errors import UserError
from fastalign.train.ppo_config import PPOConfig
from fastalign.train.value_head import AutoModelForCausalLMWithValueHead


def arguments(
    config: Any,
    model: Any,
    ref_model: Any,
    tokenizer: Any,
    lr_scheduler: Any,
    optimizer: Any,
    training_data_collator: Any,
) -> None:
    if not isinstance(config, PPOConfig):
        raise TypeError(f"config must be a PPOConfig, got {type(config).__name__}")
    if not isinstance(model, AutoModelForCausalLMWithValueHead):
        raise TypeError(f"model must be an AutoModelForCausalLMWithValueHead, got {type(model).__name__}")
    if ref_model is not None and not (
        isinstance(ref_model, AutoModelForCausalLMWithValueHead) or hasattr(ref_model, "get_output_embeddings")
    ):
        raise TypeError(f"ref_model must be a causal model or None, got {type(ref_model).__name__}")
    if tokenizer is None or not hasattr(tokenizer, "eos_token_id"):
        raise TypeError(f"tokenizer must be the model's tokenizer, got {type(tokenizer).__name__}")
    if lr_scheduler is not None and optimizer is None:
        raise UserError("lr_scheduler needs the optimizer that it steers, got None")
    if training_data_collator is not None:
        raise UserError("training_data_collator must be None: step pads what it is given itself")
    size = _entries(model)
    if ref_model is not None and _entries(ref_model) != size:
        raise UserError(f"ref_model must have the model's vocabulary, got {_entries(ref_model):,} and {size:,} entries")
    if len(tokenizer) > size:
        raise UserError(f"tokenizer has {len(tokenizer):,} tokens, the model's embedding only {size:,}")


def _entries(model: Any) -> int:
    return getattr(model, "causal_lm", model).get_input_embeddings().weight.shape[0]


def pad_token(tokenizer: Any) -> int:
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    if tokenizer.eos_token_id is None:
        raise UserError("tokenizer must have a pad token or an end token, it has neither")
    warnings.warn(f"tokenizer has no pad token: its end token {tokenizer.eos_token!r} pads", stacklevel=3)
    return tokenizer.eos_token_id
