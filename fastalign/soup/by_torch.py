"""Merges of task vectors, defined in plain torch; and, if the native extension is not built, its work from file to file
(stream.py) in torch: the same segments, the same results."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastalign import reference
from fastalign.soup.checkpoint import SIZES, in_torch
from fastalign.soup.steps import Choice, Seen, Segment, StreamError, Tasks

# ---- merges of task vectors ----


_BLOCK = 64  # random numbers per block of counters


def merge_tensor(inputs: Sequence[Tensor], tasks: Tasks, dtype: torch.dtype) -> list[Tensor]:
    """The outputs for one tensor. inputs: the base, then the models; in float32, or float64 if one of them is."""
    wide = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    base, *models = [x.detach().reshape(-1).to(wide) for x in inputs]
    deltas = [
        sparse(model - base, choice, tasks.seed, tasks.row) for model, choice in zip(models, tasks.choices, strict=True)
    ]
    outs = []
    for row in tasks.weights:
        weighted = torch.stack([x * (w * c.scale) for x, w, c in zip(deltas, row, tasks.choices, strict=True)])
        weights = torch.tensor(row, dtype=wide)[:, None]
        total = weighted.sum(0)
        if tasks.elect:
            taken = torch.where(total >= 0, weighted > 0, weighted < 0)
            merged = torch.where(total.isnan(), total, (weighted * taken).sum(0))
            divisor = (weights * taken).sum(0)
            divisor[divisor == 0] = 1
        else:
            merged, divisor = total, weights.sum()
            divisor = divisor if divisor.abs() >= 1e-8 else torch.ones((), dtype=wide)
        if tasks.normalize:
            merged = merged / divisor
        outs.append(reference.weighted_sums([base + tasks.factor * merged], [[1.0]], dtype)[0].view(inputs[0].shape))
    return outs


def sparse(delta: Tensor, choice: Choice, seed: int, row: int) -> Tensor:
    """A flat task vector with zeros for what is dropped; scaled by its probabilities or its sum, not yet by `scale`."""
    kept = delta * mask(delta, choice, seed, row)
    if choice.own_scale:
        kept = (kept.double() / _chances(delta, choice, row)).to(delta.dtype)
    if choice.match_sum:
        before, after = delta.double().abs().sum(), kept.double().abs().sum()
        if before >= 1e-7 and after >= 1e-7:
            kept = kept * (before / after)
    return kept.to(delta.dtype)


def mask(delta: Tensor, choice: Choice, seed: int, row: int) -> Tensor:
    """Which elements of a flat task vector stay, (n,) bool."""
    n = len(delta)
    if choice.keep == "all":
        return torch.ones(n, dtype=torch.bool)
    if choice.keep == "band":
        order = delta.abs().argsort(descending=choice.largest_first, stable=True)
        first, last = (n - choice.last, n - choice.first) if choice.largest_first else (choice.first, choice.last)
        stays = torch.zeros(n, dtype=torch.bool)
        stays[order[first:last]] = True
        return stays
    chances = (
        torch.tensor(choice.probability, dtype=torch.float64)
        if choice.keep == "random"
        else _chances(delta, choice, row)
    )
    return random_words(n, seed, choice.stream).double() < chances * 2.0**32


def _chances(delta: Tensor, choice: Choice, row: int) -> Tensor:
    """The probability of being kept, by the rank of the magnitude within the row, (n,) float64."""
    if row <= 1:
        return torch.full((len(delta),), choice.probability, dtype=torch.float64)
    order = delta.view(-1, row).abs().argsort(dim=1, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(row).expand_as(order))
    step = 2 * choice.epsilon / (row - 1)
    return ((choice.probability - choice.epsilon) + ranks.double() * step).view(-1)


def random_words(n: int, seed: int, stream: int) -> Tensor:
    """Elements' 32-bit random numbers, (n,) int64: j's is word (j % 64) // 16 of Philox4x32-10 with key `seed` and
    the counter (stream, j // 64 * 16 + j % 16)."""
    blocks = -(-n // _BLOCK)
    words = reference.philox(seed, torch.tensor(stream), torch.arange(blocks * _BLOCK // 4))
    return words.view(blocks, _BLOCK // 4, 4).transpose(1, 2).reshape(-1)[:n]


# ---- from file to file ----


def weighted_sums(segments: Sequence[Segment], out_type: str, chunk: int) -> Seen:
    run = _Run(segments[0], in_torch(out_type))
    for number, of in enumerate(segments):
        m = len(of.in_files)
        rows = [of.weights[k * m : (k + 1) * m] for k in range(len(of.out_files))]
        for first in range(0, of.n, chunk):
            inputs = _inputs(of, number, first, min(chunk, of.n - first))
            run.write(of, number, first, inputs, partial(reference.weighted_sums, inputs, rows))
    return run.seen


def merge_tasks(tensor: Segment, tasks: Tasks, out_type: str) -> Seen:
    run, inputs = _Run(tensor, in_torch(out_type)), _inputs(tensor, 0, 0, tensor.n)
    run.write(tensor, 0, 0, inputs, partial(merge_tensor, inputs, tasks))
    return run.seen


class _Run:
    """Writes outputs of one type, and counts non-finite numbers as the native extension does: see `Seen`."""

    def __init__(self, of: Segment, dtype: torch.dtype):
        self.dtype = dtype
        self.seen = Seen([0] * len(of.out_files), [(0, 0, 0)] * len(of.in_files), [(0, 0, 0)] * len(of.out_files))

    def write(
        self, of: Segment, number: int, first: int, inputs: list[Tensor], make: Callable[[torch.dtype], list[Tensor]]
    ) -> None:
        """make: computes the outputs in a given type. first: the segment's element at which they begin."""
        outs = make(self.dtype)
        bad = [~x.double().isfinite() for x in inputs]
        _count(self.seen.inputs, bad, number, first)
        if not any(which.any() for which in bad):
            # float8_e4m3fn has no infinity: the bound of what rounds to its largest number, 448.
            if self.dtype == torch.float8_e4m3fn:
                bad = [x.abs() > 464 for x in make(torch.float32)]
            else:
                bad = [~x.double().isfinite() for x in outs]
            _count(self.seen.outputs, bad, number, first)
        for k, out in enumerate(outs):
            data, offset = out.view(-1).view(torch.uint8).numpy().data, first * self.dtype.itemsize
            _write(of.out_files[k], data, of.out_offsets[k] + offset, number, k)


def _count(counts: list[tuple[int, int, int]], bad: list[Tensor], segment: int, first: int) -> None:
    for i, which in enumerate(bad):
        if n := int(which.sum()):
            place = counts[i][1:] if counts[i][0] else (segment, first + int(which.nonzero()[0]))
            counts[i] = (counts[i][0] + n, *place)


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
    tensors = []
    for i, name in enumerate(of.in_types):
        data = _read(of.in_files[i], n * SIZES[name], of.in_offsets[i] + first * SIZES[name], number, i)
        tensors.append(torch.frombuffer(data, dtype=in_torch(name)))
    return tensors


def _read(file: int, nbytes: int, offset: int, segment: int, number: int) -> bytearray:
    data = bytearray()
    while len(data) < nbytes:
        try:
            more = os.pread(file, nbytes - len(data), offset + len(data))
        except OSError as error:
            raise StreamError(False, error.errno or 0, segment, number) from None
        if not more:
            raise StreamError(False, 0, segment, number)
        data += more
    return data


def _write(file: int, data: memoryview, offset: int, segment: int, number: int) -> None:
    while data:
        try:
            done = os.pwrite(file, data, offset)
        except OSError as error:
            raise StreamError(True, error.errno or 0, segment, number) from None
        data, offset = data[done:], offset + done
