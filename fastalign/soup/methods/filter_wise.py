"""Model Stock for each filter (arXiv 2403.19522): a share t for each row of a tensor, from the angles between its task vectors.

A row runs along a tensor's last dimension; a vector is one row. Made by torch, some rows at a time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fastalign.soup.checkpoint import SIZES, Checkpoint, in_torch, read_bytes
from fastalign.soup.methods import spheres as geometry
from fastalign.soup.methods.settings import Places, Setting
from fastalign.soup.stream import mix_tensors

_BLOCK = 32_000_000  # bytes of rows at once, where the limit allows


def blocks_of(
    inputs: Sequence[Checkpoint], names: Sequence[str], floor: Setting, stored: Mapping[str, str], memory_limit: int
) -> dict[str, Callable[[], Iterator[list[Tensor]]]]:
    """For each tensor what makes its blocks, one output's. inputs: the base, then the models; stored: the types to store in."""
    places, room = Places(names), min(_BLOCK, memory_limit // 2)
    return {
        name: functools.partial(
            _blocks, inputs, name, floor.at(name, places[name]) or 0.0, in_torch(stored[name]), room
        )
        for name in names
    }  # fmt: skip


def _blocks(
    inputs: Sequence[Checkpoint], name: str, floor: float, dtype: torch.dtype, room: int
) -> Iterator[list[Tensor]]:
    shape = inputs[0][name].shape
    types = [in_torch(one[name].dtype) for one in inputs]
    wide = torch.float64 if torch.float64 in (*types, dtype) else torch.float32
    row = shape[-1] if shape else 1
    rows = max(1, room // (row * wide.itemsize * (2 * len(inputs) + 2)))
    readers = [read_bytes(one, name, rows * row * SIZES[one[name].dtype]) for one in inputs]
    for held in itertools.zip_longest(*readers):
        base, *models = [
            torch.frombuffer(bytearray(data), dtype=of).view(-1, row).to(wide)
            for data, of in zip(held, types, strict=True)
        ]
        yield mix_tensors([rows_of(base, models, floor)], [[1.0]], dtype)


def rows_of(base: Tensor, models: Sequence[Tensor], floor: float) -> Tensor:
    """t mean + (1 - t) base row by row, tensors (rows, n); t as `geometry.model_stock` has it.

    floor: the least product of two lengths that a dot product is divided by.
    """
    deltas = torch.stack([model - base for model in models], 1)  # (rows, m, n)
    with np.errstate(invalid="ignore", over="ignore"):  # of a row with NaN or infinities, NaN is made
        t = geometry.model_stock((deltas @ deltas.mT).double().numpy(), floor=floor)
    return base + torch.from_numpy(t).to(base.dtype)[:, None] * deltas.mean(1)
