"""A merge's outputs: the work folder beside the target folder, and their shards, one after another."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign import backend
from fastalign._base.errors import UserError
from fastalign._base.files import check_folder, flushes, read_json, sync, write_json
from fastalign._base.outputs import not_an_input
from fastalign._base.units import counted, size
from fastalign._base.work_folder import WorkFolder, hold
from fastalign.soup import stream
from fastalign.soup.checkpoint import FLOATS, INDEX, SIZES, Shard, in_torch, index_of, read_bytes, unchanged
from fastalign.soup.methods.base import Blocks, Step
from fastalign.soup.plan import Plan
from fastalign.soup.steps import NotFinite, Seen, Segment, StreamError, Tasks

if TYPE_CHECKING:
    import torch

RECORD = "soup.json"  # in the output: the record of the merge
_BATCH = 64_000_000  # bytes moved between two steps of the progress bar
# A larger merge drops its pages from the cache: new memory for all of them can take longer than the disk.
_KEPT = 1 << 30


def already_made(plan: Plan, *, overwrite: bool = False) -> bool:
    """Whether `out` contains exactly this merge, finished. Raises UserError if it contains anything else (except
    another merge that may be overwritten), and if it is an input or inside one."""
    not_an_input(plan.target, (one.folder for one in plan.sources))
    out = plan.out
    check_folder(out)
    if not out.exists() or not any(out.iterdir()):
        return False
    record = recorded(out)
    if record is None:
        raise UserError(f"{out}: exists, and no merge made it; choose another folder or remove it")
    if record.get("key") == plan.key and record.get("flushed"):
        if all(_is_whole(out, record["files"], plan.files_of(shard)) for shard in plan.layout):
            return True
    if not overwrite:
        raise UserError(f"{out}: exists, and is not this merge, finished and flushed; --overwrite replaces it")
    return False


def recorded(out: Path) -> dict[str, Any] | None:
    """The output's own record; None if it has none."""
    try:
        record = read_json(out / RECORD, kind="soup")
    except (ValueError, OSError):
        return None
    return record if isinstance(record.get("files"), dict) else None


def _is_whole(folder: Path, digests: dict[str, str], names: Iterable[str]) -> bool:
    """A file gets its name only when complete; its digest identifies it."""
    return all(
        name in digests and (folder / name).is_file() and stream.digest_of(folder / name) == digests[name]
        for name in names
    )


def chunk_of(plan: Plan) -> int:
    """Number of elements that a thread keeps in memory. Raises UserError if the memory limit is too low."""
    threads, outputs = backend.threads(), len(plan.weights) if plan.sparse else 1  # outputs at once
    widths = max(
        sum(SIZES[one[name].dtype] for one in plan.inputs) + SIZES[tensor.dtype] * outputs
        for shard in plan.layout
        for name, tensor in shard.tensors.items()
    )
    chunk = stream.chunk_for(plan.memory_limit, widths, threads)
    if chunk < 64:
        raise UserError(
            f"memory_limit must be at least {size(64 * widths * threads)} for {counted(len(plan.inputs), 'input')} and "
            f"{counted(len(plan.weights), 'output')}, got {size(plan.memory_limit)}"
        )
    return chunk


@contextmanager
def growing(plan: Plan) -> Iterator[Outputs]:
    """The outputs in a folder locked against other merges; files of an interrupted merge with the same key are kept."""
    with hold(plan.work, writes=plan.out, what="merge", keeps="shards" if flushes() else None) as work:
        work.begin({"kind": "soup", "key": plan.key, "flushed": flushes()}, anew=not flushes())
        if foreign := work.foreign():
            raise UserError(f"{foreign[0]}: is in the way of {plan.out} and was not made by a merge: move it away")
        yield Outputs(plan, work)


