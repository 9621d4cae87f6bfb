"""Streaming merges: soups of models larger than memory, many in one reading, safe against interruption.

The outputs grow in a folder beside the target, a shard of each at a time: written, flushed to disk, renamed. When all
are there, that folder becomes the target. A merge that was stopped finds it again, and goes on after its last finished
shards; what is made does not depend on how often that happened.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastalign import progress as bars
from fastalign.data.files import read_json, sync, write_json
from fastalign.errors import UserError
from fastalign.soup import plan as plans
from fastalign.soup.checkpoint import INDEX, Checkpoint, File, Shard, index_of
from fastalign.soup.compare import read_bytes
from fastalign.soup.dtypes import FLOATS, SIZES, TORCH
from fastalign.soup.stream import Segment, StreamError, allocate, chunk_for, joined, merge_tasks, stream
from fastalign.soup.task_vectors import Tasks

RECORD = "soup.json"  # in the output: what was made of what
_BATCH = 64_000_000  # bytes moved between two steps of the progress bar
_OTHER_FILES = 256  # that a process has open besides
_COPIED = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "spiece.model", "*.tiktoken", "*.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip


class Merged(NamedTuple):
    """What a merge did. resumed: finished shards that were found; seconds: from the first read to the last rename."""

    out: Path
    models: int
    read_bytes: int
    written_bytes: int
    resumed: int
    seconds: float


def merge(
    models: Sequence[str | os.PathLike],
    weights,
    out: str | os.PathLike,
    *,
    method: str = "linear",
    base: str | os.PathLike | None = None,
    parameters: Mapping[str, Any] | None = None,
    companion: str = "first",
    dtype: str | torch.dtype | None = None,
    normalize: bool | None = None,
    max_shard_size: int | str = "5GB",
    memory_limit: int | str | None = None,
    force: bool = False,
    progress: bool = True,
) -> Merged:
    """Merge checkpoints of one architecture into one soup, or into many in a single reading.

    Args:
        models: m folders, *.safetensors files or hub names.
        weights: (m,) for one model at `out`; (K, m) for K models at `out`/0 ... `out`/(K-1), each input byte read once. One of
            (m,) may be {pattern: weight or weights over the layers}. None: equal, where the method needs none.
        out: the folder to make. It must not exist, be empty, or hold this very merge, finished.
        method: one of METHODS; docs in README.md. "linear", Σ ρ w; "task_arithmetic", base + Σ λ (w - base); "slerp", two
            models along the great circle of each tensor, by the second's share of the weights; "ties", "dare_linear",
            "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties": task vectors of which some elements stay;
            "multislerp", "karcher": means on the sphere; "model_stock": as far from the base as the models agree;
            "warp": task vectors along great circles, then `eta` of the way from the base; "ema": the moving average of
            checkpoints, the oldest first.
        base: what the models were trained from, for the methods that work on the differences.
        parameters: the method's own, such as {"density": 0.3, "lambda": 0.7}. A number may also be {pattern: number}, or
            {pattern: numbers over the layers}, and density, epsilon and gamma a list with one for each model.
        companion: whose configuration and tokenizer the outputs get, "first" or "base".
        dtype: to store floating-point tensors in; None keeps the first model's, tensor by tensor.
        normalize: linear only. True divides weights by their sum, False takes them as they are, None asks that they sum to 1.
        max_shard_size: of one output file, such as "5GB"; a larger tensor has a file of its own.
        memory_limit: for buffers, such as "512MB" (the default).
        force: mix though the configurations or tokenizers differ; the first model's are copied.

    Sums are made in float32, in float64 where an input or the output is float64, and rounded once, to nearest even.
    Integer and boolean tensors are copied, and must be equal. The first model's configuration, tokenizer, generation
    configuration and chat template come along, so that transformers loads the output; files' metadata and soup.json
    record the recipe.

    Raises:
        UserError, FileNotFoundError: anything about the arguments or the files that forbids it, before a byte is
            written; also too little space on the disk, and an input that changes meanwhile.
        OSError: a disk's error. Inputs and finished shards stay; the same call goes on from them.
    """
    made = plans.make(
        models, weights, out, method=method, base=base, parameters=parameters, companion=companion, dtype=dtype,
        normalize=normalize, max_shard_size=max_shard_size, memory_limit=memory_limit, force=force,
    )  # fmt: skip
    return execute(made, progress=progress)


def execute(plan: plans.Plan, *, progress: bool = True) -> Merged:
    """Do what was planned, or what is left of it."""
    began = time.perf_counter()
    threads = torch.get_num_threads()
    chunk = chunk_of(plan, threads)
    if already_made(plan):
        return Merged(plan.out, len(plan.weights), 0, 0, len(plan.layout), time.perf_counter() - began)
    _allow_open_files(len(plan.weights) + sum(1 for _ in _files(plan.inputs)))
    headers = [[shard.header(plan.metadata(k)) for k in range(len(plan.weights))] for shard in plan.layout]
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    resumed = read = written = 0
    with _beside(plan) as beside:
        _check_space(plan, beside, headers)
        total = (plan.read_bytes + plan.written_bytes) // 10**6
        with bars.bar("merge", total=total, unit="MB", show=progress) as advance, opened(plan.inputs) as files:
            moved = _Steps(advance)
            for shard, headed in zip(plan.layout, headers, strict=True):
                targets = [beside / folder / shard.file for folder in plan.folders]
                nbytes_in = sum(one[name].nbytes for name in shard.tensors for one in plan.inputs)
                if all(_finished(path, header, shard) for path, header in zip(targets, headed, strict=True)):
                    resumed += 1
                    moved(nbytes_in + shard.nbytes * len(targets))
                    continue
                _write_shard(plan, shard, headed, targets, files, chunk, threads, moved)
                read, written = read + nbytes_in, written + shard.nbytes * len(targets)
        _accompany(plan, beside)
        if plan.out.is_dir():
            plan.out.rmdir()  # empty, or this raises
        os.replace(beside, plan.out)
        sync(plan.out.parent)
    return Merged(plan.out, len(plan.weights), read, written, resumed, time.perf_counter() - began)


# ---- one shard of every output ----


def _write_shard(
    plan: plans.Plan,
    shard: Shard,
    headers: list[bytes],
    targets: list[Path],
    files: dict[Path, int],
    chunk: int,
    threads: int,
    moved: Callable[[int], None],
) -> None:
    partial = [path.with_name(path.name + ".partial") for path in targets]
    try:
        with ExitStack() as stack:
            outs = []
            for path, header in zip(partial, headers, strict=True):
                out = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
                stack.callback(os.close, out)
                outs.append(out)
                with naming(path):
                    allocate(out, len(header) + shard.nbytes)
                    _write_all(out, header, 0)
            for out_type, segments, tasks in _work(plan, shard, headers, outs, files):
                moved_by = _moved(segments, out_type)
                try:
                    if tasks is None:
                        stream(segments, out_type, chunk=chunk, threads=threads)
                    else:
                        merge_tasks(segments[0], tasks, out_type, chunk=chunk, threads=threads)
                except StreamError as error:
                    path = _which(error, segments, partial, outs, files)
                    raise OSError(error.errno or 5, error.strerror, str(path)) from None
                moved(moved_by)
            for name, tensor in shard.tensors.items():
                if name in plan.blocks_of:
                    at = tensor.offset
                    for blocks in plan.blocks_of[name]():
                        for out, path, header, block in zip(outs, partial, headers, blocks, strict=True):
                            with naming(path):
                                _write_all(out, bytes_of(block), len(header) + at)
                        at += blocks[0].nbytes
                    moved(sum(one[name].nbytes for one in plan.inputs) + tensor.nbytes * len(outs))
                elif tensor.dtype not in FLOATS:
                    for out, path, header in zip(outs, partial, headers, strict=True):
                        _copy(plan.inputs[0], name, out, len(header) + tensor.offset, path)
                    moved(tensor.nbytes * (len(plan.inputs) + len(outs)))
            _unchanged(plan.inputs)
            for out, path in zip(outs, partial, strict=True):
                with naming(path):
                    os.fsync(out)
        for path, target in zip(partial, targets, strict=True):
            os.replace(path, target)
            sync(target.parent)
    except BaseException:
        for path in partial:
            path.unlink(missing_ok=True)
        raise


def _work(
    plan: plans.Plan, shard: Shard, headers: list[bytes], outs: list[int], files: dict[Path, int]
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
    plan: plans.Plan,
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


def _copy(source: Checkpoint, name: str, out: int, offset: int, path: Path) -> None:
    for block in read_bytes(source, name):
        with naming(path):
            _write_all(out, block, offset)
        offset += len(block)


def bytes_of(block: torch.Tensor) -> memoryview:
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


class _Steps:
    """Bytes as they come, whole megabytes as the bar takes them."""

    def __init__(self, advance: Callable[[int], None]):
        self.advance, self.bytes, self.told = advance, 0, 0

    def __call__(self, nbytes: int) -> None:
        self.bytes += nbytes
        now = self.bytes // 10**6
        self.advance(now - self.told)
        self.told = now


# ---- inputs ----


@contextmanager
def opened(checkpoints: Sequence[Checkpoint]) -> Iterator[dict[Path, int]]:
    with ExitStack() as stack:
        found: dict[Path, int] = {}
        for file in _files(checkpoints):
            if file.path not in found:
                found[file.path] = os.open(file.path, os.O_RDONLY)
                stack.callback(os.close, found[file.path])
        yield found


def _allow_open_files(count: int) -> None:
    """Raise this process's limit of open files as far as the system lets it, where a merge needs more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UserError(
            f"this merge has {count:,} files open at once, the system allows {hard:,}: make fewer soups at once"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _files(checkpoints: Sequence[Checkpoint]) -> Iterator[File]:
    for one in checkpoints:
        yield from one.files


