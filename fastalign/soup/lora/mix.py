"""Soups of LoRA adapters without their base model: delta W = Σ ρ_i s_i B_i A_i, exact, or of a lower rank.

Averaging the As and the Bs separately does not give this sum: (Σ ρ B)(Σ ρ A) has cross terms B_i A_j. Concatenated,
[ρ_1 s_1 B_1 ... ρ_m s_m B_m] [A_1; ...; A_m] is the sum itself, of rank Σ r_i.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fastalign._base import progress
from fastalign._base.errors import UserError
from fastalign._base.former import renamed
from fastalign._base.outputs import Job
from fastalign.soup.checkpoint import in_torch, parse_dtype
from fastalign.soup.lora import (
    Adapter,
    base_name,
    listed,
    modules_of,
    open_adapters,
    stacked,
)
from fastalign.soup.lora.made import MadeAdapter, existing, from_json, made_adapter, making, to_json, write_adapter
from fastalign.soup.methods.settings import weight_rows
from fastalign.soup.plan import metadata_of
from fastalign.soup.sidecar import stays_within

_KEPT = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")


@renamed(progress="show_progress")
def merge_adapters(
    adapters: Sequence[str | os.PathLike[str]],
    weights: ArrayLike,
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    dtype: str | torch.dtype | None = None,
    force: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> list[MadeAdapter]:
    """The soup Σ ρ_i s_i B_i A_i of LoRA adapters, as one adapter in peft's format.

    Args:
        adapters: m folders with adapter_config.json and adapter_model.safetensors. A module that an adapter does not
            have counts as zero.
        weights: (m,) for one adapter at `out`; (K, m) for K at `out`/0 ... They need not sum to 1.
        out: the output folder. What the same call made there from the same adapters is reused.
        rank: None keeps the exact sum, of rank Σ r_i; a number gives the best approximation of at most that rank in the
            Frobenius norm, computed from the factors alone (QR of each side, SVD of the small product).
        dtype: the stored type; None: float32, or float64 if an input is. peft itself keeps adapters in float32.
        force: merge even if the adapters name different base models. overwrite: replace adapters at `out` that
            fastalign made.

    Tensors that adapters store whole (modules_to_save, biases) are averaged if all have them and the weights sum to 1.
    Raises UserError or FileNotFoundError, before anything is written.
    """
    rows = weight_rows(weights, len(listed(adapters)))
    if rank is not None and not (type(rank) is int and rank >= 1):
        raise UserError(f"rank must be a whole number, at least 1, got {rank!r}")
    stored = None if dtype is None else in_torch(parse_dtype(dtype))
    opened = open_adapters(adapters, force=force)
    target, single = Path(out), np.ndim(weights) == 1
    job = Job(
        "soup",
        {f"adapter {i}": one.folder for i, one in enumerate(opened)},
        {"method": "lora", "rank": rank, "dtype": stored and str(stored), "weights": rows.tolist(), "single": single},
    )
    if (record := existing(target, job, overwrite=overwrite)) is not None:
        return [from_json(one, target) for one in record["adapters"]]
    whole = [_whole(opened, row) for row in rows]
    made = []
    total = len(rows) * len(modules_of(opened))
    with (
        progress.bar("adapters", total=total, unit="modules", show=show_progress) as advance,
        making(target, job, overwrite=overwrite) as (beside, stored_too),
    ):
        for k, row in enumerate(rows):
            folder = beside if single else beside / str(k)
            made.append(_mixed(opened, row, folder, rank, stored, whole[k], advance))
            made[-1] = made[-1]._replace(out=target if single else target / str(k))
        stored_too["adapters"] = [to_json(one, target) for one in made]
    return made


def compressed(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Factors of the best approximation of B A of at most this rank; its squared norm and that of B A.

    With B = Q_b R_b and Aᵀ = Q_a R_a, the singular values of B A are those of the small R_b R_aᵀ.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    energy = s.square()
    return root[:, None] * (v[:rank] @ q_a.T), q_b @ u[:, :rank] * root, float(energy[:rank].sum()), float(energy.sum())


def _mixed(
    adapters: Sequence[Adapter],
    row: np.ndarray,
    folder: Path,
    rank: int | None,
    dtype: torch.dtype | None,
    whole: Mapping[str, Tensor],
    advance: Callable[[int], None],
) -> MadeAdapter:
    """One soup, written to `folder`."""
    factors, norms = {}, {}
    for module in modules_of(adapters):
        advance(1)
        pair = stacked(adapters, row, module)
        if pair is None:
            continue
        a, b = pair
        if rank is not None and rank < len(a):
            small_a, small_b, kept, norm = compressed(a, b, rank)
            norms[module] = kept, norm
            a, b = small_a.to(a.dtype), small_b.to(b.dtype)
        else:
            norm = float(torch.sum((b.double().T @ b.double()) * (a.double() @ a.double().T)))
            norms[module] = norm, norm
        embedding = next(one.factors[module].embedding for one in adapters if module in one.factors)
        factors[module] = (a.to(dtype or a.dtype), b.to(dtype or b.dtype), embedding)
        if not all(x.isfinite().all() for x in factors[module][:2]):
            raise UserError(f"{module}: its factors are not finite, or too large for the stored type")
    if not factors:
        raise UserError("weights must not all be 0: nothing would be left of the adapters")
    recipe = {"method": "lora", "rank": rank, "weights": row.tolist(), "adapters": [one.identity for one in adapters]}
    write_adapter(folder, factors, _settings(adapters, set(factors)), metadata_of(recipe), whole)
    for path in sorted({path for pattern in _KEPT for path in adapters[0].folder.glob(pattern) if path.is_file()}):
        stays_within(path)
        shutil.copyfile(path, folder / path.name)
    return made_adapter(folder, factors, norms)


def _settings(adapters: Sequence[Adapter], modules: set[str]) -> dict[str, Any]:
    """Entries copied to the soup's configuration; the targets as written, if they mean the same in all."""
    first = adapters[0].config
    settings = {
        key: first.get(key)
        for key in ("task_type", "base_model_name_or_path", "revision", "fan_in_fan_out", "bias", "modules_to_save")
        if first.get(key) is not None
    }
    spelt = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")

    def targets(one: Adapter) -> list:
        return [sorted(x) if isinstance(x := one.config.get(key), list) else x for key in spelt]

    if all(set(one.factors) == modules and targets(one) == targets(adapters[0]) for one in adapters):
        settings |= {key: value for key, value in zip(spelt, targets(adapters[0]), strict=True) if value is not None}
    return settings


def _whole(adapters: Sequence[Adapter], row: np.ndarray) -> dict[str, Tensor]:
    """Tensors that adapters store whole: without the base, only their average can be computed."""
    mixed = {}
    for key in dict.fromkeys(key for one in adapters for key in one.whole):
        having = [one for one in adapters if key in one.whole]
        tensors = [one.whole[key] for one in having]
        if any(tensor.shape != tensors[0].shape for tensor in tensors):
            raise UserError(f"{base_name(key)} must have one shape in all adapters that store it whole")
        if ".base_layer." in key and all(torch.equal(tensor, tensors[0]) for tensor in tensors):
            mixed[key] = tensors[0]  # the base model's own, which peft stores beside an embedding's factors
            continue
        if len(having) < len(adapters) or abs(row.sum() - 1) > 1e-6:
            raise UserError(
                f"{base_name(key)} is stored whole (modules_to_save or bias): without the base model it can be mixed "
                "only where all adapters store it and the weights sum to 1; give base to merge them onto it"
            )
        exact: Any = sum(float(rho) * tensor.double() for rho, tensor in zip(row, tensors, strict=True))
        mixed[key] = exact.to(tensors[0].dtype)
    return mixed
