"""The outputs' files: the folder that they grow in, beside the one that they become, and their shards, one after another."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign._base.errors import UserError
from fastalign._base.files import flushes, read_json, sync, write_json
from fastalign._base.outputs import not_an_input
from fastalign._base.work_folder import WorkFolder, hold
from fastalign.soup.checkpoint import FLOATS, INDEX, SIZES, Checkpoint, Shard, in_torch, index_of, read_bytes, unchanged
from fastalign.soup.methods.base import Blocks, Step
from fastalign.soup.plan import Plan, size
from fastalign.soup.steps import NotFinite, Seen, Segment, StreamError, Tasks
from fastalign.soup.stream import (
    added,
    allocate,
    bytes_moved,
    chunk_for,
    digest,
    digest_of,
    joined,
    merge_tasks,
    pieces,
    stream,
    write_behind,
)

if TYPE_CHECKING:
    import torch

# ---- the folder ----


RECORD = "soup.json"  # in the output: what was made of what


def already_made(plan: Plan, *, overwrite: bool = False) -> bool:
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
def folder_beside(plan: Plan) -> Iterator[WorkFolder]:
    """The folder that becomes `out`, held against another merge; what an interrupted one of the same key left stays."""
    with hold(plan.work, writes=plan.out, what="merge", keeps="shards" if flushes() else None) as work:
        work.begin({"kind": "soup", "key": plan.key, "flushed": flushes()}, anew=not flushes())
        if foreign := work.foreign():
            raise UserError(f"{foreign[0]}: lies where {plan.out} is made, and no merge put it there: move it away")
        yield work


def names_of(plan: Plan, shard: Shard) -> list[str]:
    """Of a shard's files, one in each output."""
    return [(Path(folder) / shard.file).as_posix() for folder in plan.folders]


def recorded(out: Path) -> dict[str, Any] | None:
    """What the output's own record says; None where it has none."""
    try:
        found = read_json(out / RECORD, kind="soup")
    except (ValueError, OSError):
        return None
    return found if isinstance(found.get("files"), dict) else None


def _record(plan: Plan, work: WorkFolder, seen: NotFinite) -> dict[str, Any]:
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


def finished(plan: Plan, work: WorkFolder) -> list[Shard]:
    """The shards of which every output has its file, as it was made."""
    digests = work.digests
    return [
        shard
        for shard in plan.layout
        if all(_finished(work.path / name, digests.get(name)) for name in names_of(plan, shard))
    ]


def check_space(plan: Plan, work: WorkFolder, headers: list[list[bytes]], done: list[Shard]) -> None:
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
        raise UserError(f"{plan.out}: needs {size(needed)}, the disk has {size(free)} free")


def accompany(plan: Plan, work: WorkFolder, seen: NotFinite) -> None:
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


# ---- a shard ----


_BATCH = 64_000_000  # bytes moved between two steps of the progress bar
# A merge that writes more leaves no pages behind in the cache: new memory for all of them can take longer than the disk.
_KEPT = 1 << 30


def write_shard(
    plan: Plan,
    shard: Shard,
    headers: list[bytes],
    targets: list[Path],
    files: dict[Path, int],
    chunk: int,
    threads: int,
    moved: Callable[[int], None],
) -> tuple[list[str], NotFinite]:
    """Written under names of their own, flushed, and renamed once they are whole. Returns the files' digests, and what was met of
    numbers that are not finite."""
    partial = [path.with_name(path.name + ".partial") for path in targets]
    try:
        with ExitStack() as stack:
            outs = []
            for path, header in zip(partial, headers, strict=True):
                # Not cut short, but new: closing a file that was cut to nothing, ext4 begins to write it at once.
                outs.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644))
                stack.callback(os.close, outs[-1])
                with naming(path):
                    allocate(outs[-1], len(header) + shard.nbytes)
            writer = _Writer(plan, shard, headers, partial, outs, files, chunk, threads, moved)
            writer.write_all()
            unchanged(plan.sources)
            for out, path in zip(outs, partial, strict=True):
                if flushes():
                    with naming(path):
                        os.fsync(out)
        for path, target in zip(partial, targets, strict=True):
            os.replace(path, target)
            sync(target.parent)
        digests = zip(writer.digests, targets, strict=True)
        return [digest(total, target) if flushes() else "" for total, target in digests], writer.seen
    except BaseException:
        for path in partial:
            path.unlink(missing_ok=True)
        raise


