"""Stacks: models composed of runs of other models' layers, as if they were in one file; no weights are read for
that."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from fastalign._base.errors import UserError
from fastalign.soup.architecture import LAYER_COUNTS, config_of
from fastalign.soup.checkpoint import Checkpoint, File, Piece, Tensor, open_checkpoint

# ---- where a tensor lies ----


_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_BEFORE = re.compile(r"emb(?!ed_out)|\bwte\b|\bwpe\b|rotary|relative_pe")
_AFTER = re.compile(r"embed_out|norm|\bln_|head|score|classifier|output|pooler|predictions|projector|transform")


class Layer(NamedTuple):
    """A tensor's place: `begin` + number + `end` is its name."""

    begin: str
    number: int
    end: str


def layer_of(name: str) -> Layer | None:
    """The layer, from the first integer in the name; None if there is none."""
    match = _LAYER.search(name)
    return Layer(name[: match.start(1)], int(match.group(1)), name[match.end(1) :]) if match else None


def comes_before(name: str) -> bool:
    """Whether a tensor outside of layers comes before them, as embeddings do, or after them, as the final norm and
    the head.

    Raises UserError if the name does not tell.
    """
    if _BEFORE.search(name):
        return True
    if _AFTER.search(name):
        return False
    raise UserError(f"{name}: cannot tell whether it comes before the layers or after them")


def layer_counts(names: Iterable[str]) -> dict[str, int]:
    """Prefix of names -> number of layers with it, if they are numbered 0, 1, 2 ..."""
    numbers: dict[str, set[int]] = {}
    for layer in filter(None, map(layer_of, names)):
        numbers.setdefault(layer.begin, set()).add(layer.number)
    return {begin: len(layers) for begin, layers in numbers.items() if layers == set(range(len(layers)))}


# ---- stacks ----


Model = str | os.PathLike[str] | Sequence[tuple[str | os.PathLike[str], int, int]]


def open_model(model: Model) -> Checkpoint:
    """A checkpoint, or a stack: (model, first, last) pieces, layers first ... last - 1 of each, from the bottom up.

    The stack's layers are renumbered. Tensors before the layers come from the first piece's model, those after them
    from the last one's. Raises like open_checkpoint, and UserError if a model has no such layers.
    """
    if not isinstance(model, list | tuple):
        return open_checkpoint(cast("str | os.PathLike[str]", model))
    if not model or not all(isinstance(piece, list | tuple) and len(piece) == 3 for piece in model):
        raise UserError(f"a stack must be a list of (model, first layer, last layer + 1), got {model!r:.80}")
    opened = {os.fspath(name): open_checkpoint(name) for name, _, _ in model}
    pieces = []
    for name, first, last in model:
        one = opened[os.fspath(name)]
        begin, count = _layers(one)
        if not (type(first) is int and type(last) is int and 0 <= first < last <= count):
            raise UserError(f"{one.name}: layers {first} to {last} requested, but it has 0 to {count}")
        pieces.append((Piece(one, first, last), begin, count))
    (lowest, begin, count), *others = pieces
    if not others and (lowest.first, lowest.last) == (0, count):
        return lowest.model
    for piece, other, _ in others:
        if other != begin:
            raise UserError(
                f"layers must have the same prefix, {begin}* in {lowest.model.name}, {other}* in {piece.model.name}"
            )
    return _stacked(tuple(piece for piece, _, _ in pieces), begin)


def _layers(model: Checkpoint) -> tuple[str, int]:
    """The prefix of its layers' names, and the number of layers."""
    counts, stated = layer_counts(model), _stated_count(config_of(model))
    fitting = {begin: count for begin, count in counts.items() if stated is None or count == stated}
    if len(fitting) != 1:
        came = ", ".join(f"{count} named {begin}*" for begin, count in counts.items()) or "none"
        said = f"its configuration says {stated}, " if stated is not None else ""
        raise UserError(f"{model.name}: cannot tell which are its layers: {said}its tensors have {came}")
    return next(iter(fitting.items()))


def _stated_count(config: Mapping[str, Any]) -> int | None:
    """The number of layers in a configuration."""
    return next((config[key] for key in LAYER_COUNTS if key in config), None)


def _stacked(pieces: tuple[Piece, ...], begin: str) -> Checkpoint:
    files_taken: dict[Path, tuple[File, dict[str, Tensor]]] = {}

    def take(piece: Piece, name: str, called: str) -> None:
        file = piece.model.files[piece.model.where[name]]
        files_taken.setdefault(file.path, (file, {}))[1][called] = piece.model[name]

    alike = pieces[0].model is pieces[-1].model

    def outside(piece: Piece, *, before: bool) -> None:
        for name in piece.model:
            layer = layer_of(name)
            if layer is None and (before if alike else comes_before(name) is before):
                take(piece, name, name)
            elif layer is not None and layer.begin != begin:
                raise UserError(f"{piece.model.name}: {name} lies in no layer {begin}*, stacks have one kind of layers")

    outside(pieces[0], before=True)
    count = 0
    for piece in pieces:
        for name in piece.model:
            layer = layer_of(name)
            if layer is not None and piece.first <= layer.number < piece.last:
                take(piece, name, f"{begin}{count + layer.number - piece.first}{layer.end}")
        count += piece.last - piece.first
    outside(pieces[-1], before=False)
    files = tuple(replace(file, tensors=tensors) for file, tensors in files_taken.values())
    where = {name: number for number, file in enumerate(files) for name in file.tensors}
    name_of_stack = " + ".join(f"{piece.model.name}[{piece.first}:{piece.last}]" for piece in pieces)
    return Checkpoint(name_of_stack, pieces[0].model.folder, files, where, pieces)


def config_changes(model: Checkpoint) -> Mapping[str, Any]:
    """The entries in which a stack's config.json differs from its first piece's: the number of layers, and lists with
    one entry per layer."""
    if not model.pieces:
        return {}
    configs = [config_of(piece.model) for piece in model.pieces]
    changes: dict[str, Any] = {}
    for key, value in configs[0].items():
        if key in LAYER_COUNTS:
            changes[key] = sum(piece.last - piece.first for piece in model.pieces)
        elif "layer" in key and isinstance(value, list):
            lists: list[Any] = [config.get(key) for config in configs]
            if all(isinstance(x, list) and len(x) == _stated_count(one) for x, one in zip(lists, configs, strict=True)):
                changes[key] = [
                    x
                    for entries, piece in zip(lists, model.pieces, strict=True)
                    for x in entries[piece.first : piece.last]
                ]
    return changes
