"""A model whose plain LoRA layers run as single linear layers, for inference.

peft adds two products and three passes to each layer's product, and hides the layer from everything that looks for
torch's own. Weights merged for a while cost one product of rank r each, and the memory of a copy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastalign._base.devices import free_memory
from fastalign._base.errors import UserError
from fastalign.models.head import lora_of
from fastalign.models.linear_layers import is_changed, is_plain, room
from fastalign.ops.head import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MergedLora:
    """Within `with`, each plain LoRA layer of a model (arXiv 2106.09685) is one nn.Linear of weight W + Σ scale · B A,
    summed in float32 (or float64) and rounded once, as they are now. Outside the block the model is unchanged.

    Layers of other kinds stay: DoRA and other variants, quantized or sharded weights, dropout in training, hooks. So do
    all where the copies would take more than a quarter of the available memory or more than `spare` bytes. nbytes: what
    they take; linears: the layers that run in the block.
    """

    nbytes: int
    linears: nn.ModuleList

    def __init__(self, model: PreTrainedModel, spare: int | None = None):
        self._layers: list[tuple[dict[str, Any], str, nn.Module]] = []
        self.linears = nn.ModuleList()
        found = list(_found(model))
        weights = [layer.base_layer.weight for _, _, layer, pairs in found if pairs]
        self.nbytes = sum(weight.nbytes for weight in weights)
        if weights and self.nbytes > room(_free(weights[0].device), spare):
            self.nbytes = 0
            return
        for children, name, layer, pairs in found:
            self._layers.append((children, name, layer))
            self.linears.append(_merged(layer.base_layer, pairs))

    def __enter__(self) -> MergedLora:
        for (children, name, _), linear in zip(self._layers, self.linears, strict=True):
            children[name] = linear
        return self

    def __exit__(self, *error: object) -> None:
        for children, name, layer in self._layers:
            children[name] = layer


def _found(model: PreTrainedModel) -> Iterator[tuple[dict[str, Any], str, Any, list[Adapter]]]:
    """(its parent's modules, its name among them, the layer, its active adapters) of each that may be merged, other
    than the head."""
    lora = sys.modules.get("peft.tuners.lora.layer")
    if lora is None:  # not imported: there are none
        return
    head = model.get_output_embeddings()
    for parent in model.modules():
        for name, layer in parent._modules.items():
            if type(layer) is lora.Linear and layer is not head and (pairs := _pairs(layer)) is not None:
                yield parent._modules, name, layer, pairs


def _pairs(layer: Any) -> list[Adapter] | None:
    """What is added to the base layer's product; None where more than that happens."""
    base = layer.base_layer
    if not is_plain(base) or not _is_whole(base) or any(map(is_changed, layer.modules())):
        return None
    if layer.merged or layer.disable_adapters:
        return None if layer.merged and layer.disable_adapters else []  # peft's forward then takes them out
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not all(is_plain(x) and _is_whole(x) for name in names for x in (layer.lora_A[name], layer.lora_B[name])):
        return None
    try:
        return [lora_of(layer, name) for name in names]
    except UserError:
        return None


def _is_whole(linear: nn.Linear) -> bool:
    """Not a shard, nor in another format."""
    weight = linear.weight
    return type(weight) is nn.Parameter and weight.shape == (linear.out_features, linear.in_features)


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


@torch.no_grad()
def _merged(base: nn.Linear, pairs: list[Adapter]) -> nn.Linear:
    if not pairs:
        return base
    wide = torch.promote_types(base.weight.dtype, torch.float32)
    total = base.weight.to(wide)
    for a, b, scale in pairs:
        total = torch.addmm(total, b.to(wide), a.to(wide), alpha=scale)
    merged = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    merged.weight = nn.Parameter(total.to(base.weight.dtype), requires_grad=False)
    merged.bias = base.bias
    return merged.train(base.training)
