"""The folder that outputs grow in, beside the one that they become; whether it is ours, what is in it, what else goes there."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastalign.data.files import flushes, read_json, write_json
from fastalign.errors import UserError
from fastalign.soup import plan as plans
from fastalign.soup.checkpoint import INDEX, Shard, index_of

RECORD = "soup.json"  # in the output: what was made of what


def already_made(plan: plans.Plan) -> bool:
    """Whether `out` holds this very merge, finished. Raises UserError where it holds anything else."""
    out = plan.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not out.is_dir():
        raise UserError(f"out must be a folder, {out} is a file")
    record = out / RECORD
    if record.is_file() and _key(record) == plan.key:
        paths = [
            (out / folder / shard.file, k, shard) for k, folder in enumerate(plan.folders) for shard in plan.layout
        ]
        if all(finished(path, shard.header(plan.metadata(k)), shard) for path, k, shard in paths):
            return True
    raise UserError(
        f"{out}: exists already and is not this merge, finished and flushed; choose another folder or remove it"
    )


@contextmanager
def folder_beside(plan: plans.Plan) -> Iterator[Path]:
    """The folder that becomes `out`, held against another merge; what an interrupted one of the same key left stays."""
    beside = plan.out.with_name(f".{plan.out.name}.soup")
    beside.mkdir(exist_ok=True)
    lock = os.open(beside, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(lock), os.stat(beside))
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise UserError(f"{plan.out}: another merge is writing it")
        record = beside / RECORD
        if not (record.is_file() and _key(record) == plan.key and flushes()):
            for left in beside.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            write_json(record, _record(plan))
        for left in beside.rglob("*.partial"):  # of whoever was killed
            left.unlink()
        for folder in plan.folders:
            (beside / folder).mkdir(exist_ok=True)
        yield beside
    finally:
        os.close(lock)


def _key(record: Path) -> str | None:
    try:
        found = read_json(record)
    except ValueError:
        return None
    return found.get("key") if isinstance(found, dict) and found.get("flushed", True) else None


def _record(plan: plans.Plan) -> dict:
    return {
        "kind": "soup",
        "key": plan.key,
        "flushed": flushes(),
        **plan.recipe,
        "weights": plan.weights,
        "folders": plan.folders,
    }


def finished(path: Path, header: bytes, shard: Shard) -> bool:
    """A file has its name only when it was whole; its size and header say that it is the one."""
    if not path.is_file() or path.stat().st_size != len(header) + shard.nbytes:
        return False
    with open(path, "rb") as file:
        return file.read(len(header)) == header


def check_space(plan: plans.Plan, beside: Path, headers: list[list[bytes]]) -> None:
    needed = sum(
        len(header) + shard.nbytes
        for shard, headed in zip(plan.layout, headers, strict=True)
        for folder, header in zip(plan.folders, headed, strict=True)
        if not finished(beside / folder / shard.file, header, shard)
    )
    free = shutil.disk_usage(beside).free
    if needed > free:
        raise UserError(f"{plan.out}: needs {plans.size(needed)}, the disk has {plans.size(free)} free")


def accompany(plan: plans.Plan, beside: Path) -> None:
    """Index, configuration, tokenizer and templates into every output."""
    for folder in plan.folders:
        target = beside / folder
        if len(plan.layout) > 1:
            write_json(target / INDEX, index_of(list(plan.layout)))
        plan.companions.copy(target, plan.out_dtype)
