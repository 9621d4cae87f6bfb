"""What is done with the task vectors of one tensor: which of their elements stay, and how they are added up."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

KEEPS = ("all", "band", "random", "ranked")  # in the order of TaskKeep in csrc/soup_tasks.h


class Choice(NamedTuple):
    """Which elements of one task vector stay, and by how much they are scaled.

    all: every one. band: those whose rank by size lies in [first, last), the least having rank 0; among equals the earlier
    is the less, or with largest_first the greater. random: each by chance, with `probability`. ranked: by chance, with a
    probability that grows with the rank within the row, from probability - spread to probability + spread.

    scale: of what stays. own_scale: each is divided by its own probability. match_sum: scaled so that the sum of sizes is
    that of the whole task vector, where both are at least 1e-7. stream: which random numbers.
    """

    keep: str = "all"
    first: int = 0
    last: int = 0
    largest_first: bool = False
    probability: float = 1.0
    spread: float = 0.0
    own_scale: bool = False
    match_sum: bool = False
    scale: float = 1.0
    stream: int = 0


class Tasks(NamedTuple):
    """How one tensor is merged: a choice for each model, weights (outputs × models), and what is done with them."""

    choices: tuple[Choice, ...]
    weights: tuple[tuple[float, ...], ...]
    factor: float  # of the merged task vector, λ
    elect: bool
    normalize: bool
    seed: int
    row: int  # elements of the tensor's last dimension


def stream_of(name: str, model: int) -> int:
    """The stream of random numbers of a tensor and a model: of nothing else, so that shards and threads do not matter."""
    return int.from_bytes(hashlib.sha256(f"{model} {name}".encode()).digest()[:8], "little") >> 1
