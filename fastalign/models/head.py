"""The head of any transformers causal model, and a forward pass that never computes its full logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign.ops import products
from fastalign.ops.head import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # every family has its own name


class Head(NamedTuple):
    """logits = softcap(logit_scale · (hidden @ weightᵀ + adapter + bias)): the arguments of
    `ops.linear_token_logprobs`.

    weight (V, H); bias (V,) or None; adapter (A (r, H), B (V, r), scale) of a LoRA on the head, or None.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    adapter: Adapter | None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `ops.linear_token_logprobs`."""
        return self._asdict()

    def logits(self, hidden: Tensor, packed: Tensor | None = None) -> Tensor:
        """(..., V) of hidden states (..., H); packed: the weight as `products.pack` made it."""
        if packed is None or hidden.dtype != self.weight.dtype:
            logits = products.linear(hidden, self.weight, self.bias)
        else:
            logits = products.packed_linear(hidden, packed, self.bias)
        if self.adapter is not None:
            a, b, scale = self.adapter
            logits = logits + scale * (hidden @ a.T) @ b.T
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_of(model: PreTrainedModel) -> Head:
    """Read the head of a causal model: its weight and bias, and the logit transforms in its configuration.

    Raises UserError if the model has no output embeddings, or more of them than weight and bias, or an adapter on them
    other than one plain LoRA.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise UserError(f"model must have output embeddings, {type(model).__name__} has none")
    adapter = None
    if hasattr(layer, "base_layer"):
        adapter, layer = _lora(layer), layer.base_layer
    if not isinstance(getattr(layer, "weight", None), Tensor):
        raise UserError(f"model must have a linear head, {type(model).__name__}'s is a {type(layer).__name__}")
    if more := sorted({*layer._parameters} - {"weight", "bias"}):
        raise UserError(f"model must have a linear head, {type(model).__name__}'s has a {more[0]} too")
    config = model.config.get_text_config()
    softcap = next((value for name in _SOFTCAPS if (value := getattr(config, name, None)) is not None), None)
    return Head(layer.weight, getattr(layer, "bias", None), softcap, _scale(config), adapter)


def _scale(config: Any) -> float:
    """The factor on the logits, which every model family names differently."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def _lora(layer: Any) -> Adapter | None:
    """The single plain LoRA on the head, or None. Raises UserError for any other adapter, whose contribution to the
    logits is not a product of two matrices."""
    active = list(getattr(layer, "active_adapters", ()))
    if layer.disable_adapters or layer.merged or not active:
        return None
    name = active[0]
    if len(active) > 1:
        raise UserError(f"an adapter on the head must be one LoRA, got {', '.join(active)}")
    if name not in getattr(layer, "lora_A", {}):
        if name in getattr(layer, "lora_embedding_A", {}) or not hasattr(layer, "lora_A"):
            raise UserError(f"an adapter on the head must be a LoRA, got {type(layer).__name__} {name!r}")
        return None  # this adapter is not on the head
    try:
        return lora_of(layer, name)
    except UserError as error:
        raise UserError(f"an adapter on the head {error}") from None


def lora_of(layer: Any, name: str) -> Adapter:
    """(A (r, H), B (V, r), scale) of peft's LoRA of that name on a layer. Raises UserError, whose text begins with
    "must", unless it adds just x Aᵀ Bᵀ · scale to the layer's product."""
    if getattr(layer, "lora_variant", {}).get(name) is not None or getattr(layer, "use_dora", {}).get(name):
        raise UserError(f"must be a plain LoRA, {name!r} is one of its variants")
    if layer.lora_B[name].bias is not None:
        raise UserError(f"must be a LoRA without a bias, {name!r} has one")
    if layer.training and getattr(layer.lora_dropout[name], "p", 0) > 0:
        raise UserError(f"must have no dropout while it trains, {name!r} has")
    return layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])
