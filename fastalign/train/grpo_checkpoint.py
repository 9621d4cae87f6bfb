"""What a checkpoint of GRPO holds besides transformers': the completions between two steps on them, and a reference
that follows the policy."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from fastalign._base.files import atomic_write
from fastalign.train.grpo_rollout import Batch, Rollout


class Finished(NamedTuple):
    """Where the last finished step ended, on one process."""

    step: int = 0  # batches trained on
    generation: Batch | None = None  # if the next step trains on it too
    seen: float = 0  # tokens, on all processes


def save(folder: Path, process: int, finished: Finished) -> None:
    kept = finished.generation
    generation = kept and {"rollouts": [asdict(one) for one in kept.rollouts], "tokens": kept.tokens}
    with atomic_write(_rollouts(folder, process)) as beside:
        beside.write_text(json.dumps({"step": finished.step, "generation": generation}), encoding="utf-8")


def load(folder: Path, process: int, seen: float) -> Finished | None:
    """None: the checkpoint has no such file, as TRL's have none."""
    path = _rollouts(folder, process)
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = content["generation"]
    generation = kept and Batch([Rollout(**one) for one in kept["rollouts"]], kept["tokens"])
    return Finished(content["step"], generation, seen)


def save_reference(folder: Path, process: int, reference: Any) -> None:
    """Its weights on this process: a part of a sharded model."""
    with atomic_write(_reference(folder, process)) as beside:
        save_file({name: x.detach().cpu().contiguous() for name, x in _local(reference).items()}, beside)


def load_reference(folder: Path, process: int, reference: Any) -> bool:
    """Whether the checkpoint has one."""
    path = _reference(folder, process)
    if not path.is_file():
        return False
    weights = load_file(path)
    for name, x in _local(reference).items():
        x.copy_(weights[name])
    return True


def _local(model: Any) -> dict[str, Tensor]:
    named = {name: p.detach() for name, p in model.named_parameters()}
    return {name: x.to_local() if hasattr(x, "to_local") else x for name, x in named.items()}


def _rollouts(folder: Path, process: int) -> Path:
    return folder / f"rollouts_{process}.json"


def _reference(folder: Path, process: int) -> Path:
    return folder / f"reference_{process}.safetensors"
