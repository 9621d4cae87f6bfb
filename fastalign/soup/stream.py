"""Weighted sums and merges of task vectors from file to file, by the native extension if it is built, else by
by_torch.py."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign import backend
from fastalign._base.files import flushes
from fastalign._base.work_folder import sha256
from fastalign.soup.checkpoint import SIZES, code
from fastalign.soup.steps import KEEPS, Seen, Segment, StreamError, Tasks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CACHE_BYTES = 1 << 20  # of a thread's chunks: about a core's second-level cache
LEAST_CHUNK, MOST_CHUNK = 1 << 14, 1 << 17  # elements
PAGE = 4096
_A_THREADS = 1 << 24  # bytes to digest from which starting a thread pays


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file's name to a descriptor's error."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def chunk_for(memory_limit: int, widths: int, threads: int) -> int:
    """Elements per chunk, from the bytes that one element takes in all inputs and outputs in memory; 0 if the limit is
    too low."""
    chunk = max(LEAST_CHUNK, min(MOST_CHUNK, CACHE_BYTES // widths // PAGE * PAGE))
    allowed = memory_limit // (threads * widths)
    step = PAGE if allowed >= PAGE else 64  # whole pages of every output, whatever its type
    return min(chunk, allowed // step * step)


def allocate(file: int, nbytes: int) -> None:
    """Set a file's length and allocate its blocks if the file system can. Raises OSError: ENOSPC before a byte is
    written."""
    if not backend.native_runs():
        return os.ftruncate(file, nbytes)
    error = backend.native.allocate(file, nbytes)
    if error:
        raise OSError(error, os.strerror(error))


def write_behind(files: Sequence[int]) -> None:
    """Lets the system start writing to disk, if the native extension is available."""
    if backend.native_runs():
        for file in files:
            backend.native.write_behind(file)


def weighted_sums(segments: Sequence[Segment], out_type: str, *, chunk: int, threads: int) -> Seen:
    """Read every segment's inputs once and write its outputs, in chunks of `chunk` elements. Raises StreamError.

    All segments have the same files."""
    if not backend.native_runs():
        from fastalign.soup import by_torch

        return by_torch.weighted_sums(segments, out_type, chunk)
    coded: list[Any] = [(s.n, [code(t) for t in s.in_types], *s[2:]) for s in segments]
    return _seen(*backend.native.soup_files(coded, code(out_type), chunk, threads, flushes()))


def _seen(failure: tuple, digests: list[tuple[int, int]], inputs: list, outputs: list) -> Seen:
    failed, *what = failure
    if failed:
        raise StreamError(*what)
    return Seen([_joined(*halves) for halves in digests], inputs, outputs)


def _joined(low: int, high: int) -> int:
    return low + (high << 64)


def added(data: bytes | memoryview, offset: int) -> int:
    """The contribution of these bytes to a file's digest, modulo 2^128; only if the native extension is built."""
    return _joined(*backend.native.soup_digest(data, offset)) if backend.native_runs() else 0


def digest(total: int, path: Path) -> str:
    """A written file's digest, from the sum of its contributions."""
    return f"{total % 2**128:032x}" if backend.native_runs() else sha256(path)


