"""The prompts of a PPO run: shuffled per epoch, distributed over the processes, and resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler, default_collate

from fastalign._base.errors import UserError

COLUMNS = ("label", "query", "response")


class PromptLoader(DataLoader[Any]):
    """Batches of this process's rows. A global batch is a slice of the epoch's order; process r gets the r-th part of
    it, so that a single process with the whole batch sees the same rows. Rows that do not fill a batch are dropped from
    the epoch."""

    def __init__(
        self, dataset: Any, batch_size: int, collate: Callable, *, seed: int, rank: int, world: int, device: Any
    ):
        if len(dataset) < batch_size * world:
            raise UserError(
                f"dataset must have at least batch_size · processes = {batch_size} · {world} rows, got {len(dataset)}"
            )
        self.order: _Order = _Order(len(dataset), batch_size, seed, rank, world)
        self.to = device
        # Its own generator: DataLoader draws a seed per iteration, which a resumed run would draw twice.
        super().__init__(dataset, batch_sampler=self.order, collate_fn=collate, generator=torch.Generator())

    def __iter__(self) -> Any:
        from accelerate.utils import send_to_device

        for batch in super().__iter__():
            # Counted when a batch is returned: DataLoader may fetch indices ahead.
            self.order.done += 1
            yield send_to_device(batch, self.to)
        self.order.epoch, self.order.done = self.order.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.order.epoch, "done": self.order.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration yields the rest of the interrupted epoch."""
        self.order.epoch, self.order.done = state["epoch"], state["done"]
        self.order.resumed = True


class _Order(Sampler):
    """Indices by batch: epoch e's permutation is a function of (seed, e) only."""

    rows: int
    batch_size: int
    seed: int
    rank: int
    world: int
    epoch: int
    done: int
    resumed: bool

    def __init__(self, rows: int, batch_size: int, seed: int, rank: int, world: int):
        self.rows, self.batch_size, self.seed, self.rank, self.world = rows, batch_size, seed, rank, world
        self.epoch, self.done, self.resumed = 0, 0, False

    def __len__(self) -> int:
        return self.rows // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[list[int]]:
        if self.done and not self.resumed:  # the last iteration was not finished: this is a new epoch
            self.epoch, self.done = self.epoch + 1, 0
        self.resumed = False
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.rows, generator=generator).tolist()
        for batch in range(self.done, len(self)):
            first = (batch * self.world + self.rank) * self.batch_size
            yield order[first : first + self.batch_size]


def lists(rows: list[Any]) -> Any:
    """The classic collator: a list per column, rows of numbers as tensors; other rows use torch's default collator.

    Raises UserError if rows have different columns, or torch's collator cannot batch them.
    """
    if not isinstance(rows[0], Mapping):
        try:
            return default_collate(rows)
        except (TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"dataset needs a data_collator, torch's default_collate cannot batch its rows: {reason}"
            ) from None
    for row in rows:
        if unlike := set(row) ^ set(rows[0]):
            raise UserError(f"dataset must have the same columns in every row, one lacks {min(map(str, unlike))!r}")
    return {name: [_tensor(row[name]) for row in rows] for name in rows[0]}


def used_columns(dataset: Any, accepted: Any) -> Any:
    """A 🤗 dataset without the columns that neither the model nor a script uses."""
    if not hasattr(dataset, "column_names"):
        return dataset
    keep = [name for name in dataset.column_names if name in accepted or name in COLUMNS]
    if "input_ids" not in keep and "query" not in keep:
        raise UserError(
            f"dataset must have a column 'input_ids' (from the tokenizer) or 'query', got "
            f"{', '.join(dataset.column_names) or 'none'}; PPOConfig(remove_unused_columns=False) takes any"
        )
    return dataset.select_columns(keep)


def _tensor(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and value and all(isinstance(x, (int, float)) for x in value):
        return torch.tensor(value)
    return value
