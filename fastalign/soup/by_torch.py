"""What the engine does with files (stream.py), by torch, where it is not built: the same segments, the same results."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastalign import reference
from fastalign.soup.dtypes import SIZES, in_torch
from fastalign.soup.stream import Seen, Segment, StreamError
from fastalign.soup.task_vectors import merge_tensor
from fastalign.soup.tasks import Tasks


def stream(segments: Sequence[Segment], out_type: str, chunk: int) -> Seen:
    seen = _Seen(segments[0])
    for number, of in enumerate(segments):
        m = len(of.in_files)
        rows = [of.weights[k * m : (k + 1) * m] for k in range(len(of.out_files))]
        for first in range(0, of.n, chunk):
            n = min(chunk, of.n - first)
            inputs = _inputs(of, number, first, n)
            outs = reference.weighted_sums(inputs, rows, in_torch(out_type))
            seen.add(inputs, outs, number, first, partial(reference.weighted_sums, inputs, rows, torch.float32))
            for k, out in enumerate(outs):
                data = memoryview(out.view(torch.uint8).numpy())
                _write(of.out_files[k], data, of.out_offsets[k] + first * SIZES[out_type], number, k)
    return seen.found


def merge_tasks(tensor: Segment, tasks: Tasks, out_type: str) -> Seen:
    inputs, seen = _inputs(tensor, 0, 0, tensor.n), _Seen(tensor)
    outs = merge_tensor(inputs, tasks, in_torch(out_type))
    seen.add(inputs, outs, 0, 0, lambda: merge_tensor(inputs, tasks, torch.float32))
    for k, out in enumerate(outs):
        _write(tensor.out_files[k], memoryview(out.view(torch.uint8).numpy()), tensor.out_offsets[k], 0, k)
    return seen.found


class _Seen:
    """As the engine counts: see `Seen`."""

    def __init__(self, of: Segment):
        self.found = Seen([0] * len(of.out_files), [(0, 0, 0)] * len(of.in_files), [(0, 0, 0)] * len(of.out_files))

    def add(
        self, inputs: list[Tensor], outs: list[Tensor], segment: int, first: int, wide: Callable[[], list[Tensor]]
    ) -> None:
        """wide: the outputs in float32, for a type that has no infinity."""
        bad = [~x.double().isfinite() for x in inputs]
        _count(self.found.inputs, bad, segment, first)
        if not any(which.any() for which in bad):
            bad = [~x.double().isfinite() for x in outs]
            if outs[0].dtype == torch.float8_e4m3fn:
                bad = [x.abs() > 464 for x in wide()]  # beyond what rounds to its largest number, 448
            _count(self.found.outputs, bad, segment, first)


def _count(held: list[tuple[int, int, int]], bad: list[Tensor], segment: int, first: int) -> None:
    for i, which in enumerate(bad):
        count = int(which.sum())
        if count:
            place = held[i][1:] if held[i][0] else (segment, first + int(which.nonzero()[0]))
            held[i] = (held[i][0] + count, *place)


def dots(segment: Segment, chunk: int, *, centered: bool) -> np.ndarray:
    m = len(segment.in_files)
    total = torch.zeros(m, m, dtype=torch.float64)
    for first in range(0, segment.n, chunk):
        rows = torch.stack([x.double() for x in _inputs(segment, 0, first, min(chunk, segment.n - first))])
        if centered:
            rows[1:] -= rows[:1]
        total += rows @ rows.T
    return total.numpy()


def _inputs(of: Segment, number: int, first: int, n: int) -> list[Tensor]:
    found = []
    for i, name in enumerate(of.in_types):
        data = _read(of.in_files[i], n * SIZES[name], of.in_offsets[i] + first * SIZES[name], number, i)
        found.append(torch.frombuffer(data, dtype=in_torch(name)))
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
