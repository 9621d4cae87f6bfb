"""LoRA adapters merged onto their base model, W + Σ ρ_i s_i B_i A_i, by the streaming merge: rows of W at a time."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

import fastalign
from fastalign._base.errors import UserError
from fastalign._base.former import renamed
from fastalign._base.units import parse_bytes
from fastalign.soup.architecture import config_of, is_tied, is_transposed, same_model
from fastalign.soup.checkpoint import (
    FLOATS,
    SIZES,
    Checkpoint,
    in_torch,
    lay_out,
    open_checkpoint,
    parse_dtype,
    read_bytes,
)
from fastalign.soup.lora import Adapter, Factors, base_name, listed, modules_of, open_adapters, stacked
from fastalign.soup.methods.base import Step
from fastalign.soup.methods.settings import weight_rows
from fastalign.soup.plan import DEFAULT_MEMORY, Plan, identity_of, key_of, out_type
from fastalign.soup.run import Merged, execute, warned
from fastalign.soup.sidecar import TOKENIZER, Sidecar
from fastalign.soup.stream import mix_tensors
from fastalign.soup.vocabulary import EMBEDDINGS

_BLOCK = 32_000_000  # bytes of rows at once, within the memory limit


@renamed(progress="show_progress")
def apply_adapters(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    weights: ArrayLike,
    out: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    memory_limit: int | str | None = None,
    force: bool = False,
    sync: bool = True,
    strict: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Merged:
    """Write the base model plus Σ ρ_i s_i B_i A_i, as `merge` writes a soup: streamed, atomic, resumable.

    base: a folder, a *.safetensors file or a hub name. adapters, weights, force: as in `merge_adapters`; weights (K, m)
    give K models with one read of the base. Tensors that an adapter stores whole count as their difference from the
    base's. dtype, max_shard_size, memory_limit, sync, strict, overwrite: as in `merge`; one module's factors are held
    in addition to memory_limit. Sums are computed in float64 if float32 or wider is stored, else in float32, and
    rounded once.

    Raises UserError or FileNotFoundError before a byte is written; also if a module is not in the base, or is tied to
    one that the adapter does not change (tied embeddings).
    """
    made = plan(
        base, adapters, weights, out, dtype=dtype, max_shard_size=max_shard_size, memory_limit=memory_limit, force=force
    )
    for note in made.notes:
        warnings.warn(note, stacklevel=3)
    return warned(execute(made, sync=sync, strict=strict, overwrite=overwrite, show_progress=show_progress))


def plan(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    weights: ArrayLike,
    out: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    memory_limit: int | str | None = None,
    force: bool = False,
) -> Plan:
    """Check all arguments of `apply_adapters`. Writes nothing."""
    rows = weight_rows(weights, len(listed(adapters)))
    out_dtype = None if dtype is None else parse_dtype(dtype)
    limit = parse_bytes("memory_limit", DEFAULT_MEMORY if memory_limit is None else memory_limit)
    shard_size = parse_bytes("max_shard_size", max_shard_size)
    opened = open_adapters(adapters, force=force)
    model = open_checkpoint(base)
    names = same_model((model,))
    layout = lay_out(((name, out_type(model, name, out_dtype), model[name].shape) for name in names), shard_size)
    changed = _changed(model, opened)
    sidecar = Sidecar(model.folder, model.folder, {})
    recipe = {
        "fastalign": fastalign.__version__,
        "method": "lora",
        "dtype": out_dtype,
        "base": identity_of(model),
        "adapters": [one.identity for one in opened],
    }
    single = np.ndim(weights) == 1
    files = [*model.files, *(one.file for one in opened)]
    key = key_of(files, sidecar, recipe=recipe, weights=rows.tolist(), single=single, shard=shard_size)
    stored = {name: shard.tensors[name].dtype for shard in layout for name in shard.tensors}
    room = min(_BLOCK, limit // 2)

    def step_of(name: str) -> Step:
        if name not in changed:
            return [1.0] * len(rows)
        return functools.partial(_blocks, name, model, opened, rows, *changed[name], in_torch(stored[name]), room)

    return Plan(
        (model,), (model,), Path(out), rows.tolist(), single, tuple(layout), recipe, out_dtype, limit, key, step_of,
        sidecar, _left_behind(model, opened),
    )  # fmt: skip


def _changed(model: Checkpoint, adapters: Sequence[Adapter]) -> dict[str, tuple[str | None, bool]]:
    """For each tensor of the base: the module whose factors change it, if any, and whether W is the transpose of B
    A."""
    changed: dict[str, tuple[str | None, bool]] = {}
    for module in modules_of(adapters):
        name = f"{module}.weight"
        owner = next(one for one in adapters if module in one.factors)
        factors = owner.factors[module]
        _in_base(model, name, owner.name)
        shape, update = model[name].shape, (factors.b.shape[0], factors.a.shape[1])
        if shape not in (update, update[::-1]) or (factors.embedding and shape != update[::-1]):
            raise UserError(f"{name} is {list(shape)} in {model.name}, {owner.name}'s update of it {list(update)}")
        turned = (
            factors.embedding or shape != update or (update[0] == update[1] and _turned_square(model, module, owner))
        )
        if model[name].dtype not in FLOATS:
            raise UserError(f"{name} is {model[name].dtype} in {model.name}: nothing can be added to it")
        changed[name] = (module, turned)
    for one in adapters:
        for key, tensor in one.whole.items():
            name = base_name(key)
            _in_base(model, name, one.name, added=".base_layer." in key)
            if model[name].shape != tuple(tensor.shape) or model[name].dtype not in FLOATS:
                raise UserError(
                    f"{name} is {model[name].dtype} {list(model[name].shape)} in {model.name}, {one.name} stores it "
                    f"whole as {list(tensor.shape)}"
                )
            if tensor.numel():
                changed.setdefault(name, (None, False))
    return changed


def _left_behind(model: Checkpoint, adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """One line for each adapter whose chat template or tokenizer differs from the base's, which the output gets."""

    def others(one: Adapter) -> list[str]:
        names = [path.name for pattern in TOKENIZER for path in sorted(one.folder.glob(pattern)) if path.is_file()]
        of_base = {name: model.folder / name for name in names} if model.folder else {}
        return [
            name
            for name in dict.fromkeys(names)
            if not (
                name in of_base
                and of_base[name].is_file()
                and of_base[name].read_bytes() == (one.folder / name).read_bytes()
            )
        ]

    return tuple(
        f"{one.name}: its {', '.join(names)} {'differs' if len(names) == 1 else 'differ'} from {model.name}'s, and "
        "the output gets the base's"
        for one in adapters
        if (names := others(one))
    )