class Outputs:
    """Shards of a plan, in its work folder. done: those whose files are complete and unchanged in every output."""

    plan: Plan
    work: WorkFolder
    done: list[Shard]
    todo: list[Shard]
    options: dict[str, Any]
    headers: dict[str, list[bytes]]

    def __init__(self, plan: Plan, work: WorkFolder):
        self.plan, self.work, digests = plan, work, work.digests
        self.done = [shard for shard in plan.layout if _is_whole(work.path, digests, plan.files_of(shard))]
        self.todo = [shard for shard in plan.layout if shard not in self.done]
        self.options = {"chunk": chunk_of(plan), "threads": backend.threads()}
        count = len(plan.weights)
        self.headers = {shard.file: [shard.header(plan.metadata(k)) for k in range(count)] for shard in self.todo}

    def check_space(self) -> None:
        needed = sum(len(header) + shard.nbytes for shard in self.todo for header in self.headers[shard.file])
        if self.plan.embeddings and self.todo:
            needed += self.plan.embeddings.nbytes
        free = shutil.disk_usage(self.work.path).free
        if needed > free:
            raise UserError(f"{self.plan.out}: needs {size(needed)}, the disk has {size(free)} free")

    def write(self, shard: Shard, inputs: dict[Path, int], moved: Callable[[int], None]) -> NotFinite:
        """Write a shard's files under temporary names, flush, and rename them. inputs: open files; moved: called with
        the bytes moved."""
        names, headers = self.plan.files_of(shard), self.headers[shard.file]
        targets = [self.work.making(name) for name in names]
        partial = [path.with_name(path.name + ".partial") for path in targets]
        try:
            with ExitStack() as stack:
                files = []
                for path, header in zip(partial, headers, strict=True):
                    # A new file, not a truncated one: ext4 starts to write a truncated file as soon as it is closed.
                    files.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644))
                    stack.callback(os.close, files[-1])
                    with stream.naming(path):
                        stream.allocate(files[-1], len(header) + shard.nbytes)
                writer = _Writer(self.plan, shard, headers, partial, files, inputs, self.options, moved)
                writer.write_all()
                unchanged(self.plan.sources)
                for file, path in zip(files, partial, strict=True):
                    if flushes():
                        with stream.naming(path):
                            os.fsync(file)
            for path, target in zip(partial, targets, strict=True):
                os.replace(path, target)
                sync(target.parent)
            if flushes():
                digests = map(stream.digest, writer.digests, targets)
                self.work.made(dict(zip(names, digests, strict=True)), writer.seen.record)
            return writer.seen
        except BaseException:
            for path in partial:
                path.unlink(missing_ok=True)
            raise

    def accompany(self, seen: NotFinite) -> None:
        """Write index, configuration, tokenizer, templates and the record to every output."""
        plan, sharded = self.plan, len(self.plan.layout) > 1
        for folder in plan.folders:
            for name in [*plan.sidecar.files(), *([INDEX] if sharded else [])]:
                self.work.making((Path(folder) / name).as_posix())
            target = self.work.path / folder
            if sharded:
                write_json(target / INDEX, index_of(list(plan.layout)))
            plan.sidecar.copy(target, plan.out_dtype)
        record = {"kind": "soup", "key": plan.key, "flushed": flushes(), **plan.recipe, "weights": plan.weights}
        record |= {"folders": plan.folders, "files": self.work.digests}
        write_json(self.work.making(RECORD), record | ({"not_finite": seen.record} if seen else {}))


