"""Soups in memory, as a state dict or directly in a live model, for loops over ρ that write no files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import overload

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from fastalign._base.errors import UserError, printable
from fastalign.soup.architecture import common_names, same_model
from fastalign.soup.checkpoint import FLOATS, Checkpoint, in_torch, mapped, of_torch, open_checkpoint, parse_dtype
from fastalign.soup.methods import METHODS
from fastalign.soup.methods.linear import linear_rows
from fastalign.soup.methods.settings import weight_rows
from fastalign.soup.steps import NotFinite
from fastalign.soup.stream import mix_tensors

Source = str | os.PathLike[str] | nn.Module | Mapping[str, Tensor]


@overload
def mix(
    models: Sequence[Source],
    weights: Sequence[float],
    *,
    dtype: str | torch.dtype | None = None,
    normalize: bool | None = None,
    strict: bool = False,
) -> dict[str, Tensor]: ...
@overload
def mix(
    models: Sequence[Source],
    weights: Sequence[Sequence[float]],
    *,
    dtype: str | torch.dtype | None = None,
    normalize: bool | None = None,
    strict: bool = False,
) -> list[dict[str, Tensor]]: ...
@overload
def mix(
    models: Sequence[Source],
    weights: ArrayLike,
    *,
    dtype: str | torch.dtype | None = None,
    normalize: bool | None = None,
    strict: bool = False,
) -> dict[str, Tensor] | list[dict[str, Tensor]]: ...
def mix(
    models: Sequence[Source],
    weights: ArrayLike,
    *,
    dtype: str | torch.dtype | None = None,
    normalize: bool | None = None,
    strict: bool = False,
) -> dict[str, Tensor] | list[dict[str, Tensor]]:
    """The linear soup Σ ρ w as a state dict; for weights (K, m) a list of K.

    models: m modules, state dicts, or checkpoints (files are mapped, not loaded).
    dtype: of the result; None keeps the first model's, tensor by tensor.
    normalize: True divides the weights by their sum, False uses them unchanged, None requires that they sum to 1.
    Integer and boolean tensors must be equal, and are taken from the first model.
    NaN and infinities in a model, and numbers outside the result type's range, are counted and give a warning; strict:
    an error. Raises UserError if names, shapes or kinds of tensors differ.

    >>> import torch
    >>> from fastalign import soup
    >>> a, b = {"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([1.0, 4.0])}
    >>> soup.mix([a, b], [0.5, 0.5])
    {'w': tensor([0.5000, 3.0000])}
    """
    states, rows, labels = _prepare(models, weights, normalize)
    seen, several = NotFinite(), np.ndim(weights) == 2
    target = None if dtype is None else in_torch(parse_dtype(dtype))
    soups: list[dict[str, Tensor]] = [{} for _ in rows]
    for name, first in states[0].items():
        tensors = [one[name].to(first.device) for one in states]
        if _is_float(first):
            mixed = mix_tensors(tensors, rows, target or first.dtype)
            _look(seen, name, labels, tensors, mixed, rows, several=several)
        else:
            mixed = [first] * len(rows)
        for soup, tensor in zip(soups, mixed, strict=True):
            soup[name] = tensor
    _tell(seen, strict=strict)
    return soups if several else soups[0]


def interpolate(
    model: nn.Module,
    others: Sequence[Source],
    weights: ArrayLike,
    *,
    normalize: bool | None = None,
    strict: bool = False,
) -> nn.Module:
    """Set a live model's weights to Σ ρ w over `others`, in place, and return it.

    model: of the same architecture, its own dtypes and device; none of `others` may share its memory, since it is
    overwritten. others: m modules, state dicts or checkpoints; weights: (m,). strict: as in `mix`; everything is then
    summed twice. Raises UserError, with the model unchanged, if names or shapes differ.

    >>> import torch
    >>> from fastalign import soup
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> a, b = {"weight": torch.zeros(1, 1)}, {"weight": torch.ones(1, 1)}
    >>> soup.interpolate(model, [a, b], [0.25, 0.75]).weight.item()
    0.75
    """
    states, rows, labels = _prepare(others, weights, normalize)
    if np.ndim(weights) != 1:
        raise UserError(f"interpolate takes weights of shape ({len(others)},), for one model")
    own = model.state_dict()
    names = common_names([own, states[0]], ["model", "others"], _same_storage)
    for name in names:
        if states[0][name].shape != own[name].shape:
            raise UserError(
                f"{name} has shape {list(own[name].shape)} in the model and {list(states[0][name].shape)} in others"
            )
    places = {tensor.data_ptr() for tensor in own.values() if tensor.numel()}
    if any(tensor.data_ptr() in places for one in states for tensor in one.values()):
        raise UserError(
            "interpolate overwrites the model: none of others may share its tensors; give a copy or its checkpoint"
        )
    for writes in (False, True) if strict else (True,):
        seen = NotFinite()
        for name in names:
            target, mixed = own[name], states[0][name]
            if _is_float(target):
                tensors = [one[name].to(target.device) for one in states]
                (mixed,) = mix_tensors(tensors, rows, target.dtype)
                _look(seen, name, labels, tensors, [mixed], rows)
            if writes:
                with torch.no_grad():
                    target.copy_(mixed)
        _tell(seen, strict=strict)
    return model


def _look(
    seen: NotFinite,
    name: str,
    labels: Sequence[str],
    inputs: Sequence[Tensor],
    outs: Sequence[Tensor],
    rows: Sequence[Sequence[float]],
    *,
    several: bool = False,
) -> None:
    """Counts non-finite numbers; in outputs, those whose inputs are all finite. labels: the models' names.

    If the outputs are finite, only they are read: 0 times NaN is NaN, too.
    """
    bad: Tensor | None = None
    for k, out in enumerate(outs):
        if out.dtype == torch.float8_e4m3fn:  # has no infinity; its largest number is 448
            (wide,) = mix_tensors(inputs, [rows[k]], torch.float32)
            beyond = ~(wide.abs() <= 464)
        elif out.dtype.itemsize > 1 and out.sum().isfinite():
            continue
        else:
            beyond = ~out.double().isfinite()
        if not beyond.any():
            continue
        if bad is None:
            bad = torch.zeros_like(beyond)
            for label, tensor in zip(labels, inputs, strict=True):
                mask = ~tensor.double().isfinite()
                seen.add("inputs", label, int(mask.sum()), name)
                bad |= mask
        seen.add("outputs", str(k) if several else "", int((beyond & ~bad).sum()), name)


def _tell(seen: NotFinite, *, strict: bool) -> None:
    if seen and strict:
        raise UserError(f"strict: {seen.message()}")
    if seen:
        warnings.warn(printable(seen.message()), stacklevel=3)


def _prepare(
    sources: Sequence[Source], weights: ArrayLike, normalize: bool | None
) -> tuple[list[dict[str, Tensor]], list[list[float]], list[str]]:
    """Each model's tensors, with the same names and shapes; the weights' rows; the models' names."""
    if isinstance(sources, str | os.PathLike | nn.Module | Mapping) or not sources:
        raise UserError("models must be a list of modules, state dicts, folders, files or hub names")
    METHODS["linear"].check_inputs(len(sources), with_base=False)
    rows = linear_rows(weight_rows(weights, len(sources)), normalize).tolist()
    opened = [open_checkpoint(one) if isinstance(one, str | os.PathLike) else one for one in sources]
    labels = [one.name if isinstance(one, Checkpoint) else f"model {number}" for number, one in enumerate(opened)]
    checkpoints = [one for one in opened if isinstance(one, Checkpoint)]
    stored = set(same_model(checkpoints)) if checkpoints else set()
    models = [_tensors(one, stored) for one in opened]
    names = common_names(models, labels, _same_storage)
    for name in names:
        first = models[0][name]
        for one, label in zip(models[1:], labels[1:], strict=True):
            other = one[name]
            if other.shape != first.shape or _is_float(other) != _is_float(first):
                raise UserError(
                    f"{name} is {_described(first)} in {labels[0]} and {_described(other)} in {label}: cannot be mixed"
                )
            if not _is_float(first) and not torch.equal(other.to(first.device), first):
                raise UserError(f"{name} ({first.dtype}) must be equal in all models, because it cannot be averaged")
    return [{name: one[name].detach() for name in names} for one in models], rows, labels


def _tensors(source: nn.Module | Mapping[str, Tensor] | Checkpoint, stored: set[str]) -> Mapping[str, Tensor]:
    """stored: a checkpoint's tensors that count."""
    if isinstance(source, Checkpoint):
        return {name: tensor for name, tensor in mapped(source).items() if name in stored}
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, Mapping) and all(isinstance(tensor, Tensor) for tensor in source.values()):
        return source
    raise UserError(
        f"a model must be a module, a state dict, a folder, a file or a hub name, got {type(source).__name__}"
    )


def _same_storage(one: Mapping[str, Tensor], name: str, twin: str) -> bool:
    a, b = one[name], one[twin]
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.numel() > 0


def _is_float(tensor: Tensor) -> bool:
    return of_torch(tensor.dtype) in FLOATS


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
