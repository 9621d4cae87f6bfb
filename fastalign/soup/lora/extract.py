"""A LoRA adapter from two full models: the SVD of tuned - base for each targeted weight, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign._base import progress
from fastalign._base.errors import UserError
from fastalign._base.former import renamed
from fastalign._base.outputs import Job
from fastalign.soup.architecture import config_of, is_tied, is_transposed, same_model
from fastalign.soup.checkpoint import FLOATS, Checkpoint, in_torch, mapped, open_checkpoint, parse_dtype
from fastalign.soup.lora import wide
from fastalign.soup.lora.made import MadeAdapter, existing, from_json, made_adapter, making, to_json, write_adapter
from fastalign.soup.plan import identity_of, metadata_of
from fastalign.soup.vocabulary import EMBEDDINGS

_EMBEDDINGS = ("embed", "wte", "wpe", "lm_head", "shared")
_EXACT = 256  # with fewer rows or columns a full SVD is as fast
_SPARE, _POWERS = 16, 3  # of the randomised range finder


class Extracted(NamedTuple):
    """made.kept counts the targeted modules; kept_of_all also the other tensors that differ, `left_out`."""

    made: MadeAdapter
    kept_of_all: float
    left_out: list[str]


@renamed(progress="show_progress")
def extract_adapter(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    force: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Extracted:
    """Write the adapter, in peft's format, whose update is nearest to tuned - base in the Frobenius norm, module by
    module.

    Args:
        tuned, base: two checkpoints of one architecture: folders, *.safetensors files or hub names.
        out: the output folder. What the same call made there from the same models is reused.
        rank: maximum for each module. energy: or, in (0, 1], the smallest rank that keeps this share of the module's
        squared norm; with both, the smaller of the two.
        targets: the last parts of the modules' names, such as ("q_proj", "v_proj"); None: every linear layer, that is,
        each two-dimensional weight except embeddings and the head.
        dtype: to store in; None: float32.
        force: even if configurations or tokenizers differ.
        out: the output folder. What the same call made there from the same models is reused; overwrite: replace
            whatever adapter fastalign made there.

    Large matrices are reduced by a randomised range finder with power iterations (Halko, Martinsson & Tropp 2011,
    algorithm 4.4), with fixed random numbers; the share kept is exact. One tensor's difference is in memory at a time.
    Raises UserError or FileNotFoundError before anything is written.
    """
    if rank is None and energy is None:
        raise UserError("give rank, or energy, the share of the difference to keep")
    if rank is not None and not (type(rank) is int and rank >= 1):
        raise UserError(f"rank must be a whole number, at least 1, got {rank!r}")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy must be above 0 and at most 1, got {energy!r}")
    stored = torch.float32 if dtype is None else in_torch(parse_dtype(dtype))
    target = Path(out)
    models = open_checkpoint(tuned), open_checkpoint(base)
    settings = {"rank": rank, "energy": energy, "targets": targets and list(targets), "dtype": str(stored)}
    job = Job("soup", {"tuned": tuned, "base": base}, {"method": "extract", **settings})
    if (record := existing(target, job, overwrite=overwrite)) is not None:
        return Extracted(from_json(record["adapters"][0], target), record["kept_of_all"], record["left_out"])
    names = [name for name in same_model(models, force=force) if models[0][name].dtype in FLOATS]
    modules = _modules(models[0], names, targets)
    config = config_of(models[1])
    turned = {name for name in modules if is_transposed(models[1], name.removesuffix(".weight"))}
    tied = next((name for name in modules if name.endswith(EMBEDDINGS) and is_tied(models[1])), None)
    if tied is not None:
        raise UserError(f"{tied} is tied to the embedding in {models[1].name}: an adapter cannot change it alone")
    new, old = (mapped(model) for model in models)
    factors, norms, left_out, rest = {}, {}, [], 0.0
    with progress.bar("extract", total=len(names), unit="tensors", show=show_progress) as advance:
        for name in names:
            exact = wide(new[name], old[name])
            difference = new[name].to(exact) - old[name].to(exact)
            whole = float(difference.double().square().sum())
            if not whole < float("inf"):
                raise UserError(f"{name}: the difference between {models[0].name} and {models[1].name} is not finite")
            if whole and name in modules:
                a, b, mine = _low_rank(difference.T if name in turned else difference, whole, rank, energy)
                module = name.removesuffix(".weight")
                factors[module] = (a.to(stored), b.to(stored), False)
                norms[module] = mine, whole
            elif whole:
                left_out.append(name)
                rest += whole
            advance(1)
    if not factors:
        raise UserError(f"{models[0].name} and {models[1].name} are equal in all {len(modules)} targeted modules")
    made = made_adapter(target, factors, norms)
    recipe = {
        "method": "extract",
        "rank": rank,
        "energy": energy,
        "models": [identity_of(model) for model in models],
        "kept": made.kept,
    }
    settings = {"task_type": _task(config), "base_model_name_or_path": models[1].name, "fan_in_fan_out": bool(turned)}
    aimed = sum(whole for _, whole in norms.values())
    extracted = Extracted(made, made.kept * aimed / (aimed + rest), left_out)
    with making(target, job, overwrite=overwrite) as (beside, stored_too):
        write_adapter(beside, factors, settings, metadata_of(recipe))
        stored_too |= {"adapters": [to_json(made, target)], "kept_of_all": extracted.kept_of_all, "left_out": left_out}
    return extracted


def _modules(model: Checkpoint, names: Sequence[str], targets: Sequence[str] | None) -> set[str]:
    """The targeted weights."""
    linear = {
        name
        for name in names
        if name.endswith(".weight")
        and len(model[name].shape) == 2
        and not any(part in name for part in _EMBEDDINGS[:-2])
    }
    if targets is None:
        return {name for name in linear if not any(part in name for part in _EMBEDDINGS)}
    for ending in targets:
        if not any(name.endswith(f".{ending}.weight") or name == f"{ending}.weight" for name in linear):
            last = sorted({name.split(".")[-2] for name in linear if "." in name})
            raise UserError(f"targets must be linear layers of the model ({', '.join(last)}), got {ending!r}")
    return {name for name in linear if any(f".{name}".endswith(f".{ending}.weight") for ending in targets)}


def _task(config: dict) -> str | None:
    """peft's task type of the model."""
    kinds = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    }
    named = str((config.get("architectures") or [""])[0])
    return next((task for ending, task in kinds.items() if named.endswith(ending)), None)


