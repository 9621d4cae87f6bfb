"""The outputs' files: the folder that they grow in, beside the one that they become, and their shards, one after another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign._base.errors import UserError
from fastalign._base.files import flushes, read_json, sync, write_json
from fastalign._base.outputs import not_an_input
from fastalign._base.work_folder import WorkFolder, hold
from fastalign.soup.checkpoint import FLOATS, INDEX, SIZES, Checkpoint, Shard, in_torch, index_of, read_bytes, unchanged
from fastalign.soup.plan import Plan, size
from fastalign.soup.steps import NotFinite, Seen, Segment, StreamError, Tasks
from fastalign.soup.stream import (
    added,
    allocate,
    chunk_for,
    digest,
    digest_of,
    joined,
    merge_tasks,
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
    """The files' digests, and what was met of numbers that are not finite."""
    found, digests = NotFinite(), [0] * len(targets)
    partial = [path.with_name(path.name + ".partial") for path in targets]
    try:
        with ExitStack() as stack:
            outs = []
            for path, header in zip(partial, headers, strict=True):
                # Not cut short, but new: closing a file that was cut to nothing, ext4 begins to write it at once.
                out = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                stack.callback(os.close, out)
                outs.append(out)
                with naming(path):
                    allocate(out, len(header) + shard.nbytes)

            def write(k: int, data: bytes | memoryview, offset: int) -> None:
                with naming(partial[k]):
                    _write_all(outs[k], data, offset)
                if flushes():
                    digests[k] += added(data, offset)

            for k, header in enumerate(headers):
                write(k, header, 0)
            for out_type, segments, tasks in _work(plan, shard, headers, outs, files):
                moved_by = _moved(segments, out_type)
                try:
                    if tasks is None:
                        seen = stream(segments, out_type, chunk=chunk, threads=threads)
                    else:
                        seen = merge_tasks(segments[0], tasks, out_type, chunk=chunk, threads=threads)
                except StreamError as error:
                    path = _which(error, segments, partial, outs, files)
                    raise OSError(error.errno or 5, error.strerror, str(path)) from None
                digests = [total + more for total, more in zip(digests, seen.digests, strict=True)]
                _note(found, plan, shard, len(headers[0]), segments, out_type, seen)
                moved(moved_by)
                if flushes():
                    write_behind(outs)
                    if plan.written_bytes > _KEPT:
                        _let_go(outs)
            for name, tensor in shard.tensors.items():
                if name in plan.blocks_of:
                    at = tensor.offset
                    for blocks in plan.blocks_of[name]():
                        for k, (header, block) in enumerate(zip(headers, blocks, strict=True)):
                            write(k, bytes_of(block), len(header) + at)
                            _note_block(found, plan, k, name, block)
                        at += blocks[0].nbytes
                    moved(sum(one[name].nbytes for one in plan.inputs) + tensor.nbytes * len(outs))
                elif tensor.dtype not in FLOATS:
                    for k, header in enumerate(headers):
                        at = len(header) + tensor.offset
                        for block in read_bytes(plan.inputs[0], name):
                            write(k, block, at)
                            at += len(block)
                    moved(tensor.nbytes * (len(plan.inputs) + len(outs)))
            unchanged(plan.sources)
            for out, path in zip(outs, partial, strict=True):
                if flushes():
                    with naming(path):
                        os.fsync(out)
        for path, target in zip(partial, targets, strict=True):
            os.replace(path, target)
            sync(target.parent)
        return [
            digest(total, target) if flushes() else "" for total, target in zip(digests, targets, strict=True)
        ], found
    except BaseException:
        for path in partial:
            path.unlink(missing_ok=True)
        raise


def _let_go(outs: Sequence[int]) -> None:
    """Pages that have reached the disk may leave the cache."""
    if hasattr(os, "posix_fadvise"):
        for out in outs:
            os.posix_fadvise(out, 0, 0, os.POSIX_FADV_DONTNEED)