@dataclass
class _Writer:
    """Fills a shard's files, open as `outs`, one in each output."""

    plan: Plan
    shard: Shard
    headers: list[bytes]
    paths: list[Path]
    outs: list[int]
    files: dict[Path, int]  # the inputs', open
    chunk: int
    threads: int
    moved: Callable[[int], None]

    def __post_init__(self) -> None:
        self.digests, self.seen = [0] * len(self.outs), NotFinite()

    def write_all(self) -> None:
        for k, header in enumerate(self.headers):
            self.write(k, header, 0)
        # Steps as they come: what a step reads is in the cache when its tensor is merged.
        steps = (
            (name, tensor.dtype, self.step_of(name)) for name, tensor in self.shard.tensors.items() if tensor.nbytes
        )
        for (kind, dtype), group in itertools.groupby(steps, key=lambda one: (type(one[2]), one[1])):
            if kind is list:
                self.sums(((name, weights) for name, _, weights in group), dtype)
                continue
            for name, _, step in group:
                if kind is Tasks:
                    self.run([self.segment(name, [])], dtype, step)
                elif step is None:
                    self.copy(name)
                else:
                    self.blocks(name, step)

    def step_of(self, name: str) -> Step | None:
        """None where a tensor is copied."""
        return self.plan.step_of(name) if self.shard.tensors[name].dtype in FLOATS else None

    def write(self, k: int, data: bytes | memoryview, offset: int) -> None:
        left, at = memoryview(data), offset
        with naming(self.paths[k]):
            while left:
                done = os.pwrite(self.outs[k], left, at)
                left, at = left[done:], at + done
        if flushes():
            self.digests[k] += added(data, offset)

    def copy(self, name: str) -> None:
        """A tensor that is the same in all inputs."""
        tensor = self.shard.tensors[name]
        for k, header in enumerate(self.headers):
            at = len(header) + tensor.offset
            for block in read_bytes(self.plan.inputs[0], name):
                self.write(k, block, at)
                at += len(block)
        self.moved(tensor.nbytes * (len(self.plan.inputs) + len(self.outs)))

    def blocks(self, name: str, make: Blocks) -> None:
        at = self.shard.tensors[name].offset
        for blocks in make():
            for k, (header, block) in enumerate(zip(self.headers, blocks, strict=True)):
                self.write(k, bytes_of(block), len(header) + at)
                self.look_at_block(name, k, block)
            at += blocks[0].nbytes
        self.moved(sum(one[name].nbytes for one in self.plan.inputs) + self.shard.tensors[name].nbytes * len(self.outs))

    def sums(self, tensors: Iterator[tuple[str, list[float]]], dtype: str) -> None:
        """Weighted sums of tensors of one type: neighbours joined, then in batches that move some 64 MB each."""
        batch: list[Segment] = []
        for whole in joined((self.segment(*one) for one in tensors), SIZES[dtype]):
            for piece in pieces(whole, dtype, _BATCH):
                batch.append(piece)
                if sum(bytes_moved(one, dtype) for one in batch) >= _BATCH:
                    self.run(batch, dtype)
                    batch = []
        if batch:
            self.run(batch, dtype)

    def segment(self, name: str, weights: list[float]) -> Segment:
        tensor = self.shard.tensors[name]
        offsets = [len(header) + tensor.offset for header in self.headers]
        return segment(self.plan, name, tensor.count, self.outs, offsets, self.files, weights)

    def run(self, segments: list[Segment], dtype: str, tasks: Tasks | None = None) -> None:
        try:
            if tasks is None:
                seen = stream(segments, dtype, chunk=self.chunk, threads=self.threads)
            else:
                seen = merge_tasks(segments[0], tasks, dtype, chunk=self.chunk, threads=self.threads)
        except StreamError as error:
            raise OSError(error.errno or 5, error.strerror, str(self.path_of(error, segments))) from None
        self.digests = [total + more for total, more in zip(self.digests, seen.digests, strict=True)]
        self.look_at(segments, dtype, seen)
        self.moved(sum(bytes_moved(one, dtype) for one in segments))
        if flushes():
            write_behind(self.outs)
            if self.plan.written_bytes > _KEPT and hasattr(os, "posix_fadvise"):
                for out in self.outs:  # pages that have reached the disk may leave the cache
                    os.posix_fadvise(out, 0, 0, os.POSIX_FADV_DONTNEED)

    def path_of(self, error: StreamError, segments: list[Segment]) -> Path:
        if error.writing:
            return self.paths[self.outs.index(segments[error.segment].out_files[error.file])]
        descriptor = segments[error.segment].in_files[error.file]
        return next(path for path, opened in self.files.items() if opened == descriptor)

    def look_at(self, segments: list[Segment], dtype: str, seen: Seen) -> None:
        """Note numbers that are not finite by the names of their tensors."""

        def tensor_at(segment: int, element: int) -> str:
            at = segments[segment].out_offsets[0] - len(self.headers[0]) + element * SIZES[dtype]
            tensors = self.shard.tensors.items()
            return next(name for name, held in tensors if held.offset <= at < held.offset + held.nbytes)

        for side, names, counts in (
            ("inputs", [one.name for one in self.plan.inputs], seen.inputs),
            ("outputs", self.plan.folders, seen.outputs),
        ):
            for name, (count, *first) in zip(names, counts, strict=True):
                if count:
                    self.seen.add(side, name, count, tensor_at(*first))

    def look_at_block(self, name: str, k: int, block: torch.Tensor) -> None:
        """The same of a block; of its inputs' numbers those count that came out as none."""
        count = block.numel() - int(block.double().isfinite().sum())
        if count:
            bad = next((one.name for one in self.plan.inputs if not _all_finite(one, name)), None)
            side, owner = ("inputs", bad) if bad is not None else ("outputs", self.plan.folders[k])
            self.seen.add(side, owner, count, name)


