"""The order in which GRPO goes through its prompts: TRL's, in which each prompt is repeated for its completions, and a
batch for every step that trains on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import trl

from fastalign._base.errors import UserError
from fastalign._base.units import counted


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


class PromptStream(torch.utils.data.IterableDataset):
    """The same for a data set without a length, in its own order."""

    def __init__(self, rows: Any, repeats: Repeats):
        self.rows, self.repeats = rows, repeats

    def __iter__(self) -> Iterator[Any]:
        rows = iter(self.rows)
        while len(batch := list(itertools.islice(rows, self.repeats.prompts))) == self.repeats.prompts:
            yield from self.repeats.of(batch)


def check_room(prompt_ids: Sequence[list[int]], new: int, context: int, where: str = "") -> None:
    """Raises UserError for a prompt that leaves no room for `new` tokens in the model's context (0: unlimited)."""
    for ids in prompt_ids:
        if context and len(ids) + new > context:
            size = f"{counted(len(ids), 'token')} and a completion of {new} exceed the model's context of {context}"
            raise UserError(f"{where}a prompt is too long: {size}")


def with_prompts(name: str, dataset: Any, args: trl.GRPOConfig) -> Any:
    """Checks that a data set has prompts."""
    if isinstance(dataset, dict):
        return {key: with_prompts(f"{name}[{key!r}]", part, args) for key, part in dataset.items()}
    if dataset is None or isinstance(dataset, str):
        raise UserError(f"{name} must be a data set with a column prompt, got {dataset!r}")
    if not hasattr(dataset, "__len__"):
        if name == "train_dataset" and args.max_steps <= 0:
            raise UserError(f"max_steps must be set: {name} has no length")
        return dataset
    if not len(dataset):
        raise UserError(f"{name} must have at least one prompt, got none")
    columns = list(dataset[0])
    if "prompt" not in columns:
        raise UserError(f"{name} must have a column prompt, got {', '.join(columns)}")
    return dataset
