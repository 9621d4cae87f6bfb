"""The tokens of models and of their merge: one tokenizer's, or the union of all tokenizers.

Unions are defined as in mergekit 0.1.5: one tokenizer is unchanged, and the others' additional tokens are appended.
mergekit numbers the new tokens in hash-table order; here they keep their model's order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.files import read_json
from fastalign.soup.checkpoint import FLOATS, SIZES, Checkpoint, File, Tensor, in_torch

# Names of embeddings and heads, which have one row per token.
_HEADS = ("lm_head", "embed_out")
_INPUTS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
EMBEDDINGS = tuple(f"{name}.weight" for name in (*_HEADS, *_INPUTS))
ROWS = (*EMBEDDINGS, *(f"{name}.bias" for name in _HEADS))
# A tokenizer with one of these files and no tokenizer.json is not supported.
OLD_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "added_tokens.json")
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


class Vocabulary(NamedTuple):
    """The output's tokens. tokens: numbered from 0; rows: as many, or more with padding; known: each model's own
    tokens, by its name; base: the model whose row is used for tokens that a model lacks, if base has them; None: the
    mean of all models that have them; tokenizer: the content of tokenizer.json, if it is not a model's own; note: a
    note for the user, or ""."""

    tokens: Mapping[str, int]
    rows: int
    known: Mapping[str, Mapping[str, int]]
    base: str | None
    tokenizer: Mapping[str, Any] | None
    note: str


def tokens_of(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """The tokens of a tokenizer.json and their ids, including added ones."""
    words = (tokenizer.get("model") or {}).get("vocab") or {}
    tokens = dict(words.items() if isinstance(words, dict) else ((token, i) for i, (token, *_) in enumerate(words)))
    tokens.update((token.get("content"), token.get("id")) for token in tokenizer.get("added_tokens") or ())
    return tokens


def vocabulary_of(
    models: Sequence[Checkpoint], lead: Checkpoint, folder: Any, *, union: bool, multiple: int, base: str | None
) -> Vocabulary:
    """models: all that are merged; lead: its tokenizer is used for a model without one, and extended by a union;
    folder: with the output's tokenizer; multiple: pad rows to a multiple of it. Raises UserError."""
    path = folder and folder / "tokenizer.json"
    if path is None or not path.is_file():
        raise UserError(f"tokenizer needs a tokenizer.json to count its tokens, {folder or 'a bare file'} has none")
    own = read_json(path)
    read = {one.name: tokenizer for one in models if (tokenizer := _read(one)) is not None}
    made = _union(own, lead, [(one, read[one.name]) for one in models if one.name in read]) if union else own
    tokens = tokens_of(made)
    if set(tokens.values()) != set(range(len(tokens))):
        raise UserError(f"{folder}: its tokenizer's {len(tokens):,} tokens are not numbered 0 to {len(tokens) - 1:,}")
    known = {name: tokens_of(tokenizer) for name, tokenizer in read.items()}
    standing = known.get(lead.name, tokens)
    return Vocabulary(
        tokens,
        -(-len(tokens) // multiple) * multiple,
        {one.name: known.get(one.name, standing) for one in models},
        base,
        None if made is own else made,
        _note(own, made, lead.name),
    )


def embeddings_of(model: Checkpoint) -> list[str]:
    """The names of the tensors that have one row per token. Raises UserError if they cannot be determined."""
    names = [name for name in model if name.endswith(ROWS)]
    inputs = [name for name in names if name.endswith(tuple(f"{one}.weight" for one in _INPUTS)) and model[name].numel]
    if not inputs:
        raise UserError(f"{model.name}: no tensor has a name of input embeddings (*.{', *.'.join(_INPUTS)})")
    rows, *width = model[inputs[0]].shape

    def looks_like_one(name: str) -> bool:
        shape = model[name].shape
        return (shape[:1] == (rows,) and [rows] != width) or (len(shape) > 1 and any(one in name for one in _INPUTS))

    other = next((name for name in model if name not in names and looks_like_one(name)), None)
    if other is not None:
        raise UserError(f"{other} of {model.name} may have a row for each token, and is not a known embedding")
    return names


def _note(own: Mapping[str, Any], made: Mapping[str, Any], lead: str) -> str:
    mine = tokens_of(own)
    plain = [
        one["content"] for one in made.get("added_tokens") or () if one["content"] not in mine and not one["special"]
    ]
    if not plain:
        return ""
    return (
        f"{len(plain):,} tokens are added to {lead}'s tokenizer as in mergekit: each matches wherever its letters "
        f"occur in a text, before the tokenizer's own tokens (first {plain[0]!r})"
    )


def _read(model: Checkpoint) -> dict[str, Any] | None:
    if model.folder is None:
        return None
    path = model.folder / "tokenizer.json"
    if path.is_file():
        return read_json(path)
    old = next((name for name in OLD_FILES if (model.folder / name).is_file()), None)
    if old is not None:
        raise UserError(f"{model.name}: has {old} and no tokenizer.json, from which its tokens are read")
    return None


def _union(
    own: dict[str, Any], lead: Checkpoint, others: Sequence[tuple[Checkpoint, dict[str, Any]]]
) -> dict[str, Any]:
    """`own`, the tokenizer of `lead`, with the other tokenizers' additional tokens, if any."""
    mine, added = tokens_of(own), list(own.get("added_tokens") or ())
    beyond = next((token for token, i in mine.items() if i >= _rows(lead)), None)
    if beyond is not None:
        raise UserError(
            f"token {beyond!r} is {mine[beyond]} in {lead.name}, whose embeddings have {_rows(lead):,} rows"
        )
    special = {one["content"]: one for one in added}
    plain: dict[str, None] = {}
    for model, tokenizer in others:
        rows = _rows(model)
        for one in tokenizer.get("added_tokens") or ():
            if one["id"] < rows:
                special.setdefault(one["content"], one)
        plain |= {token: None for token, i in sorted(tokens_of(tokenizer).items(), key=lambda x: x[1]) if i < rows}
    new = [token for token in plain if token not in mine and token not in special]
    new += [token for token in special if token not in mine]
    numbers = {**mine, **{token: len(mine) + i for i, token in enumerate(new)}}
    there = {one["content"] for one in added}
    more = [*(token for token in special if token in mine and token not in there), *new]
    if not more:
        return own
    entries = [{**special.get(token, _PLAIN), "content": token, "id": numbers[token]} for token in more]
    return {**own, "added_tokens": sorted([*added, *entries], key=lambda one: one["id"])}


def _rows(model: Checkpoint) -> int:
    return model[embeddings_of(model)[0]].shape[0]


# ---- embeddings and heads in its order ----


_BLOCK = 32_000_000  # bytes of rows at once


class _Table(NamedTuple):
    """One tensor. numbers: for each input, the row of each token, -1 if it has none; made: for each input, the new
    tensor's offset in its file, None if the tensor is unchanged or cut; base: the input whose rows the others use."""

    name: str
    numbers: list[np.ndarray]
    made: list[Tensor | None]
    base: int | None


@dataclass(frozen=True)
class Embeddings:
    """The files to write before a merge. sources: the original inputs; files: the new file of each input, None if it
    needs none; key: what determines their bytes besides the inputs."""

    sources: tuple[Checkpoint, ...]
    files: tuple[Path | None, ...]
    tables: tuple[_Table, ...]
    key: str

    @property
    def names(self) -> set[str]:
        """Bytes of the new tensors."""
        return {table.name for table in self.tables if any(table.made)}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for table in self.tables for tensor in table.made if tensor)

    def write(self, path_of: Callable[[str], Path]) -> None:
        """path_of: returns the path for a file's name."""
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
    """The inputs with rows for the vocabulary's tokens, as they will be once `Embeddings.write` has written its files
    to `folder`.

    If a model has the same tokens and at least as many rows, its rows are cut and nothing is written. Raises UserError.
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
            raise UserError(f"{name} is {', '.join(types)}: its rows cannot be reordered")
        dtype = types.pop() if len(types) == 1 else "F64" if "F64" in types else "F32"
        made: list[Tensor | None] = []
        for i, one in enumerate(inputs):
            if vocabulary.rows == len(numbers[i]) and (numbers[i] == np.arange(vocabulary.rows)).all():
                made.append(None)
                continue
            shape = (vocabulary.rows, *one[name].shape[1:])
            table = Tensor(dtype, shape, ends[i], math.prod(shape) * SIZES[dtype])
            made.append(table)
            ends[i] += table.nbytes
        base = next((i for i, owner in enumerate(owners) if owner.name == vocabulary.base), None)
        tables.append(_Table(name, numbers, made, base))
    files = tuple(folder / f"rows-{i}.bin" if end else None for i, end in enumerate(ends))
    basis = hashlib.sha256(repr((vocabulary.rows, [table.base for table in tables])).encode())
    for table in tables:
        for numbers_of_input in table.numbers:
            basis.update(numbers_of_input.tobytes())
    outputs = tuple(
        _with(one, [(table.name, table.made[i]) for table in tables], files[i], vocabulary.rows)
        for i, one in enumerate(inputs)
    )
    return outputs, Embeddings(tuple(inputs), files, tuple(tables), basis.hexdigest())


def _owners(model: Checkpoint) -> list[Checkpoint]:
    return [piece.model for piece in model.pieces] or [model]


def _owner(model: Checkpoint, name: str) -> Checkpoint:
    """The model that a tensor belongs to; a stack has tensors of several."""
    path = model.path_of(name)
    return next(one for one in _owners(model) if any(file.path == path for file in one.files))


def _numbers(vocabulary: Vocabulary, model: str, rows: int) -> np.ndarray:
    known = vocabulary.known[model]
    numbers = np.full(len(vocabulary.tokens), -1)
    for token, i in vocabulary.tokens.items():
        number = known.get(token, -1)
        numbers[i] = number if number < rows else -1  # a token without a row counts as unknown to the model
    return numbers


def _with(model: Checkpoint, tables: Sequence[tuple[str, Tensor | None]], path: Path | None, rows: int) -> Checkpoint:
    new = {name: tensor for name, tensor in tables if tensor is not None}
    cut = {name for name, tensor in tables if tensor is None}

    def shortened(tensor: Tensor) -> Tensor:
        shape = (rows, *tensor.shape[1:])
        return tensor._replace(shape=shape, nbytes=math.prod(shape) * SIZES[tensor.dtype])

    files = [
        replace(
            file,
            tensors={name: shortened(x) if name in cut else x for name, x in file.tensors.items() if name not in new},
        )
        for file in model.files
    ]
    if path is not None:
        files.append(File(path, new, {}, sum(tensor.nbytes for tensor in new.values()), 0, ""))
    where = {name: number for number, file in enumerate(files) for name in file.tensors}
    return replace(model, files=tuple(files), where=where)


def _write(table: _Table, sources: Sequence[Checkpoint], files: Sequence) -> None:
    import torch

    from fastalign.soup.stream import mix_tensors

    mapped_rows = [_mapped(one, table.name) for one in sources]
    types = [in_torch(one[table.name].dtype) for one in sources]
    width = mapped_rows[0].shape[1] // types[0].itemsize
    count, step = len(table.numbers[0]), max(1, _BLOCK // (8 * width * (len(sources) + 2)))
    sums = [torch.zeros(width, dtype=torch.float64) for _ in sources]
    for first in range(0, count, step):
        numbers = [x[first : first + step] for x in table.numbers]
        known = torch.from_numpy(np.stack([x >= 0 for x in numbers]))
        rows = torch.zeros(len(sources), len(numbers[0]), width, dtype=torch.float64)
        for i, number in enumerate(numbers):
            if known[i].any():
                rows[i, known[i]] = torch.from_numpy(mapped_rows[i][number[number >= 0]]).view(types[i]).double()
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
    """(rows, bytes per row), memory-mapped."""
    tensor = model[name]
    path = model.path_of(name)
    shape = (tensor.shape[0], tensor.nbytes // tensor.shape[0])
    return np.memmap(path, dtype=np.uint8, mode="r", offset=tensor.offset, shape=shape)
