"""Weighted sums through the engine, or through torch where the engine is not built: in memory, and from file to file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastalign import backend, reference
from fastalign.soup.dtypes import NAMES, SIZES, TORCH, code
from fastalign.soup.task_vectors import KEEPS, Tasks, merge_tensor

CACHE_BYTES = 1 << 20  # of a thread's chunks of all inputs and outputs: about a core's second-level cache
LEAST_CHUNK, MOST_CHUNK = 1 << 14, 1 << 16  # elements


class Segment(NamedTuple):
    """n elements that lie together in every input and output; files are descriptors, offsets bytes.

    weights: (outputs × inputs), row by row.
    """

    n: int
    in_types: tuple[str, ...]
    in_files: tuple[int, ...]
    in_offsets: tuple[int, ...]
    out_files: tuple[int, ...]
    out_offsets: tuple[int, ...]
    weights: list[float]


class StreamError(OSError):
    """A file that could not be read or written. `segment`, `file`: which, counted from 0; errno 0: it ended early."""

    def __init__(self, writing: bool, error: int, segment: int, file: int):
        super().__init__(error, os.strerror(error) if error else "ended while it was read")
        self.writing, self.segment, self.file = writing, segment, file


def mix_tensors(tensors: Sequence[Tensor], rows: Sequence[Sequence[float]], dtype: torch.dtype) -> list[Tensor]:
    """K sums Σ rows[k][i] tensors[i] in `dtype`, contiguous. tensors: one shape and device, floating-point types of FLOATS.

    Added up in float32, in float64 where an input or `dtype` is; beyond float8_e4m3fn's range, its largest number.
    """
    if backend.choose(tensors[0].device) != "cpu":
        return reference.weighted_sums(tensors, rows, dtype)
    outs = [torch.empty(tensors[0].shape, dtype=dtype) for _ in rows]
    mix_into(outs, tensors, rows)
    return outs


def mix_into(outs: Sequence[Tensor], tensors: Sequence[Tensor], rows: Sequence[Sequence[float]]) -> None:
    """The same into contiguous tensors on the CPU, of one dtype."""
    kept = [tensor.detach().contiguous() for tensor in tensors]
    backend.engine.soup_memory(
        [out.data_ptr() for out in outs], code(NAMES[outs[0].dtype]), [tensor.data_ptr() for tensor in kept],
        [code(NAMES[tensor.dtype]) for tensor in kept], [float(w) for row in rows for w in row], outs[0].numel(),
        torch.get_num_threads(),
    )  # fmt: skip


def chunk_for(memory_limit: int, widths: int, threads: int) -> int:
    """Elements a chunk, from the bytes one element takes in all inputs and outputs together; 0 where the limit is too low."""
    chunk = max(LEAST_CHUNK, min(MOST_CHUNK, CACHE_BYTES // widths // 64 * 64))
    allowed = memory_limit // (threads * widths) // 64 * 64
    return min(chunk, allowed)


def allocate(file: int, nbytes: int) -> None:
    """Make a file so long, with its place on the disk where the file system can. Raises OSError: ENOSPC before a byte is written."""
    if backend.choose(torch.device("cpu")) != "cpu":
        return os.ftruncate(file, nbytes)
    error = backend.engine.allocate(file, nbytes)
    if error:
        raise OSError(error, os.strerror(error))


def stream(segments: Sequence[Segment], out_type: str, *, chunk: int, threads: int) -> None:
    """Read every segment's inputs once and write its outputs, by chunks of so many elements. Raises StreamError."""
    if backend.choose(torch.device("cpu")) != "cpu":
        return _stream_by_torch(segments, out_type, chunk)
    coded = [(s.n, [code(t) for t in s.in_types], *s[2:]) for s in segments]
    failed, *what = backend.engine.soup_files(coded, code(out_type), chunk, threads)
    if failed:
        raise StreamError(*what)


