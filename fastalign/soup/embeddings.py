"""Embeddings and heads with their rows put in another vocabulary's order, in files that a merge reads in place of the models' own.

As mergekit 0.1.5 defines them: a model's own row; for a token that it lacks the base's, else the mean of those that the other
models have; and where rows are padded, the mean of all that come before.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastalign._base.errors import UserError
from fastalign.soup.checkpoint import Checkpoint, File, Tensor
from fastalign.soup.dtypes import FLOATS, SIZES, in_torch
from fastalign.soup.vocabulary import ROWS, Vocabulary, embeddings_of

_BLOCK = 32_000_000  # bytes of rows at once


class _Table(NamedTuple):
    """One tensor. numbers: for each input, the row of each token, -1 where it has none; made: for each input, where the new one
    lies in its file, None for one that stays or is cut; base: the input whose rows others take."""

    name: str
    numbers: list[np.ndarray]
    made: list[Tensor | None]
    base: int | None


@dataclass(frozen=True)
class Embeddings:
    """What is to be written before a merge. sources: the inputs as they are; files: those that are written, None for an input
    that needs none; key: what decides their bytes beside the inputs'."""

    sources: tuple[Checkpoint, ...]
    files: tuple[Path | None, ...]
    tables: tuple[_Table, ...]
    key: str

    @property
    def names(self) -> set[str]:
        """Of the tensors that are made anew."""
        return {table.name for table in self.tables if any(table.made)}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for table in self.tables for tensor in table.made if tensor)

    def write(self, path_of: Callable[[str], Path]) -> None:
        """path_of: told each file's name before it is made, it says where."""
        with ExitStack() as stack:
            files = [path and stack.enter_context(open(path_of(path.name), "wb")) for path in self.files]
            for table in self.tables:
                if any(table.made):
                    _write(table, self.sources, files)

    def remove(self) -> None:
        for path in filter(None, self.files):
            path.unlink(missing_ok=True)


def in_order_of(
    vocabulary: Vocabulary, inputs: Sequence[Checkpoint], names: Sequence[str], folder: Path
) -> tuple[tuple[Checkpoint, ...], Embeddings]:
    """The inputs with rows for the vocabulary's tokens, as they will be when `Embeddings.write` has made its files in `folder`.

    Where a model has the same tokens and at least as many rows, these are cut and nothing is written. Raises UserError.
    """
    for one in {owner.name: owner for model in inputs for owner in _owners(model)}.values():
        embeddings_of(one)
    tables = []
    ends = [0] * len(inputs)
    for name in (name for name in names if name.endswith(ROWS)):
        owners = [_owner(one, name) for one in inputs]
        numbers = [
            _numbers(vocabulary, owner.name, one[name].shape[0]) for owner, one in zip(owners, inputs, strict=True)
        ]
        none = np.flatnonzero(np.all([x < 0 for x in numbers], axis=0))
        if len(none):
            token = next(token for token, i in vocabulary.tokens.items() if i == none[0])
            raise UserError(
                f"token {token!r} is {none[0]} in the tokenizer and absent in all models: {name} has no row for it"
            )
        types = {one[name].dtype for one in inputs}
        if not types <= set(FLOATS):
            raise UserError(f"{name} is {', '.join(types)}: its rows cannot be put in another order")
        dtype = types.pop() if len(types) == 1 else "F64" if "F64" in types else "F32"
        made: list[Tensor | None] = []
        for i, one in enumerate(inputs):
            if vocabulary.rows == len(numbers[i]) and (numbers[i] == np.arange(vocabulary.rows)).all():
                made.append(None)
                continue
            shape = (vocabulary.rows, *one[name].shape[1:])
            made.append(Tensor(dtype, shape, ends[i], math.prod(shape) * SIZES[dtype]))
            ends[i] += made[-1].nbytes
        base = next((i for i, owner in enumerate(owners) if owner.name == vocabulary.base), None)
        tables.append(_Table(name, numbers, made, base))
    files = tuple(folder / f"rows-{i}.bin" if end else None for i, end in enumerate(ends))
    basis = hashlib.sha256(repr((vocabulary.rows, [table.base for table in tables])).encode())
    for table in tables:
        for held in table.numbers:
            basis.update(held.tobytes())
    made = tuple(
        _with(one, [(table.name, table.made[i]) for table in tables], files[i], vocabulary.rows)
        for i, one in enumerate(inputs)
    )
    return made, Embeddings(tuple(inputs), files, tuple(tables), basis.hexdigest())


