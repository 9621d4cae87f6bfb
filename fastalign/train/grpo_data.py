"""The order in which GRPO goes through its prompts: TRL's, in which each prompt is repeated for its completions, and a
batch for every step that trains on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fastalign._base.errors import UserError


class Repeats(NamedTuple):
    """Each batch of `prompts` different prompts comes `batches` times, each prompt `completions` times in a row."""

    prompts: int
    completions: int
    batches: int = 1

    def of(self, batch: Any) -> Iterator[Any]:
        for _ in range(self.batches):
            for one in batch:
                yield from itertools.repeat(one, self.completions)


class PromptSampler(torch.utils.data.Sampler[int]):
    """Row numbers of a data set with a length; a last incomplete batch is left out, if `whole`.

    epoch: gives the number of the epoch that begins, for its order; None: one order for all, that of the seed.
    """

    def __init__(
        self,
        name: str,
        count: int,
        repeats: Repeats,
        *,
        seed: int,
        shuffle: bool = True,
        whole: bool = True,
        epoch: Callable[[], int] | None = None,
    ):
        if count < (repeats.prompts if whole else 1):
            rule = f"{name} must have at least generation_batch_size / num_generations = {repeats.prompts} prompts"
            raise UserError(f"{rule}, got {count}")
        self.count = count - count % repeats.prompts if whole else count
        self.repeats, self.rows, self.seed, self.shuffle, self.epoch = repeats, count, seed, shuffle, epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.rows))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed)
            for _ in range(1 if self.epoch is None else self.epoch() + 1):  # as TRL, whose generator goes on
                order = torch.randperm(self.rows, generator=generator).tolist()
        for start in range(0, self.count, self.repeats.prompts):
            yield from self.repeats.of(order[start : start + self.repeats.prompts])

    def __len__(self) -> int:
        return self.count * self.repeats.completions * self.repeats.batches


def is_stream(dataset: Any) -> bool:
    """Whether a data set, or a part of a dictionary of them, has no length."""
    parts = dataset.values() if isinstance(dataset, dict) else [] if dataset is None else [dataset]
    return any(not hasattr(part, "__len__") for part in parts)


class PromptStream(torch.utils.data.IterableDataset):
    """The same for a data set without a length: in its own order, or shuffled by `seed` as far as it can be."""

    def __init__(self, rows: Any, repeats: Repeats, seed: int | None):
        shuffles = seed is not None and hasattr(rows, "shuffle")
        self.rows, self.repeats = rows.shuffle(seed=seed) if shuffles else rows, repeats

    def __iter__(self) -> Iterator[Any]:
        rows = iter(self.rows)
        while len(batch := list(itertools.islice(rows, self.repeats.prompts))) == self.repeats.prompts:
            yield from self.repeats.of(batch)
