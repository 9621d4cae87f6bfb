"""Checkpoints of a PPO run, from which it resumes exactly: weights, optimiser, random numbers, counters.

A checkpoint is a folder step-<n> in the user's folder, written under another name and renamed, so that a killed run
leaves the previous one intact. Tensors are safetensors, the rest JSON. Only trained weights are saved: to resume, build
the trainer as before, then load.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign._base.files import atomic_write, read_json

KIND = "ppo_checkpoint"


def save(folder: str | Path, step: int, model: Any, optimizer: Any, state: dict[str, Any], accelerator: Any) -> Path:
    """Write <folder>/step-<step>, then remove older ones. Every process calls it; the first one writes."""
    from accelerate.utils import gather_object
    from safetensors.torch import save_file

    folder = Path(folder)
    target = folder / f"step-{step:08d}"
    weights = {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}
    moments, plain = _optimizer_state(optimizer)
    draws, counters = random_state()
    every = gather_object([(draws, counters)])
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if target.exists():  # a run resumed from an earlier checkpoint, or saved twice at one step
            shutil.rmtree(target)
        with atomic_write(target) as beside:
            beside.mkdir()
            save_file(weights, beside / "weights.safetensors")
            save_file(moments, beside / "optimizer.safetensors")
            save_file(
                {f"{r}.{k}": x for r, (d, _) in enumerate(every) for k, x in d.items()}, beside / "random.safetensors"
            )
            state_record = {"kind": KIND, "version": 1, "step": step, "processes": len(every), "optimizer": plain}
            state_record |= {"random": [c for _, c in every], **state}
            (beside / "state.json").write_text(json.dumps(state_record, indent=2) + "\n", encoding="utf-8")
        for old in folder.iterdir():
            if old != target and re.fullmatch(r"step-\d+|\.step-\d+\.\d+\.partial", old.name):
                shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    return target


def load(folder: str | Path, model: Any, optimizer: Any, accelerator: Any) -> dict[str, Any]:
    """Restore the newest checkpoint in `folder` (or `folder` itself if it is one); returns the state given to `save`.

    Raises FileNotFoundError or UserError, one line: no checkpoint, or one for another model, optimiser or number of
    processes.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    folder = newest(folder)
    state = read_json(folder / "state.json", kind=KIND)
    if state["processes"] != accelerator.num_processes:
        raise UserError(
            f"{folder}: was saved by {state['processes']} processes, this run has {accelerator.num_processes}"
        )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with safe_open(folder / "weights.safetensors", "pt") as file:
        saved = set(file.keys())
        if saved != trained.keys():
            odd = sorted(saved ^ trained.keys())[0]
            where = "not in it" if odd in trained else "not trained here"
            raise UserError(f"{folder}: contains another model's weights, {odd} is {where}")
        with torch.no_grad():
            for name, parameter in trained.items():
                stored = file.get_tensor(name)
                if stored.shape != parameter.shape:
                    sizes = f"{tuple(stored.shape)}, here it has {tuple(parameter.shape)}"
                    raise UserError(f"{folder}: {name} has shape {sizes}")
                parameter.copy_(_like(stored, parameter))
    _load_optimizer(folder, optimizer, load_file(folder / "optimizer.safetensors"), state["optimizer"])
    rank = accelerator.process_index
    draws = load_file(folder / "random.safetensors")
    mine = {k.partition(".")[2]: x for k, x in draws.items() if k.startswith(f"{rank}.")}
    restore_random(mine, state["random"][rank])
    return state


def newest(folder: str | Path) -> Path:
    """`folder` itself if it is a checkpoint, else the latest one in it."""
    folder = Path(folder)
    if (folder / "state.json").is_file():
        return folder
    checkpoints = sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())
    if not checkpoints:
        raise FileNotFoundError(f"{folder}: contains no checkpoint")
    return checkpoints[-1]


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This process's generators (torch, CUDA, numpy, Python) as tensors and JSON values."""
    kind, keys, *rest = cast(tuple, np.random.get_state())
    version, words, gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "python": torch.tensor(words),
    }
    tensors |= (
        {f"cuda{i}": x for i, x in enumerate(torch.cuda.get_rng_state_all())} if torch.cuda.is_available() else {}
    )
    return tensors, {"numpy": [kind, *rest], "python": [version, gauss]}


def restore_random(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["torch"])
    kind, *rest = plain["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *rest))
    version, gauss = plain["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    devices = sorted((k for k in tensors if k.startswith("cuda")), key=lambda k: int(k[4:]))
    if devices and torch.cuda.device_count() == len(devices):
        torch.cuda.set_rng_state_all([tensors[k] for k in devices])


def _optimizer_state(optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state's tensors as "<index>.<name>", and everything else: groups, and non-tensor state."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = whole(value)
            else:
                plain[f"{index}.{name}"] = value
    content = {"groups": state["param_groups"], "state": plain}
    try:
        return tensors, json.loads(json.dumps(content))
    except TypeError as error:
        raise UserError(f"optimizer {type(optimizer).__name__} keeps what a checkpoint cannot hold: {error}") from None


def _load_optimizer(folder: Path, optimizer: Any, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    groups = plain["groups"]
    sizes = [len(group["params"]) for group in groups]
    here = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != here:
        raise UserError(f"{folder}: its optimiser has groups of {sizes} parameters, this one of {here}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **plain["state"]}.items():
        index, _, key = name.partition(".")
        parameter = parameters[int(index)]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value = _like(value, parameter)
        state.setdefault(int(index), {})[key] = value
    for group in groups:  # JSON has lists where torch wants pairs
        group |= {k: tuple(v) for k, v in group.items() if isinstance(v, list) and k != "params"}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def whole(x: Tensor) -> Tensor:
    """A full copy on the CPU of a parameter that FSDP2 has sharded. Every process must call it."""
    x = x.detach()
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).cpu().clone(memory_format=torch.contiguous_format)


def _like(whole: Tensor, x: Any) -> Tensor:
    """A full tensor, sharded and placed like x."""
    whole = whole.to(x.device)
    if not hasattr(x, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, x.device_mesh, x.placements)


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state as JSON values."""
    try:
        return json.loads(json.dumps(state))
    except TypeError as error:
        raise UserError(f"lr_scheduler keeps what a checkpoint cannot hold: {error}") from None
