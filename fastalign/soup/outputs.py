"""The folder that outputs grow in, beside the one that they become; whether it is ours, what is in it, what else goes there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastalign._base.errors import UserError
from fastalign._base.files import flushes, read_json, write_json
from fastalign._base.outputs import not_an_input
from fastalign._base.work_folder import WorkFolder, hold
from fastalign.soup import plan as plans
from fastalign.soup.checkpoint import INDEX, Shard, index_of
from fastalign.soup.finite import NotFinite
from fastalign.soup.stream import digest_of

RECORD = "soup.json"  # in the output: what was made of what


def already_made(plan: plans.Plan, *, overwrite: bool = False) -> bool:
    """Whether `out` holds this very merge, finished. Raises UserError where it holds anything else, but for another merge that is
    to be overwritten, and where it is an input or in one."""
    not_an_input(plan.target, (one.folder for one in plan.sources))
    out = plan.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not out.is_dir():
        raise UserError(f"{out}: must be a folder, this is a file")
    record = recorded(out)
    if record is not None and record.get("key") == plan.key and record.get("flushed"):
        files = record["files"]
        if all(_finished(out / name, files.get(name)) for shard in plan.layout for name in names_of(plan, shard)):
            return True
    if record is None:
        raise UserError(f"{out}: exists, and no merge made it; choose another folder or remove it")
    if not overwrite:
        raise UserError(f"{out}: exists, and is not this merge, finished and flushed; --overwrite replaces it")
    return False


@contextmanager
def folder_beside(plan: plans.Plan) -> Iterator[WorkFolder]:
    """The folder that becomes `out`, held against another merge; what an interrupted one of the same key left stays."""
    with hold(plan.work, writes=plan.out, what="merge", keeps="shards" if flushes() else None) as work:
        work.begin({"kind": "soup", "key": plan.key, "flushed": flushes()}, anew=not flushes())
        if foreign := work.foreign():
            raise UserError(f"{foreign[0]}: lies where {plan.out} is made, and no merge put it there: move it away")
        yield work


def names_of(plan: plans.Plan, shard: Shard) -> list[str]:
    """Of a shard's files, one in each output."""
    return [(Path(folder) / shard.file).as_posix() for folder in plan.folders]


def recorded(out: Path) -> dict[str, Any] | None:
    """What the output's own record says; None where it has none."""
    try:
        found = read_json(out / RECORD, kind="soup")
    except (ValueError, OSError):
        return None
    return found if isinstance(found.get("files"), dict) else None


def _record(plan: plans.Plan, work: WorkFolder, seen: NotFinite) -> dict[str, Any]:
    return {
        "kind": "soup",
        "key": plan.key,
        "flushed": flushes(),
        **plan.recipe,
        "weights": plan.weights,
        "folders": plan.folders,
        "files": work.digests,
        **({"not_finite": seen.record} if seen else {}),
    }


def _finished(path: Path, digest: str | None) -> bool:
    """A file has its name only when it was whole; its digest says that it is the one."""
    return digest is not None and path.is_file() and digest_of(path) == digest


def finished(plan: plans.Plan, work: WorkFolder) -> list[Shard]:
    """The shards of which every output has its file, as it was made."""
    digests = work.digests
    return [
        shard
        for shard in plan.layout
        if all(_finished(work.path / name, digests.get(name)) for name in names_of(plan, shard))
    ]


def check_space(plan: plans.Plan, work: WorkFolder, headers: list[list[bytes]], done: list[Shard]) -> None:
    needed = sum(
        len(header) + shard.nbytes
        for shard, headed in zip(plan.layout, headers, strict=True)
        for header in headed
        if shard not in done
    )
    if plan.embeddings and len(done) < len(plan.layout):
        needed += plan.embeddings.nbytes
    free = shutil.disk_usage(work.path).free
    if needed > free:
        raise UserError(f"{plan.out}: needs {plans.size(needed)}, the disk has {plans.size(free)} free")


def accompany(plan: plans.Plan, work: WorkFolder, seen: NotFinite) -> None:
    """Index, configuration, tokenizer and templates into every output, and the record."""
    for folder in plan.folders:
        names = [*plan.companions.files(), *([INDEX] if len(plan.layout) > 1 else [])]
        for name in names:
            work.making((Path(folder) / name).as_posix())
        target = work.path / folder
        if len(plan.layout) > 1:
            write_json(target / INDEX, index_of(list(plan.layout)))
        plan.companions.copy(target, plan.out_dtype)
    write_json(work.making(RECORD), _record(plan, work, seen))