def _turned_square(model: Checkpoint, module: str, adapter: Adapter) -> bool:
    """Whether a square weight is stored (in, out). The adapter's own flag is that of the last module peft visited, so
    it counts only for a checkpoint without a configuration."""
    if not config_of(model):
        return bool(adapter.config.get("fan_in_fan_out"))
    turned = is_transposed(model, module)
    if turned is None and (
        adapter.config.get("fan_in_fan_out") or any(_only_turned(model, *of) for of in adapter.factors.items())
    ):
        raise UserError(
            f"{module} is square in {model.name}, whose class transformers does not know: whether {adapter.name} "
            "changes it or its transpose cannot be determined; merge it with peft"
        )
    return bool(turned)


def _only_turned(model: Checkpoint, module: str, factors: Factors) -> bool:
    """Whether a linear layer's shape shows that it is stored (in, out)."""
    name, update = f"{module}.weight", (factors.b.shape[0], factors.a.shape[1])
    return not factors.embedding and name in model and update[0] != update[1] and model[name].shape == update[::-1]


def _in_base(model: Checkpoint, name: str, adapter: str, *, added: bool = False) -> None:
    """added: peft stores the tensor beside an embedding's factors, unchanged."""
    if name.endswith(EMBEDDINGS) and not added and is_tied(model):
        raise UserError(
            f"{adapter} changes {name}, which {model.name} ties to its other embedding: merged, both would change; "
            "untie them in the base first"
        )
    if name not in model:
        raise UserError(f"{adapter} changes {name}, which {model.name} does not have: is it the adapter's base model?")


def _blocks(
    name: str,
    model: Checkpoint,
    adapters: Sequence[Adapter],
    rows: np.ndarray,
    module: str | None,
    transposed: bool,
    dtype: torch.dtype,
    room: int,
) -> Iterator[list[Tensor]]:
    """The changed tensor for each of K rows of weights, some of its rows at a time."""
    before = model[name]
    height = before.shape[0] if before.shape else 1
    shape = height, before.numel // height
    whole = [
        (i, one.whole[key].reshape(shape))
        for i, one in enumerate(adapters)
        for key in one.whole
        if base_name(key) == name
    ]
    # One type wider than the stored one, so that the result is the rounded exact sum, except for ties.
    exact = torch.float64 if dtype.itemsize >= 4 else torch.float32
    pairs = [stacked(adapters, row, module, exact) if module else None for row in rows]
    if transposed:
        pairs = [None if pair is None else (pair[1].T, pair[0].T) for pair in pairs]
    sums = [[1 - float(sum(row[i] for i, _ in whole)), *(float(row[i]) for i, _ in whole)] for row in rows]
    width = shape[1] * SIZES[before.dtype]
    step = max(1, room // max(1, shape[1] * exact.itemsize * (len(rows) + 2)))
    for i, data in enumerate(read_bytes(model, name, width * step)):
        span = slice(i * step, (i + 1) * step)
        base = torch.frombuffer(bytearray(data), dtype=in_torch(before.dtype)).view(-1, shape[1])
        starts = mix_tensors([base, *(tensor[span] for _, tensor in whole)], sums, exact)
        for start, pair in zip(starts, pairs, strict=True):
            if pair is not None:
                start.addmm_(pair[1][span], pair[0])
        yield [start if start.dtype == dtype else mix_tensors([start], [[1.0]], dtype)[0] for start in starts]
