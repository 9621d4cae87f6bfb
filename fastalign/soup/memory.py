"""Soups in memory: a state dict of them, or straight into a live model, for loops that walk ρ and write no files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastalign._base.errors import UserError, printable
from fastalign.soup.architecture import same_model
from fastalign.soup.checkpoint import FLOATS, Checkpoint, in_torch, mapped, of_torch, open_checkpoint, parse_dtype
from fastalign.soup.methods import METHODS
from fastalign.soup.methods.linear import linear_rows
from fastalign.soup.methods.settings import weight_rows
from fastalign.soup.steps import NotFinite
from fastalign.soup.stream import mix_tensors

Source = str | os.PathLike | nn.Module | Mapping[str, Tensor]


def mix(
    models: Sequence[Source],
    weights,
    *,
    dtype: str | torch.dtype | None = None,
    normalize: bool | None = None,
    strict: bool = False,
) -> dict[str, Tensor] | list[dict[str, Tensor]]:
    """The linear soup Σ ρ w as a state dict; for weights (K, m) a list of K.

    models: m modules, state dicts, or checkpoints (files are mapped, not loaded).
    dtype: of the result; None keeps the first model's, tensor by tensor.
    normalize: True divides weights by their sum, False takes them as they are, None asks that they sum to 1.
    Integer and boolean tensors must be equal, and are the first model's own.
    NaN and infinities in a model and numbers beyond the result's type are counted and warned of; strict: an error.
    Raises UserError where names, shapes or kinds of tensors differ.
    """
    held, rows, told = _prepare(models, weights, normalize)
    seen, several = NotFinite(), np.ndim(weights) == 2
    target = None if dtype is None else in_torch(parse_dtype(dtype))
    soups: list[dict[str, Tensor]] = [{} for _ in rows]
    for name, first in held[0].items():
        tensors = [one[name].to(first.device) for one in held]
        if _is_float(first):
            mixed = mix_tensors(tensors, rows, target or first.dtype)
            _look(seen, name, told, tensors, mixed, rows, several=several)
        else:
            mixed = [first] * len(rows)
        for soup, tensor in zip(soups, mixed, strict=True):
            soup[name] = tensor
    _tell(seen, strict=strict)
    return soups if several else soups[0]


def interpolate(
    model: nn.Module, others: Sequence[Source], weights, *, normalize: bool | None = None, strict: bool = False
) -> nn.Module:
    """Set a live model's weights to Σ ρ w over `others`, in place, and return it.

    model: of the same architecture, its own dtypes and device; none of `others` may share its memory, since it is overwritten.
    others: m modules, state dicts or checkpoints; weights: (m,). strict: as `mix` takes it; all is added up twice then.
    Raises UserError, with the model as it was, where names or shapes differ.
    """
    held, rows, told = _prepare(others, weights, normalize)
    if np.ndim(weights) != 1:
        raise UserError(f"interpolate takes weights of shape ({len(others)},), for one model")
    own = model.state_dict()
    names = _common_names([own, held[0]], ["model", "others"])
    for name in names:
        if held[0][name].shape != own[name].shape:
            raise UserError(
                f"{name} has shape {list(own[name].shape)} in the model and {list(held[0][name].shape)} in others"
            )
    places = {tensor.data_ptr() for tensor in own.values() if tensor.numel()}
    if any(tensor.data_ptr() in places for one in held for tensor in one.values()):
        raise UserError(
            "interpolate overwrites the model: none of others may share its tensors; give a copy or its checkpoint"
        )
    for writes in (False, True) if strict else (True,):
        seen = NotFinite()
        for name in names:
            target, mixed = own[name], held[0][name]
            if _is_float(target):
                tensors = [one[name].to(target.device) for one in held]
                (mixed,) = mix_tensors(tensors, rows, target.dtype)
                _look(seen, name, told, tensors, [mixed], rows)
            if writes:
                with torch.no_grad():
                    target.copy_(mixed)
        _tell(seen, strict=strict)
    return model


def _look(
    seen: NotFinite,
    name: str,
    told: Sequence[str],
    inputs: Sequence[Tensor],
    outs: Sequence[Tensor],
    rows: Sequence[Sequence[float]],
    *,
    several: bool = False,
) -> None:
    """Counts what is not finite, of the outputs where all inputs are. told: the models' names.

    Only the outputs are read where these are finite: 0 times NaN is NaN, too.
    """
    bad: Tensor | None = None
    for k, out in enumerate(outs):
        if out.dtype == torch.float8_e4m3fn:  # which has no infinity, and 448 for its largest number
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
            for who, tensor in zip(told, inputs, strict=True):
                mask = ~tensor.double().isfinite()
                seen.add("inputs", who, int(mask.sum()), name)
                bad |= mask
        seen.add("outputs", str(k) if several else "", int((beyond & ~bad).sum()), name)


def _tell(seen: NotFinite, *, strict: bool) -> None:
    if seen and strict:
        raise UserError(f"strict: {seen.message()}")
    if seen:
        warnings.warn(printable(seen.message()), stacklevel=3)


def _prepare(
    models: Sequence[Source], weights, normalize: bool | None
) -> tuple[list[dict[str, Tensor]], list[list[float]], list[str]]:
    """Each model's tensors, of the same names and shapes; the weights' rows; what the models are called."""
    if isinstance(models, str | os.PathLike | nn.Module | Mapping) or not models:
        raise UserError("models must be a list of modules, state dicts, folders, files or hub names")
    METHODS["linear"].check_inputs(len(models), with_base=False)
    rows = linear_rows(weight_rows(weights, len(models)), normalize).tolist()
    opened = [open_checkpoint(one) if isinstance(one, str | os.PathLike) else one for one in models]
    told = [one.name if isinstance(one, Checkpoint) else f"model {number}" for number, one in enumerate(opened)]
    checkpoints = [one for one in opened if isinstance(one, Checkpoint)]
    stored = set(same_model(checkpoints)) if checkpoints else set()
    held = [
        {name: tensor for name, tensor in mapped(one).items() if name in stored}
        if isinstance(one, Checkpoint)
        else _tensors(one)
        for one in opened
    ]
    names = _common_names(held, told)
    for name in names:
        first = held[0][name]
        for one, who in zip(held[1:], told[1:], strict=True):
            other = one[name]
            if other.shape != first.shape or _is_float(other) != _is_float(first):
                raise UserError(
                    f"{name} is {_described(first)} in {told[0]} and {_described(other)} in {who}: cannot be mixed"
                )
            if not _is_float(first) and not torch.equal(other.to(first.device), first):
                raise UserError(f"{name} ({first.dtype}) must be equal in all models, for it cannot be averaged")
    return [{name: one[name].detach() for name in names} for one in held], rows, told


def _tensors(source: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, Mapping) and all(isinstance(tensor, Tensor) for tensor in source.values()):
        return source
    raise UserError(
        f"a model must be a module, a state dict, a folder, a file or a hub name, got {type(source).__name__}"
    )


def _common_names(held: Sequence[Mapping[str, Tensor]], told: Sequence[str]) -> list[str]:
    """Those in every model. A model may hold one tensor under two names, as tied embeddings are, another under one."""
    common = set.intersection(*(set(one) for one in held))
    for one, who in zip(held, told, strict=True):
        for name, tensor in one.items():
            if name in common or any(_same_storage(tensor, one[twin]) for twin in common):
                continue
            lacks = next(other for other, others in zip(told, held, strict=True) if name not in others)
            raise UserError(f"{name} is in {who} and not in {lacks}: the models' tensors must be the same")
    return [name for name in held[0] if name in common]


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.numel() > 0


def _is_float(tensor: Tensor) -> bool:
    return of_torch(tensor.dtype) in FLOATS


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