def _low_rank(d: Tensor, whole: float, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor, float]:
    """A (r, in), B (out, r), and the squared norm of B A, which is at most `whole`, that of d."""
    least = min(d.shape)
    width = least if least <= _EXACT or rank is None else min(least, rank + _SPARE)
    if rank is None and least > _EXACT:
        width = 64
    while True:
        u, s, v = _svd(d, width)
        sums = s.double().square().cumsum(0).clamp_(max=whole)
        chosen = min(rank or least, len(s))
        if energy is not None:
            enough = int((sums < energy * whole * (1 - 1e-6)).sum()) + 1
            if enough > len(s) and width < least and (rank is None or rank > len(s)):
                width = min(least, 2 * width)
                continue
            chosen = min(chosen, enough)
        root = s[:chosen].sqrt()
        return root[:, None] * v[:chosen], u[:, :chosen] * root, float(sums[chosen - 1])


def _svd(d: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values and vectors of d within a random subspace of this dimension; at full width, all."""
    if width >= min(d.shape) // 2:
        return torch.linalg.svd(d, full_matrices=False)
    draw = torch.randn(d.shape[1], width, generator=torch.Generator().manual_seed(0), dtype=d.dtype)
    q = torch.linalg.qr(d @ draw)[0]
    for _ in range(_POWERS):
        q = torch.linalg.qr(d @ torch.linalg.qr(d.T @ q)[0])[0]
    u, s, v = torch.linalg.svd(q.T @ d, full_matrices=False)
    return q @ u, s, v
