"""Models that FSDP2 has sharded over processes: access to their full weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from fastalign.models.head import Head
from fastalign.train.value_head import AutoModelForCausalLMWithValueHead


def inside(wrapped: Any, model: Any, call: Callable) -> Any:
    """call(), within the model's forward pass if FSDP2 gathers its weights only there."""
    return wrapped(call=call) if is_sharded(model) else call()


def is_sharded(model: torch.nn.Module) -> bool:
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def reshard(model: torch.nn.Module) -> None:
    """Shards the weights again that FSDP2 leaves gathered after a forward pass without a backward one."""
    from torch.distributed.fsdp import FSDPModule

    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def whole_layers(model: Any):
    """Layers sharded by FSDP2 stay gathered from one forward pass to the next, so that no process waits for another."""
    from torch.distributed.fsdp import FSDPModule

    with ExitStack() as undo:
        for part in model.modules():
            if isinstance(part, FSDPModule) and part is not model:
                part.set_reshard_after_forward(False, recurse=False)
                undo.callback(part.set_reshard_after_forward, True, recurse=False)
                part.unshard()
                undo.callback(part.reshard)
        yield


def whole_head(model: AutoModelForCausalLMWithValueHead) -> Head:
    """The last forward pass's head, as plain tensors without gradient."""

    def whole(x: Any) -> Any:
        return x if x is None else (x.full_tensor() if hasattr(x, "full_tensor") else x).detach()

    head = model.head
    adapter = head.adapter and (whole(head.adapter[0]), whole(head.adapter[1]), head.adapter[2])
    return head._replace(weight=whole(head.weight), bias=whole(head.bias), adapter=adapter)