def _work(
    plan: Plan, shard: Shard, headers: list[bytes], outs: list[int], files: dict[Path, int]
) -> Iterator[tuple[str, list[Segment], Tasks | None]]:
    """Batches of segments of one output type, neighbours joined, each batch moving some 64 MB; or a whole tensor's tasks."""
    by_type: dict[str, list[str]] = {}
    for name, tensor in shard.tensors.items():
        if tensor.dtype in FLOATS and tensor.nbytes and name not in plan.blocks_of:
            by_type.setdefault(tensor.dtype, []).append(name)

    def whole_tensor(name: str, weights: list[float]) -> Segment:
        target = shard.tensors[name]
        return segment(
            plan, name, target.count, outs, [len(header) + target.offset for header in headers], files, weights
        )

    for out_type, names in by_type.items():
        steps = ((name, plan.step_of(name)) for name in names)  # as they come: what a step reads is in the cache then
        if plan.sparse:
            for name, tasks in steps:
                yield out_type, [whole_tensor(name, [])], tasks
            continue
        batch: list[Segment] = []
        for whole in joined((whole_tensor(*one) for one in steps), SIZES[out_type]):
            for piece in _pieces(whole, out_type):
                batch.append(piece)
                if _moved(batch, out_type) >= _BATCH:
                    yield out_type, batch, None
                    batch = []
        if batch:
            yield out_type, batch, None


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


def _pieces(whole: Segment, out_type: str) -> Iterator[Segment]:
    """A segment as parts that move about 64 MB each."""
    widths = [SIZES[name] for name in whole.in_types]
    step = max(1, _BATCH // (sum(widths) + SIZES[out_type] * len(whole.out_files)) // 4096) * 4096
    for first in range(0, whole.n, step):
        yield whole._replace(
            n=min(step, whole.n - first),
            in_offsets=tuple(at + first * width for at, width in zip(whole.in_offsets, widths, strict=True)),
            out_offsets=tuple(at + first * SIZES[out_type] for at in whole.out_offsets),
        )


def _moved(segments: list[Segment], out_type: str) -> int:
    return sum(of.n * (sum(SIZES[t] for t in of.in_types) + SIZES[out_type] * len(of.out_files)) for of in segments)


def _note(
    found: NotFinite, plan: Plan, shard: Shard, header: int, segments: list[Segment], out_type: str, seen: Seen
) -> None:
    """Into `found` what the engine counted, by the names of the tensors."""

    def tensor_at(segment: int, element: int) -> str:
        at = segments[segment].out_offsets[0] - header + element * SIZES[out_type]
        return next(name for name, held in shard.tensors.items() if held.offset <= at < held.offset + held.nbytes)

    for side, names, counts in (
        ("inputs", [one.name for one in plan.inputs], seen.inputs),
        ("outputs", plan.folders, seen.outputs),
    ):
        for name, (count, *first) in zip(names, counts, strict=True):
            if count:
                found.add(side, name, count, tensor_at(*first))


def _note_block(found: NotFinite, plan: Plan, k: int, name: str, block: torch.Tensor) -> None:
    """The same of a tensor that was made apart: of its inputs' numbers those count that came out as none."""
    count = block.numel() - int(block.double().isfinite().sum())
    if count:
        bad = [one.name for one in plan.inputs if not _all_finite(one, name)]
        found.add("inputs" if bad else "outputs", bad[0] if bad else plan.folders[k], count, name)


def _all_finite(one: Checkpoint, name: str) -> bool:
    import torch

    dtype = in_torch(one[name].dtype)
    return all(torch.frombuffer(bytearray(x), dtype=dtype).double().isfinite().all() for x in read_bytes(one, name))


def bytes_of(block: torch.Tensor) -> memoryview:
    import torch

    return memoryview(block.contiguous().view(-1).view(torch.uint8).numpy())


def _write_all(out: int, data: bytes | memoryview, offset: int) -> None:
    left = memoryview(data)
    while left:
        done = os.pwrite(out, left, offset)
        left, offset = left[done:], offset + done


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A descriptor's error says which file it was."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _which(
    error: StreamError, segments: list[Segment], partial: list[Path], outs: list[int], files: dict[Path, int]
) -> Path:
    if error.writing:
        return partial[outs.index(segments[error.segment].out_files[error.file])]
    descriptor = segments[error.segment].in_files[error.file]
    return next(path for path, opened in files.items() if opened == descriptor)


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
