"""Checks of GRPOTrainer's arguments: one line with the argument, the rule and the value received."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
import transformers
import trl

from fastalign._base.errors import UserError
from fastalign.models.identity import language_model
from fastalign.ops.checks import WrongType, shown


def arguments(
    model: Any,
    args: Any,
    callbacks: Any,
    optimizers: Any,
    quantization_config: Any,
    peft_config: Any,
    rollout_func: Any,
) -> None:
    """Raises UserError for a wrong type, and for settings that need another argument; warns of those without effect."""
    _check_model(model)
    if args is not None and not isinstance(args, trl.GRPOConfig):
        raise WrongType(f"args must be a GRPOConfig, got {type(args).__name__}")
    if not _are_callbacks(callbacks):
        raise WrongType(f"callbacks must be a list of TrainerCallback, got {shown(callbacks)}")
    if not _are_optimizers(optimizers):
        raise WrongType(f"optimizers must be a pair, an optimizer and its scheduler or None, got {shown(optimizers)}")
    if peft_config is not None:
        _check_adapter(peft_config)
    if rollout_func is not None and not callable(rollout_func):
        raise WrongType(f"rollout_func must be a function of prompts and trainer, got {shown(rollout_func)}")
    if getattr(args, "importance_correction", False) and rollout_func is None:
        raise UserError("importance_correction needs a rollout_func: the trainer's own draws are the policy's")
    if not isinstance(model, str | os.PathLike):
        kwargs = getattr(args, "model_init_kwargs", None)
        for name, value in (("quantization_config", quantization_config), ("model_init_kwargs", kwargs)):
            if value is not None:
                warnings.warn(f"{name} has no effect on the model: it is already loaded", stacklevel=3)


def _check_model(model: Any) -> None:
    if isinstance(model, str | os.PathLike):
        return
    rule = "model must be a causal language model, or the name or folder of one"
    inner = language_model(model)
    if not isinstance(inner, transformers.PreTrainedModel):
        raise WrongType(f"{rule}, got {shown(model)}")
    if inner.get_output_embeddings() is None or inner.config.is_encoder_decoder:
        raise WrongType(f"{rule}, got {type(inner).__name__}")


def _are_callbacks(given: Any) -> bool:
    def is_one(x: Any) -> bool:
        return issubclass(x if isinstance(x, type) else type(x), transformers.TrainerCallback)

    return given is None or (isinstance(given, list | tuple) and all(map(is_one, given)))


def _are_optimizers(given: Any) -> bool:
    if not isinstance(given, list | tuple) or len(given) != 2:
        return False
    kinds = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
    return all(one is None or isinstance(one, kind) for one, kind in zip(given, kinds, strict=True))


def _check_adapter(peft_config: Any) -> None:
    try:
        from peft import PeftConfig
    except ImportError:
        raise UserError("peft_config needs the package peft: pip install 'fastalign[trl]'") from None
    if not isinstance(peft_config, PeftConfig):
        raise WrongType(f"peft_config must be a peft.PeftConfig such as LoraConfig, got {shown(peft_config)}")