def merge_tasks(tensor: Segment, tasks: Tasks, out_type: str, *, chunk: int, threads: int) -> None:
    """One whole tensor's merge of task vectors; its inputs are the base, then the models. Raises StreamError.

    Its inputs are read several times, by chunks, where ranks or sums of the whole tensor are asked for.
    """
    if backend.choose(torch.device("cpu")) != "cpu":
        outs = merge_tensor(_inputs(tensor, 0, 0, tensor.n), tasks, TORCH[out_type])
        for k, out in enumerate(outs):
            data = memoryview(out.view(torch.uint8).numpy())
            _write(tensor.out_files[k], data, tensor.out_offsets[k], 0, k)
        return
    coded = (tensor.n, [code(t) for t in tensor.in_types], *tensor[2:6], [w for row in tasks.weights for w in row])
    choices = [(KEEPS.index(choice.keep), *choice[1:]) for choice in tasks.choices]
    failed, *what = backend.engine.soup_tasks(
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
    )
    if failed:
        raise StreamError(*what)


def dots(segment: Segment, *, centered: bool = False, threads: int) -> np.ndarray:
    """Dot products of a segment's inputs with one another, (m, m) float64; outputs are not looked at. Raises StreamError.

    centered: of what the inputs differ by from input 0.
    """
    m = len(segment.in_files)
    if backend.choose(torch.device("cpu")) == "cpu":
        coded = (segment.n, [code(t) for t in segment.in_types], *segment[2:])
        failed, *what, found = backend.engine.soup_dots(coded, centered, MOST_CHUNK, threads)
        if failed:
            raise StreamError(*what)
        return np.array(found).reshape(m, m)
    total = torch.zeros(m, m, dtype=torch.float64)
    for first in range(0, segment.n, MOST_CHUNK):
        rows = torch.stack([x.double() for x in _inputs(segment, 0, first, min(MOST_CHUNK, segment.n - first))])
        if centered:
            rows[1:] -= rows[:1]
        total += rows @ rows.T
    return total.numpy()


def _stream_by_torch(segments: Sequence[Segment], out_type: str, chunk: int) -> None:
    for number, of in enumerate(segments):
        m = len(of.in_files)
        rows = [of.weights[k * m : (k + 1) * m] for k in range(len(of.out_files))]
        for first in range(0, of.n, chunk):
            n = min(chunk, of.n - first)
            outs = reference.weighted_sums(_inputs(of, number, first, n), rows, TORCH[out_type])
            for k, out in enumerate(outs):
                data = memoryview(out.view(torch.uint8).numpy())
                _write(of.out_files[k], data, of.out_offsets[k] + first * SIZES[out_type], number, k)


def _inputs(of: Segment, number: int, first: int, n: int) -> list[Tensor]:
    found = []
    for i, name in enumerate(of.in_types):
        data = _read(of.in_files[i], n * SIZES[name], of.in_offsets[i] + first * SIZES[name], number, i)
        found.append(torch.frombuffer(data, dtype=TORCH[name]))
    return found


def _read(file: int, nbytes: int, offset: int, segment: int, number: int) -> bytearray:
    found = bytearray()
    while len(found) < nbytes:
        try:
            data = os.pread(file, nbytes - len(found), offset + len(found))
        except OSError as error:
            raise StreamError(False, error.errno, segment, number) from None
        if not data:
            raise StreamError(False, 0, segment, number)
        found += data
    return found


def _write(file: int, data: memoryview, offset: int, segment: int, number: int) -> None:
    while data:
        try:
            done = os.pwrite(file, data, offset)
        except OSError as error:
            raise StreamError(True, error.errno, segment, number) from None
        data, offset = data[done:], offset + done


def joined(segments: Iterator[Segment], out_width: int) -> Iterator[Segment]:
    """Neighbours that lie together in every file, as one."""
    held: Segment | None = None
    for segment in segments:
        if held is not None and _follows(held, segment, out_width):
            held = held._replace(n=held.n + segment.n)
        else:
            if held is not None:
                yield held
            held = segment
    if held is not None:
        yield held


def _follows(a: Segment, b: Segment, out_width: int) -> bool:
    same = (a.in_types, a.in_files, a.out_files, a.weights) == (b.in_types, b.in_files, b.out_files, b.weights)
    ends = tuple(at + a.n * SIZES[name] for at, name in zip(a.in_offsets, a.in_types, strict=True))
    return same and ends == b.in_offsets and tuple(at + a.n * out_width for at in a.out_offsets) == b.out_offsets
