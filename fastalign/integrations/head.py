"""The head of any transformers causal model, and a forward pass that never makes its logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastalign.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Head(NamedTuple):
    """logits = softcap(logit_scale · (hidden @ weightᵀ + adapter + bias)): the arguments of `ops.linear_token_logprobs`.

    weight (V, H); bias (V,) or None; adapter (A (r, H), B (V, r), scale) of a LoRA on the head, or None.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    adapter: tuple[Tensor, Tensor, float] | None


def head_of(model: PreTrainedModel) -> Head:
    """Read the head of a causal model: its weight and bias, and what its configuration does to the logits.

    Raises UserError where the model has no output embeddings, or an adapter on them that is not one plain LoRA.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise UserError(f"model must have output embeddings, {type(model).__name__} has none")
    adapter = None
    if hasattr(layer, "base_layer"):
        adapter, layer = _lora(layer), layer.base_layer
    config = model.config.get_text_config()
    return Head(layer.weight, layer.bias, getattr(config, "final_logit_softcapping", None), _scale(config), adapter)


def fused_forward(
    model: PreTrainedModel,
    labels: Tensor,
    *,
    shift_labels: bool = True,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("log_probs",),
    **inputs: Any,
):
    """Per-token log-probabilities of `labels` under a causal model, its (batch, time, vocab) logits never held.

    Equals `ops.token_logprobs(model(**inputs).logits[:, :-1], labels[:, 1:])`; positions whose label is ignored are
    not projected.

    Args:
        model: any transformers causal model, PEFT-wrapped or not, tied head or not.
        labels: (batch, time) int64, usually the input ids with the prompt and the padding set to `ignore_index`.
        shift_labels: position t predicts labels[:, t + 1] and the result is (batch, time - 1); False: labels[:, t].
        temperature, ignore_index, outputs: as in `ops.linear_token_logprobs`.
        inputs: what the model's forward takes: input_ids, attention_mask, position_ids ...

    Returns:
        What `ops.linear_token_logprobs` returns.
    """
    from fastalign.ops import linear_token_logprobs

    inner = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    hidden = inner.base_model(**inputs, use_cache=False).last_hidden_state
    if shift_labels:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    head = head_of(inner)
    return linear_token_logprobs(
        hidden,
        head.weight,
        labels,
        bias=head.bias,
        temperature=temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        ignore_index=ignore_index,
        outputs=outputs,
        adapter=head.adapter,
    )


def _scale(config: Any) -> float:
    """The factor on the logits: every family has its own name for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def _lora(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    active = [name for name in getattr(layer, "active_adapters", ()) if name in getattr(layer, "lora_A", {})]
    if layer.disable_adapters or layer.merged or not active:
        return None
    dropout = layer.lora_dropout[active[0]]
    if len(active) > 1 or (layer.training and not isinstance(dropout, torch.nn.Identity)):
        raise UserError(f"an adapter on the head must be one LoRA without dropout, got {', '.join(active)}")
    name = active[0]
    return layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])