def _unchanged(checkpoints: Sequence[Checkpoint]) -> None:
    for file in _files(checkpoints):
        status = os.stat(file.path)
        if (status.st_size, status.st_mtime_ns) != (file.size, file.modified):
            raise UserError(f"{file.path}: changed while it was read; nothing was made of it")


# ---- the folder beside ----


def chunk_of(plan: plans.Plan, threads: int) -> int:
    widths = max(
        sum(SIZES[one[name].dtype] for one in plan.inputs) + SIZES[tensor.dtype] * len(plan.weights)
        for shard in plan.layout
        for name, tensor in shard.tensors.items()
    )
    chunk = chunk_for(plan.memory_limit, widths, threads)
    if chunk < 64:
        raise UserError(
            f"memory_limit must be at least {plans.size(64 * widths * threads)} for {len(plan.inputs)} inputs and "
            f"{len(plan.weights)} outputs, got {plans.size(plan.memory_limit)}"
        )
    return chunk


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
        if all(_finished(path, shard.header(plan.metadata(k)), shard) for path, k, shard in paths):
            return True
    raise UserError(f"{out}: exists already and is not this merge; choose another folder or remove it")


@contextmanager
def _beside(plan: plans.Plan) -> Iterator[Path]:
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
        if not (record.is_file() and _key(record) == plan.key):
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
    return found.get("key") if isinstance(found, dict) else None


