"""Adapters as outputs: in peft's format, with a record of their job, so that the same job reuses them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastalign._base.errors import UserError
from fastalign._base.files import atomic_write, check_folder, write_json
from fastalign._base.outputs import Job, check_same_job, not_an_input, say_already_there
from fastalign._base.work_folder import sha256
from fastalign.soup.checkpoint import ADAPTER_CONFIG as CONFIG
from fastalign.soup.checkpoint import lay_out, of_torch, read_header
from fastalign.soup.lora import PREFIX, WEIGHTS
from fastalign.soup.outputs import RECORD, bytes_of, recorded
from fastalign.soup.stream import naming


class MadeAdapter(NamedTuple):
    """An adapter that was written. kept: the share of the update's squared Frobenius norm that it keeps, over all
    modules; worst: the module with the smallest share, and that share."""

    out: Path
    modules: int
    ranks: tuple[int, int]  # smallest and largest
    kept: float
    worst: tuple[str, float]


def made_adapter(
    out: Path, factors: Mapping[str, tuple[Tensor, Tensor, bool]], norms: Mapping[str, tuple[float, float]]
) -> MadeAdapter:
    """norms: for each module the squared norm of the kept part and of the whole update."""
    ranks = [len(a) for a, _, _ in factors.values()]
    kept, total = (sum(column) for column in zip(*norms.values(), strict=True))
    shares = {module: mine / of if of else 1.0 for module, (mine, of) in norms.items()}
    worst = min(shares, key=lambda module: shares[module])
    share = kept / total if total else 1.0
    return MadeAdapter(out, len(factors), (min(ranks), max(ranks)), share, (worst, shares[worst]))


def write_adapter(
    folder: Path,
    factors: Mapping[str, tuple[Tensor, Tensor, bool]],
    settings: Mapping[str, Any],
    metadata: Mapping[str, str],
    whole: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter for peft from factors (A, B, whether an embedding's) with scale 1: alpha equals the rank.

    settings: further entries of its configuration; target_modules defaults to the modules' full names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (a, b, embedding) in factors.items():
        names = (".lora_embedding_A", ".lora_embedding_B") if embedding else (".lora_A.weight", ".lora_B.weight")
        for ending, tensor in zip(names, (a, b), strict=True):
            tensors[PREFIX + module + ending] = tensor
    tensors |= whole or {}
    (shard,) = lay_out(((name, str(of_torch(x.dtype)), tuple(x.shape)) for name, x in tensors.items()), 2**62)
    with naming(folder / WEIGHTS), open(folder / WEIGHTS, "wb") as file:
        file.write(shard.header(metadata))
        for name in shard.tensors:
            file.write(bytes_of(tensors[name]))
    ranks = {module: a.shape[0] for module, (a, _, _) in factors.items()}
    usual = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "r": usual, "lora_alpha": usual,
        "rank_pattern": others, "alpha_pattern": others, "target_modules": sorted(factors), "fan_in_fan_out": False,
        "bias": "none", "modules_to_save": None, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False,
        "init_lora_weights": True, "inference_mode": True, **settings,
    }  # fmt: skip
    write_json(folder / CONFIG, config)


def existing(out: str | os.PathLike[str], job: Job, *, overwrite: bool) -> dict[str, Any] | None:
    """The record at `out` if this job made it; None if it has to be made, as always with overwrite.

    Raises UserError, one line, if `out` is or contains an input, or contains anything but adapters made here, or those
    of another job without overwrite.
    """
    path = Path(out)
    check_folder(path)
    not_an_input(path, job.inputs.values(), folder=True)
    if not path.exists() or not any(path.iterdir()):
        return None
    record = recorded(path)
    if record is None and not _made_here(path) and not _made_here(path / "0"):
        raise UserError(
            f"{path}: exists, and contains no adapter made by fastalign; choose another folder or remove it"
        )
    if overwrite:
        return None
    if record is None or not isinstance(made := record.get("made"), dict):
        raise UserError(f"{path}: exists; --overwrite replaces it")
    check_same_job(path, made, job.record())
    if record["files"] != _digests(path):
        raise UserError(f"{path}: exists, and was changed since it was made; --overwrite replaces it")
    say_already_there(path)
    return record


@contextmanager
def making(out: str | os.PathLike[str], job: Job, *, overwrite: bool) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a temporary folder that becomes `out` when the block succeeds, and a dict that is stored in its record."""
    with atomic_write(out, replace=overwrite) as beside:
        record: dict[str, Any] = {}
        yield beside, record
        made = {"kind": "soup", "made": job.record(), "files": _digests(beside), **record}
        write_json(beside / RECORD, made)


def to_json(made: MadeAdapter, out: Path) -> dict[str, Any]:
    """A path for the record, relative to `out`."""
    return {**made._asdict(), "out": Path(os.path.relpath(made.out, out)).as_posix()}


def from_json(made: Mapping[str, Any], out: Path) -> MadeAdapter:
    least, most = made["ranks"]
    module, share = made["worst"]
    return MadeAdapter(out / made["out"], made["modules"], (least, most), made["kept"], (module, share))


def _digests(folder: Path) -> dict[str, str]:
    """The digest of every file in the folder except the record, by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {name: sha256(path) for path in files if (name := path.relative_to(folder).as_posix()) != RECORD}


def _made_here(folder: Path) -> bool:
    try:
        return "fastalign" in read_header(folder / WEIGHTS).metadata
    except (OSError, UserError):
        return False
