"""Forward passes of a trainer that change nothing: of its reference, and of the policy before a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

REFERENCE = "ref"  # the name of the adapters' frozen copy, as TRL's


@contextmanager
def unchanged(trainer: Any, model: torch.nn.Module) -> Iterator[None]:
    """Within the block, `model` runs without gradients, dropout and checkpointing, in the trainer's precision."""
    checkpointing = disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs)
    with torch.no_grad(), _evaluating(model), checkpointing, trainer.accelerator.autocast():
        yield


def reference_adapter(trainer: Any) -> AbstractContextManager:
    """Within the block, a policy with adapters is its own reference: their frozen copy, or the model without them."""
    inner = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.ref_model is not None or not hasattr(inner, "peft_config"):
        return nullcontext()
    return use_adapter(inner, adapter_name=REFERENCE if REFERENCE in inner.peft_config else None)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Disables dropout; restores every module's mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
