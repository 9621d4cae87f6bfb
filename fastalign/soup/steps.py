"""The work on one tensor or a range of its bytes, and its statistics: plain values, for the native extension and for
torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastalign._base.errors import UserError
from fastalign.soup.checkpoint import Checkpoint


class Segment(NamedTuple):
    """n elements that are contiguous in every input and output; files are descriptors, offsets bytes.

    weights: (outputs × inputs), row by row.
    """

    n: int
    in_types: tuple[str, ...]
    in_files: tuple[int, ...]
    in_offsets: tuple[int, ...]
    out_files: tuple[int, ...]
    out_offsets: tuple[int, ...]
    weights: list[float]


def segment_of(inputs: Sequence[Checkpoint], name: str, files: Mapping[Path, int]) -> Segment:
    """A whole tensor of the inputs; files: their open files. Outputs are omitted."""
    tensors = [one[name] for one in inputs]
    return Segment(
        tensors[0].numel,
        tuple(of.dtype for of in tensors),
        tuple(files[one.path_of(name)] for one in inputs),
        tuple(of.offset for of in tensors),
        (),
        (),
        [],
    )


class Seen(NamedTuple):
    """Statistics. digests: added to each output's digest, 0 if not requested; inputs, outputs: for each (count,
    segment, element): the number of non-finite numbers, and the first one's position. Those of outputs are counted only
    if the corresponding inputs are finite."""

    digests: list[int]
    inputs: list[tuple[int, int, int]]
    outputs: list[tuple[int, int, int]]


class StreamError(OSError):
    """A file that could not be read or written. `segment`, `file`: which, counted from 0; errno 0: it ended early."""

    writing: bool
    segment: int
    file: int

    def __init__(self, writing: bool, error: int, segment: int, file: int):
        super().__init__(error, os.strerror(error) if error else "ended while it was read")
        self.writing, self.segment, self.file = writing, segment, file


KEEPS = ("all", "band", "random", "ranked")  # in the order of TaskKeep in csrc/soup_tasks.h


class Choice(NamedTuple):
    """Which elements of one task vector are kept, and how they are scaled.

    all: every one. band: those with rank by magnitude in [first, last), the smallest having rank 0; among equals the
    earlier ranks lower, or with largest_first higher. random: each at random, with `probability`. ranked: at random,
    with a probability that grows with the rank within the row, from probability - epsilon to probability + epsilon.

    scale: of the kept elements. own_scale: each is divided by its own probability. match_sum: rescaled to the sum of
    magnitudes of the whole task vector, if both are at least 1e-7. stream: of random numbers.
    """

    keep: str = "all"
    first: int = 0
    last: int = 0
    largest_first: bool = False
    probability: float = 1.0
    epsilon: float = 0.0
    own_scale: bool = False
    match_sum: bool = False
    scale: float = 1.0
    stream: int = 0


class Tasks(NamedTuple):
    """How one tensor is merged: a choice per model, weights (outputs × models), and options."""

    choices: tuple[Choice, ...]
    weights: tuple[tuple[float, ...], ...]
    factor: float  # of the merged task vector, λ
    elect: bool
    normalize: bool
    seed: int
    row: int  # elements of the tensor's last dimension


def stream_of(name: str, model: int) -> int:
    """The random stream of a tensor and a model, independent of shards and threads."""
    return int.from_bytes(hashlib.sha256(f"{model} {name}".encode()).digest()[:8], "little") >> 1


class NotFinite:
    """Counts, and the first tensor of each, by input and by output. As JSON: {"inputs": {name: [count, tensor]},
    "outputs": ...}.

    An output's count includes elements whose inputs are all finite, or in other chunks: numbers outside its type's
    range.
    """

    def __init__(self, record: Mapping[str, Any] | None = None):
        self.record: dict[str, dict[str, list[Any]]] = {"inputs": {}, "outputs": {}}
        self.join(record or {})

    def __bool__(self) -> bool:
        return any(self.record.values())

    def add(self, side: str, name: str, count: int, tensor: str) -> None:
        """side: "inputs" or "outputs"; an output's name is its folder's, "" for a single one."""
        if count:
            self.record[side].setdefault(name, [0, tensor])[0] += count

    def join(self, record: Mapping[str, Any], *, strict: bool = False) -> None:
        """strict: raise UserError if there are any."""
        for side, counts in record.items():
            for name, (count, tensor) in counts.items():
                self.add(side, name, count, tensor)
        if strict and self:
            raise UserError(f"strict: {self.message()}")

    def message(self) -> str:
        """For people, in one line."""
        inputs = [
            f"{count:,} numbers of {name} are NaN or infinite (first in {tensor})"
            for name, (count, tensor) in self.record["inputs"].items()
        ]
        outputs = [
            f"{count:,} numbers of the output{f' {name}' if name else ''} are beyond its type's range (first in "
            f"{tensor})"
            for name, (count, tensor) in self.record["outputs"].items()
        ]
        shown = [*inputs[:3], *outputs[:3]]
        more = len(inputs) + len(outputs) - len(shown)
        return "; ".join(shown) + (f"; and so of {more} more models" if more else "")
