"""LoRA adapters as peft writes them, adapter_config.json beside adapter_model.safetensors: read and checked.

A module's update is delta W = s B A with s = alpha / r, or alpha / sqrt(r) with rslora; A is (r, in) and B (out, r).
Of an embedding, A is (r, vocabulary), B (width, r), and the update is the transpose.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign._base.files import read_json
from fastalign.soup.checkpoint import ADAPTER_CONFIG as CONFIG
from fastalign.soup.checkpoint import FLOATS, File, mapped_file, of_torch, read_header

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Kinds of adapters whose update is not s B A, or does not apply to the base model's weights.
_OTHERS = {
    "use_dora": "DoRA, whose magnitudes are not additive: merge it into its base with peft first",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "an Arrow router",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "one with replicated layers",
    "alora_invocation_tokens": "an activated LoRA",
    "trainable_token_indices": "one with trained tokens",
    "target_parameters": "one of bare parameters, not of modules",
    "lora_bias": "one with a bias in B",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Factors(NamedTuple):
    """One module's update, scale · B A."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scale: float
    embedding: bool


@dataclass(frozen=True)
class Adapter:
    """factors: by module, as the base model names it; whole: tensors stored whole (modules_to_save, biases), by their
    key."""

    name: str
    folder: Path
    config: Mapping[str, Any] = field(repr=False)
    file: File = field(repr=False)
    factors: Mapping[str, Factors] = field(repr=False)
    whole: Mapping[str, Tensor] = field(repr=False)

    @property
    def identity(self) -> dict[str, Any]:
        """Its name without its path, and a hash of its file's header and size."""
        return {"name": self.folder.resolve().name, "files": [self.file.identity]}


def open_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Read an adapter's configuration and header, and map its tensors.

    Raises FileNotFoundError or UserError, one line each: no adapter, an adapter that is not s B A, an invalid file, or
    factors that do not fit each other or the configuration.
    """
    name = os.fspath(folder)
    path = Path(name).expanduser()
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{name}: not a LoRA adapter: no {CONFIG} in it")
    if not (path / WEIGHTS).is_file():
        pickled = f"; adapter_model.bin is a pickle, which is not loaded: save it as {WEIGHTS}"
        raise FileNotFoundError(f"{name}: no {WEIGHTS}{pickled if (path / 'adapter_model.bin').is_file() else ''}")
    config = read_json(path / CONFIG)
    _check_kind(name, config)
    file = read_header(path / WEIGHTS)
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in mapped_file(file).items():
        if not key.startswith(PREFIX):
            raise UserError(f"{name}: tensor {key[:80]!r} must begin with {PREFIX}, as peft writes it")
        module, factor = _split(key.removeprefix(PREFIX))
        if factor:
            factors.setdefault(module, {})[factor] = tensor
        elif "lora_" in module:
            raise UserError(
                f"{name}: tensor {key[:80]!r} is neither a factor A nor B of a linear layer or an embedding"
            )
        elif of_torch(tensor.dtype) not in FLOATS:
            raise UserError(f"{name}: tensor {key[:80]!r} must be floating-point, is {tensor.dtype}")
        else:
            whole[key] = tensor
    if not factors:
        raise UserError(f"{name}: the adapter contains no factors")
    return Adapter(
        name, path, config, file, {module: _factors(name, module, x, config) for module, x in factors.items()}, whole
    )


def open_adapters(folders: Sequence[str | os.PathLike[str]], *, force: bool) -> list[Adapter]:
    """Adapters that can be mixed. Raises like open_adapter, and UserError if they do not fit each other."""
    adapters = [open_adapter(one) for one in listed(folders)]
    _same_bases(adapters, force=force)
    _shapes_agree(adapters)
    return adapters


def listed(adapters: Sequence[str | os.PathLike[str]]) -> Sequence[str | os.PathLike[str]]:
    if isinstance(adapters, str | os.PathLike) or not adapters:
        raise UserError(f"adapters must be a list of folders, got {adapters!r}")
    return adapters


def _same_bases(adapters: Sequence[Adapter], *, force: bool) -> None:
    """Raises UserError if the adapters name different base models."""
    first = adapters[0]
    for other in adapters[1:]:
        mine, theirs = (one.config.get("base_model_name_or_path") for one in (first, other))
        if mine and theirs and mine != theirs and not force:
            raise UserError(
                f"adapters must be of one base model, {first.name} was trained on {mine} and {other.name} on {theirs} "
                "(force=True mixes them)"
            )


def _shapes_agree(adapters: Sequence[Adapter]) -> None:
    """Raises UserError if two adapters' updates of one module differ in shape."""
    seen: dict[str, tuple[str, Any]] = {}
    for one in adapters:
        for module, (a, b, _, embedding) in one.factors.items():
            shape = (b.shape[0], a.shape[1], embedding)
            who, first = seen.setdefault(module, (one.name, shape))
            if first != shape:
                raise UserError(
                    f"{module} must have one shape in all adapters, is {list(first[:2])} in {who} and "
                    f"{list(shape[:2])} in {one.name}"
                )
    values = [one.config.get("bias") or "none" for one in adapters]
    other = next((i for i, value in enumerate(values) if value != values[0]), None)
    if other is not None:
        raise UserError(
            f"bias must be the same in all adapters, is {values[0]!r} in {adapters[0].name} and {values[other]!r} in "
            f"{adapters[other].name}"
        )