def _all_finite(one: Checkpoint, name: str) -> bool:
    import torch

    dtype = in_torch(one[name].dtype)
    return all(torch.frombuffer(bytearray(x), dtype=dtype).double().isfinite().all() for x in read_bytes(one, name))


def segment(
    plan: Plan,
    name: str,
    n: int,
    outs: Sequence[int],
    offsets: Sequence[int],
    files: dict[Path, int],
    weights: list[float],
) -> Segment:
    """The first n elements of a tensor, from every input's file to each output's offset."""
    held = [one[name] for one in plan.inputs]
    return Segment(
        n,
        tuple(tensor.dtype for tensor in held),
        tuple(files[one.files[one.where[name]].path] for one in plan.inputs),
        tuple(tensor.offset for tensor in held),
        tuple(outs),
        tuple(offsets),
        weights,
    )


def bytes_of(block: torch.Tensor) -> memoryview:
    import torch

    return memoryview(block.contiguous().view(-1).view(torch.uint8).numpy())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A descriptor's error says which file it was."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def chunk_of(plan: Plan, threads: int) -> int:
    held = len(plan.weights) if plan.sparse else 1  # outputs at once
    widths = max(
        sum(SIZES[one[name].dtype] for one in plan.inputs) + SIZES[tensor.dtype] * held
        for shard in plan.layout
        for name, tensor in shard.tensors.items()
    )
    chunk = chunk_for(plan.memory_limit, widths, threads)
    if chunk < 64:
        raise UserError(
            f"memory_limit must be at least {size(64 * widths * threads)} for {len(plan.inputs)} inputs and "
            f"{len(plan.weights)} outputs, got {size(plan.memory_limit)}"
        )
    return chunk
