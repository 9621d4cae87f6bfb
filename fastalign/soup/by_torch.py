"""What the engine does with files (stream.py), by torch, where it is not built: the same segments, the same results."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastalign import reference
from fastalign.soup.dtypes import SIZES, in_torch
from fastalign.soup.stream import Segment, StreamError
from fastalign.soup.task_vectors import merge_tensor
from fastalign.soup.tasks import Tasks


def stream(segments: Sequence[Segment], out_type: str, chunk: int) -> None:
    for number, of in enumerate(segments):
        m = len(of.in_files)
        rows = [of.weights[k * m : (k + 1) * m] for k in range(len(of.out_files))]
        for first in range(0, of.n, chunk):
            n = min(chunk, of.n - first)
            outs = reference.weighted_sums(_inputs(of, number, first, n), rows, in_torch(out_type))
            for k, out in enumerate(outs):
                data = memoryview(out.view(torch.uint8).numpy())
                _write(of.out_files[k], data, of.out_offsets[k] + first * SIZES[out_type], number, k)


def merge_tasks(tensor: Segment, tasks: Tasks, out_type: str) -> None:
    outs = merge_tensor(_inputs(tensor, 0, 0, tensor.n), tasks, in_torch(out_type))
    for k, out in enumerate(outs):
        _write(tensor.out_files[k], memoryview(out.view(torch.uint8).numpy()), tensor.out_offsets[k], 0, k)


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
