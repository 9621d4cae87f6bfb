"""Where in a model a tensor lies, by its name: in which layer, or before or after the layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from fastalign._base.errors import UserError

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_BEFORE = re.compile(r"emb(?!ed_out)|\bwte\b|\bwpe\b|rotary|relative_pe")
_AFTER = re.compile(r"embed_out|norm|\bln_|head|score|classifier|output|pooler|predictions|projector|transform")


class Layer(NamedTuple):
    """A tensor's place: `begin` + number + `end` is its name."""

    begin: str
    number: int
    end: str


def layer_of(name: str) -> Layer | None:
    """By the first whole number in the name; None where there is none."""
    found = _LAYER.search(name)
    return Layer(name[: found.start(1)], int(found.group(1)), name[found.end(1) :]) if found else None


def comes_before(name: str) -> bool:
    """Whether a tensor outside of layers comes before them, as embeddings do, or after them, as the final norm and the head.

    Raises UserError where the name does not tell.
    """
    if _BEFORE.search(name):
        return True
    if _AFTER.search(name):
        return False
    raise UserError(f"{name}: cannot tell whether it comes before the layers or after them")


def layer_counts(names: Iterable[str]) -> dict[str, int]:
    """Beginning of names -> how many layers begin so, where they are numbered 0, 1, 2 ..."""
    found: dict[str, set[int]] = {}
    for layer in filter(None, map(layer_of, names)):
        found.setdefault(layer.begin, set()).add(layer.number)
    return {begin: len(held) for begin, held in found.items() if held == set(range(len(held)))}
