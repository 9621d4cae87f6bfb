"""Completions after their prompts, in parts of bounded size that are one forward pass each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fastalign.train.rows import RowBatch, batch_of


class Completion(Protocol):
    """counts: 1 for each token in the loss, 0 for others."""

    @property
    def prompt(self) -> list[int]: ...
    @property
    def completion(self) -> list[int]: ...
    @property
    def counts(self) -> list[int]: ...


C = TypeVar("C", bound=Completion)


def parts(completions: Sequence[C], limit: int | None, *, share: bool, at_least: int = 1) -> list[list[C]]:
    """The completions in order, in parts of at most `limit` tokens (a single one may have more); at least `at_least`
    parts if there are that many completions. share: the prompt of neighbours counts once."""
    result: list[list[C]] = []
    size = 0
    for one in completions:
        new = not (share and result and result[-1][-1].prompt == one.prompt)
        tokens = len(one.completion) + len(one.prompt) * new
        if not result or (limit is not None and size + tokens > limit):
            result.append([])
            size, tokens = 0, len(one.completion) + len(one.prompt)
        result[-1].append(one)
        size += tokens
    while len(result) < min(at_least, len(completions)):
        i = max(range(len(result)), key=lambda i: len(result[i]))
        half = len(result[i]) // 2
        result[i : i + 1] = [result[i][:half], result[i][half:]]
    return result


def row_batch(completions: Sequence[Completion], device: torch.device, *, pack: bool) -> RowBatch:
    """(R, T): prompt, completion, padding; labels are the completion tokens in the loss."""
    rows = [[*one.prompt, *one.completion] for one in completions]
    ids = padded(rows, 0, torch.int64)
    attention = padded([[1] * len(row) for row in rows], 0, torch.int64)
    counted = padded([[0] * len(one.prompt) + one.counts for one in completions], 0, torch.bool)
    labels = ids.masked_fill(~counted, -100)
    groups = [list(group) for _, group in itertools.groupby(range(len(rows)), lambda i: completions[i].prompt)]
    return batch_of(ids, attention, labels, groups if pack else None, device)


def padded(rows: list[list], value: Any, dtype: torch.dtype) -> Tensor:
    """(R, longest): each row followed by `value`."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=dtype)