def _owners(model: Checkpoint) -> list[Checkpoint]:
    return [piece.model for piece in model.pieces] or [model]


def _owner(model: Checkpoint, name: str) -> Checkpoint:
    """The model that a tensor is of; a stack's are of several."""
    path = model.files[model.where[name]].path
    return next(one for one in _owners(model) if any(file.path == path for file in one.files))


def _numbers(vocabulary: Vocabulary, model: str, rows: int) -> np.ndarray:
    known = vocabulary.known[model]
    found = np.full(len(vocabulary.tokens), -1)
    for token, i in vocabulary.tokens.items():
        number = known.get(token, -1)
        found[i] = number if number < rows else -1  # a token without a row is one that the model does not know
    return found


def _with(model: Checkpoint, tables: Sequence[tuple[str, Tensor | None]], path: Path | None, rows: int) -> Checkpoint:
    new = {name: tensor for name, tensor in tables if tensor is not None}
    cut = {name for name, tensor in tables if tensor is None}

    def shortened(tensor: Tensor) -> Tensor:
        shape = (rows, *tensor.shape[1:])
        return tensor._replace(shape=shape, nbytes=math.prod(shape) * SIZES[tensor.dtype])

    files = [
        replace(file, tensors={name: shortened(x) if name in cut else x for name, x in file.tensors.items() if name not in new})
        for file in model.files
    ]  # fmt: skip
    if path is not None:
        files.append(File(path, new, {}, sum(tensor.nbytes for tensor in new.values()), 0, ""))
    where = {name: number for number, file in enumerate(files) for name in file.tensors}
    return replace(model, files=tuple(files), where=where)


def _write(table: _Table, sources: Sequence[Checkpoint], files: Sequence) -> None:
    import torch

    from fastalign.soup.tensors import mix_tensors

    held = [_mapped(one, table.name) for one in sources]
    types = [in_torch(one[table.name].dtype) for one in sources]
    width = held[0].shape[1] // types[0].itemsize
    count, step = len(table.numbers[0]), max(1, _BLOCK // (8 * width * (len(sources) + 2)))
    sums = [torch.zeros(width, dtype=torch.float64) for _ in sources]
    for first in range(0, count, step):
        numbers = [x[first : first + step] for x in table.numbers]
        known = torch.from_numpy(np.stack([x >= 0 for x in numbers]))
        rows = torch.zeros(len(sources), len(numbers[0]), width, dtype=torch.float64)
        for i, number in enumerate(numbers):
            if known[i].any():
                rows[i, known[i]] = torch.from_numpy(held[i][number[number >= 0]]).view(types[i]).double()
        others = rows.sum(0) / known.sum(0).clamp(min=1)[:, None]
        if table.base is not None:
            others = torch.where(known[table.base, :, None], rows[table.base], others)
        for i, tensor in enumerate(table.made):
            if tensor is not None:
                block = torch.where(known[i, :, None], rows[i], others)
                (block,) = mix_tensors([block], [[1.0]], in_torch(tensor.dtype))
                sums[i] += block.double().sum(0)
                files[i].write(block.view(torch.uint8).numpy())
    for i, tensor in enumerate(table.made):
        if tensor is not None and tensor.shape[0] > count:
            (mean,) = mix_tensors([sums[i][None] / count], [[1.0]], in_torch(tensor.dtype))
            files[i].write(mean.repeat(tensor.shape[0] - count, 1).view(torch.uint8).numpy())


def _mapped(model: Checkpoint, name: str) -> np.ndarray:
    """(rows, bytes of a row), read where it is used."""
    tensor = model[name]
    path = model.files[model.where[name]].path
    shape = (tensor.shape[0], tensor.nbytes // tensor.shape[0])
    return np.memmap(path, dtype=np.uint8, mode="r", offset=tensor.offset, shape=shape)