def _record(plan: plans.Plan) -> dict:
    return {"kind": "soup", "key": plan.key, **plan.recipe, "weights": plan.weights, "folders": plan.folders}


def _finished(path: Path, header: bytes, shard: Shard) -> bool:
    """A file has its name only when it was whole; its size and header say that it is the one."""
    if not path.is_file() or path.stat().st_size != len(header) + shard.nbytes:
        return False
    with open(path, "rb") as file:
        return file.read(len(header)) == header


def _check_space(plan: plans.Plan, beside: Path, headers: list[list[bytes]]) -> None:
    needed = sum(
        len(header) + shard.nbytes
        for shard, headed in zip(plan.layout, headers, strict=True)
        for folder, header in zip(plan.folders, headed, strict=True)
        if not _finished(beside / folder / shard.file, header, shard)
    )
    free = shutil.disk_usage(beside).free
    if needed > free:
        raise UserError(f"{plan.out}: needs {plans.size(needed)}, the disk has {plans.size(free)} free")


def _accompany(plan: plans.Plan, beside: Path) -> None:
    """Index, configuration, tokenizer and templates into every output."""
    source = (plan.companion or plan.models[0]).folder
    for folder in plan.folders:
        target = beside / folder
        if len(plan.layout) > 1:
            write_json(target / INDEX, index_of(list(plan.layout)))
        if source is None:
            continue
        for path in sorted({path for pattern in _COPIED for path in source.glob(pattern) if path.is_file()}):
            copy = target / path.name
            shutil.copyfile(path, copy)
            if path.name == "config.json":
                _store_dtype(copy, plan.out_dtype)
            sync(copy)


def _store_dtype(config: Path, out_dtype: str | None) -> None:
    """The configuration's own word for the weights' type; transformers knows none for eight bits."""
    if out_dtype is None or SIZES[out_dtype] == 1:
        return
    found = json.loads(config.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in found else "dtype"
    found[key] = str(TORCH[out_dtype]).removeprefix("torch.")
    write_json(config, found)