def digest_of(path: Path) -> str:
    """A file's digest, by reading it again."""
    if not backend.native_runs():
        return sha256(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        threads = min(backend.threads(), 1 + size // _A_THREADS)
        error, halves = backend.native.soup_digest_file(file.fileno(), size, threads)
    if error:
        raise OSError(error, os.strerror(error), str(path))
    return f"{_joined(*halves):032x}"


def merge_tasks(tensor: Segment, tasks: Tasks, out_type: str, *, chunk: int, threads: int) -> Seen:
    """One whole tensor's merge of task vectors; its inputs are the base, then the models. Raises StreamError.

    Its inputs are read several times, in chunks, if ranks or sums of the whole tensor are needed.
    """
    if not backend.native_runs():
        from fastalign.soup import by_torch

        return by_torch.merge_tasks(tensor, tasks, out_type)
    coded = (tensor.n, [code(t) for t in tensor.in_types], *tensor[2:6], [w for row in tasks.weights for w in row])
    choices = [(KEEPS.index(choice.keep), *choice[1:]) for choice in tasks.choices]
    result = backend.native.soup_tasks(
        coded,
        choices,
        code(out_type),
        tasks.factor,
        tasks.elect,
        tasks.normalize,
        tasks.seed,
        tasks.row,
        chunk,
        threads,
        flushes(),
    )
    return _seen(*result)


def dots(segment: Segment, *, centered: bool = False, threads: int) -> np.ndarray:
    """Dot products of a segment's inputs with each other, (m, m) float64; outputs are ignored. Raises StreamError.

    centered: of the inputs' differences from input 0.
    """
    if not backend.native_runs():
        from fastalign.soup import by_torch

        return by_torch.dots(segment, MOST_CHUNK, centered=centered)
    m = len(segment.in_files)
    coded = (segment.n, [code(t) for t in segment.in_types], *segment[2:])
    failed, writing, error, number, file, products = backend.native.soup_dots(coded, centered, MOST_CHUNK, threads)
    if failed:
        raise StreamError(writing, error, number, file)
    return np.array(products).reshape(m, m)


def bytes_moved(segment: Segment, out_type: str) -> int:
    """Read and written."""
    return segment.n * (sum(SIZES[t] for t in segment.in_types) + SIZES[out_type] * len(segment.out_files))


def pieces(whole: Segment, out_type: str, nbytes: int) -> Iterator[Segment]:
    """A segment as parts that move about `size` bytes each."""
    widths = [SIZES[name] for name in whole.in_types]
    step = max(1, nbytes // (sum(widths) + SIZES[out_type] * len(whole.out_files)) // PAGE) * PAGE
    for first in range(0, whole.n, step):
        yield whole._replace(
            n=min(step, whole.n - first),
            in_offsets=tuple(at + first * width for at, width in zip(whole.in_offsets, widths, strict=True)),
            out_offsets=tuple(at + first * SIZES[out_type] for at in whole.out_offsets),
        )


def joined(segments: Iterator[Segment], out_width: int) -> Iterator[Segment]:
    """Adjacent segments that are contiguous in every file, joined."""
    run: Segment | None = None
    for segment in segments:
        if run is not None and _follows(run, segment, out_width):
            run = run._replace(n=run.n + segment.n)
        else:
            if run is not None:
                yield run
            run = segment
    if run is not None:
        yield run


def _follows(a: Segment, b: Segment, out_width: int) -> bool:
    same = (a.in_types, a.in_files, a.out_files, a.weights) == (b.in_types, b.in_files, b.out_files, b.weights)
    ends = tuple(at + a.n * SIZES[name] for at, name in zip(a.in_offsets, a.in_types, strict=True))
    return same and ends == b.in_offsets and tuple(at + a.n * out_width for at in a.out_offsets) == b.out_offsets


# ---- in memory ----


def mix_tensors(tensors: Sequence[Tensor], rows: Sequence[Sequence[float]], dtype: torch.dtype) -> list[Tensor]:
    """K sums Σ rows[k][i] tensors[i] in `dtype`, contiguous. tensors: one shape and device, floating-point types of
    FLOATS.

    Summed in float32 (float64 if an input or `dtype` is); numbers beyond float8_e4m3fn's range become its largest
    number.
    """
    import torch

    from fastalign import reference
    from fastalign.ops.buffers import buffer

    if backend.choose(tensors[0].device) != "cpu":
        return reference.weighted_sums(tensors, rows, dtype)
    outs = [torch.empty(tensors[0].shape, dtype=dtype) for _ in rows]
    kept = [tensor.detach().contiguous() for tensor in tensors]
    backend.native.soup_memory(
        [buffer(out) for out in outs],
        [buffer(tensor) for tensor in kept],
        [float(w) for row in rows for w in row],
        backend.threads(),
    )
    return outs