def modules_of(adapters: Sequence[Adapter]) -> list[str]:
    """Every module that an adapter updates, those of the first adapter first."""
    return list(dict.fromkeys(module for one in adapters for module in one.factors))


def stacked(
    adapters: Sequence[Adapter], row: np.ndarray, module: str, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor] | None:
    """A (R, in) and B (out, R) with B A = Σ ρ s B_i A_i; None if no adapter with a nonzero weight has the module.

    dtype: None for float32, or float64 if a factor is.
    """
    parts = [
        (rho, one.factors[module]) for rho, one in zip(row, adapters, strict=True) if rho and module in one.factors
    ]
    if not parts:
        return None
    dtype = dtype or wide(*(tensor for _, of in parts for tensor in (of.a, of.b)))
    a = torch.cat([of.a.to(dtype) for _, of in parts])
    b = torch.cat([of.b.to(dtype) * (rho * of.scale) for rho, of in parts], 1)
    return a, b


def _check_kind(name: str, config: Any) -> None:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        came = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{name}: {CONFIG} must be of peft_type LORA, got {came!r}")
    for key, what in _OTHERS.items():
        if config.get(key):
            raise UserError(f"{name}: {key} is set: cannot be merged here, it is {what}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise UserError(
            f"{name}: init_lora_weights {start!r} changed the base model's weights as training began: convert it to a "
            "plain LoRA first (peft's path_initial_model_for_weight_conversion)"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(f"{name}: {key} must map modules to numbers")


def _split(key: str) -> tuple[str, str]:
    """The module and the factor's name; or the key itself and ""."""
    for ending, factor in (
        (".lora_A.weight", "A"),
        (".lora_B.weight", "B"),
        (".lora_embedding_A", "eA"),
        (".lora_embedding_B", "eB"),
    ):
        if key.endswith(ending):
            return key.removesuffix(ending), factor
    return key, ""


def base_name(key: str) -> str:
    """The base model's name for a tensor that an adapter stores whole."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")


def _factors(name: str, module: str, tensors: dict[str, Tensor], config: Mapping[str, Any]) -> Factors:
    embedding = "eA" in tensors or "eB" in tensors
    kinds = ("eA", "eB") if embedding else ("A", "B")
    if set(tensors) != set(kinds):
        raise UserError(f"{name}: {module} must have one factor A and one B")
    a, b = (tensors[kind] for kind in kinds)
    if a.ndim != 2 or b.ndim != 2:
        raise UserError(
            f"{name}: {module}'s factors have shapes {list(a.shape)} and {list(b.shape)}: a convolution's are not "
            "merged"
        )
    if not all(of_torch(x.dtype) in FLOATS for x in (a, b)):
        raise UserError(f"{name}: {module}'s factors must be floating-point, are {a.dtype} and {b.dtype}")
    rank = _setting(name, config, "rank_pattern", "r", module)
    if not (a.shape[0] == b.shape[1] == rank):
        raise UserError(
            f"{name}: {module} must have rank {rank:g} as {CONFIG} says, its factors have shapes {list(a.shape)} and "
            f"{list(b.shape)}"
        )
    alpha = _setting(name, config, "alpha_pattern", "lora_alpha", module)
    return Factors(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), embedding)


def _setting(name: str, config: Mapping[str, Any], pattern: str, key: str, module: str) -> float:
    """A module's rank or alpha: by the first pattern that matches the end of its name, as in peft, else the common
    one."""
    value = config.get(key, 8)
    for ending, mine in (config.get(pattern) or {}).items():
        try:
            if re.match(rf"(.*\.)?({ending})$", module):
                value = mine
                break
        except re.error:
            raise UserError(f"{name}: {pattern} has the key {ending[:80]!r}, not a regular expression") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name}: {key} of {module} must be a number, got {value!r}")
    return value


def wide(*tensors: Tensor) -> torch.dtype:
    """The type to compute in: float32, or float64 if one of these is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
