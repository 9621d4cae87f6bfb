"""A model's linear layers with their products by `ops.products`: oneDNN's where it is faster on this processor."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalign.ops import products


def forward(self: nn.Linear, x: Tensor) -> Tensor:
    """In place of nn.Linear's."""
    return products.linear(x, self.weight, self.bias)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer of torch's own class with torch's own forward."""
    return type(module) is nn.Linear and "forward" not in vars(module)


def is_changed(module: nn.Module) -> bool:
    """Whether hooks, or a forward of its own, stand beside its class's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def room(free: int, spare: int | None) -> int:
    """Bytes that a copy of weights may take, of `free` ones: a quarter, `spare` at most."""
    return free // 4 if spare is None else min(spare, free // 4)


def replaces(module: nn.Module) -> bool:
    """Whether the module's forward is this one."""
    return getattr(vars(module).get("forward"), "__func__", None) is forward


def forwards(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Linear, Callable]]:
    """The linear layers among them, each with its new forward; none if torch's own products are fastest here. Layers of
    other classes and those with a forward of their own are left out."""
    layers = list(filter(is_plain, modules))
    if any(map(products.quicker, {layer.weight.dtype for layer in layers})):
        yield from ((layer, types.MethodType(forward, layer)) for layer in layers)


class PackedLayers:
    """Within `with`, these linear layers' products of about `rows` rows, for inference, with weights packed once, where
    that is faster."""

    def __init__(self, linears: Iterable[nn.Linear], rows: int):
        self._packed: list[tuple[nn.Linear, Callable]] = []
        for layer in linears:
            if (packed := products.pack(layer.weight, rows)) is not None:
                self._packed.append((layer, functools.partial(_packed_forward, layer, packed)))

    def __enter__(self) -> PackedLayers:
        for layer, replacement in self._packed:
            vars(layer)["forward"] = replacement
        return self

    def __exit__(self, *error: object) -> None:
        for layer, _ in self._packed:
            vars(layer).pop("forward", None)


def _packed_forward(layer: nn.Linear, packed: Tensor, x: Tensor) -> Tensor:
    if x.dtype != layer.weight.dtype or torch.is_autocast_enabled("cpu"):
        return F.linear(x, layer.weight, layer.bias)
    return products.packed_linear(x, packed, layer.bias)


class SpedUp:
    """What `speed_up` changed. count: the number of layers. `remove()`, or the end of a `with` block, undoes it."""

    count: int

    def __init__(self, model: nn.Module):
        self._layers = list(forwards(model.modules()))
        self.count = len(self._layers)
        for layer, replacement in self._layers:
            vars(layer)["forward"] = replacement

    def remove(self) -> None:
        for layer, _ in self._layers:
            if replaces(layer):
                del vars(layer)["forward"]
        self._layers.clear()

    def __enter__(self) -> SpedUp:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def speed_up(model: nn.Module) -> SpedUp:
    """Compute the products of any model's nn.Linear layers by whatever is measured to be fastest on this CPU, forward
    and backward: oneDNN instead of MKL on AMD processors with AVX-512, nothing changed on others.

    Results differ from torch's by rounding. Layers wrapped later (by peft, say) keep it. On a GPU, under autocast or
    torch.compile, and for other dtypes than float32 and bfloat16, torch's own product is taken. A second derivative
    raises if oneDNN computed the first.

    Returns a handle: its `remove()` undoes the change, as does the end of a `with` block.
    """
    return SpedUp(model)