@dataclass
class _Writer:
    """Fills a shard's files, one in each output."""

    plan: Plan
    shard: Shard
    headers: list[bytes]
    paths: list[Path]
    files: list[int]
    inputs: dict[Path, int]
    options: dict[str, int]  # of the native module
    moved: Callable[[int], None]

    def __post_init__(self) -> None:
        self.digests, self.seen = [0] * len(self.files), NotFinite()

    def write_all(self) -> None:
        for k, header in enumerate(self.headers):
            self.write(k, header, 0)
        # Step by step: a step's reads are in the cache when its tensor is merged.
        steps = ((name, of.dtype, self.step_of(name)) for name, of in self.shard.tensors.items() if of.nbytes)
        for (kind, dtype), group in itertools.groupby(steps, key=lambda one: (type(one[2]), one[1])):
            if kind is list:
                self.sums((self.segment(name, step) for name, _, step in group if isinstance(step, list)), dtype)
                continue
            for name, _, step in group:
                if step is None:
                    self.copy(name)
                elif isinstance(step, Tasks):
                    self.run([self.segment(name, [])], dtype, step)
                elif callable(step):
                    self.blocks(name, step)

    def step_of(self, name: str) -> Step | None:
        """None if a tensor is copied."""
        return self.plan.step_of(name) if self.shard.tensors[name].dtype in FLOATS else None

    def offsets(self, name: str) -> list[int]:
        """A tensor's offset in each file."""
        return [len(header) + self.shard.tensors[name].offset for header in self.headers]

    def segment(self, name: str, weights: list[float]) -> Segment:
        return self.plan.segment(name, self.inputs, self.files, self.offsets(name), weights)

    def write(self, k: int, data: bytes | memoryview, offset: int) -> None:
        left, at = memoryview(data), offset
        with stream.naming(self.paths[k]):
            while left:
                done = os.pwrite(self.files[k], left, at)
                left, at = left[done:], at + done
        if flushes():
            self.digests[k] += stream.added(data, offset)

    def copy(self, name: str) -> None:
        """A tensor that is the same in all inputs."""
        for k, at in enumerate(self.offsets(name)):
            for block in read_bytes(self.plan.inputs[0], name):
                self.write(k, block, at)
                at += len(block)
        self.moved(self.shard.tensors[name].nbytes * (len(self.plan.inputs) + len(self.files)))

    def blocks(self, name: str, make: Blocks) -> None:
        offsets = self.offsets(name)
        for blocks in make():
            for k, block in enumerate(blocks):
                self.write(k, bytes_of(block), offsets[k])
                self.look_at_block(name, k, block)
                offsets[k] += block.nbytes
        self.moved(
            sum(one[name].nbytes for one in self.plan.inputs) + self.shard.tensors[name].nbytes * len(self.files)
        )

    def sums(self, segments: Iterator[Segment], dtype: str) -> None:
        """Weighted sums to one type: adjacent segments are joined, then split into batches of about 64 MB."""
        batch: list[Segment] = []
        for whole in stream.joined(segments, SIZES[dtype]):
            for piece in stream.pieces(whole, dtype, _BATCH):
                batch.append(piece)
                if sum(stream.bytes_moved(one, dtype) for one in batch) >= _BATCH:
                    self.run(batch, dtype)
                    batch = []
        if batch:
            self.run(batch, dtype)

    def run(self, segments: list[Segment], dtype: str, tasks: Tasks | None = None) -> None:
        try:
            if tasks is None:
                seen = stream.weighted_sums(segments, dtype, **self.options)
            else:
                seen = stream.merge_tasks(segments[0], tasks, dtype, **self.options)
        except StreamError as error:
            raise OSError(error.errno or 5, error.strerror, str(self.path_of(error, segments))) from None
        self.digests = [total + more for total, more in zip(self.digests, seen.digests, strict=True)]
        self.look_at(segments, dtype, seen)
        self.moved(sum(stream.bytes_moved(one, dtype) for one in segments))
        if flushes():
            stream.write_behind(self.files)
            if self.plan.written_bytes > _KEPT and hasattr(os, "posix_fadvise"):
                for file in self.files:  # pages that have reached the disk may leave the cache
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def path_of(self, error: StreamError, segments: list[Segment]) -> Path:
        if error.writing:
            return self.paths[self.files.index(segments[error.segment].out_files[error.file])]
        descriptor = segments[error.segment].in_files[error.file]
        return next(path for path, file in self.inputs.items() if file == descriptor)

    def look_at(self, segments: list[Segment], dtype: str, seen: Seen) -> None:
        """Record non-finite numbers by the names of their tensors."""
        sides = {
            "inputs": ([one.name for one in self.plan.inputs], seen.inputs),
            "outputs": (self.plan.folders, seen.outputs),
        }
        for side, (names, counts) in sides.items():
            for name, (count, segment, element) in zip(names, counts, strict=True):
                if count:
                    at = segments[segment].out_offsets[0] - len(self.headers[0]) + element * SIZES[dtype]
                    tensors = self.shard.tensors.items()
                    tensor = next(name for name, of in tensors if of.offset <= at < of.offset + of.nbytes)
                    self.seen.add(side, name, count, tensor)

    def look_at_block(self, name: str, k: int, block: torch.Tensor) -> None:
        """The same for a block; of its inputs, only numbers behind a non-finite output are counted."""
        import torch

        count = block.numel() - int(block.double().isfinite().sum())
        if not count:
            return
        for one in self.plan.inputs:
            parts = (torch.frombuffer(bytearray(x), dtype=in_torch(one[name].dtype)) for x in read_bytes(one, name))
            if not all(x.double().isfinite().all() for x in parts):
                return self.seen.add("inputs", one.name, count, name)
        self.seen.add("outputs", self.plan.folders[k], count, name)


def bytes_of(block: torch.Tensor) -> memoryview:
    import torch

    return block.contiguous().view(-1).view(torch.uint8).numpy().data
