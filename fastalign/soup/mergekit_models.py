"""The models of a mergekit configuration: whole ones, or of each output slice those layers that go into it."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastalign._base.errors import UserError
from fastalign.soup.mappings import entries, known, layer_range


@dataclass
class Run:
    """What is merged into some layers of the output: models, which of their layers (None for all), and for each the
    parameters that hold for it, the nearest first: its own, its slice's, the whole recipe's."""

    models: list[str]
    ranges: list[tuple[int, int] | None]
    scopes: list[list[Any]]

    @property
    def length(self) -> int:
        first, last = self.ranges[0] or (0, 0)
        return last - first

    def with_base(self, base: str) -> None:
        if base not in self.models:
            self.models.append(base)
            self.ranges.append(None)
            self.scopes.append([None, *self.scopes[0][1:]])

    def order_for_slerp(self, base: str | None) -> None:
        if len(self.models) != 2 or base not in self.models:
            raise UserError(f"slerp takes two models, one of them the base_model, got {len(self.models)} and {base}")
        if self.models[1] == base:
            for held in (self.models, self.ranges, self.scopes):
                held.reverse()


def runs_of(recipe: Mapping[str, Any]) -> list[Run]:
    """One for `models`, one for each of `slices`."""
    if ("models" in recipe) == ("slices" in recipe):
        raise UserError("the configuration must have either models or slices")
    outer = recipe.get("parameters")
    if "models" in recipe:
        return [_run(entries(recipe, "models"), [outer], sliced=False)]
    found = []
    for held in entries(recipe, "slices"):
        if not isinstance(held, Mapping):
            raise UserError(f"a slice must be a mapping with sources, got {reprlib.repr(held)}")
        known(held, {"sources", "parameters"}, "a slice")
        found.append(_run(entries(held, "sources"), [held.get("parameters"), outer], sliced=True))
    return found


def _run(sources: Sequence[Any], outer: list[Any], *, sliced: bool) -> Run:
    found = Run([], [], [])
    for i, source in enumerate(sources):
        if not isinstance(source, Mapping):
            raise UserError(f"model {i} must be a mapping with model, got {reprlib.repr(source)}")
        known(source, {"model", "parameters", *(["layer_range"] if sliced else [])}, f"model {i}")
        if "model" not in source:
            raise UserError(f"model {i} lacks model, the path")
        found.models.append(model_named(source["model"], f"model {i}"))
        found.ranges.append(
            layer_range(_whole(source.get("layer_range")), f"layer_range of model {i}") if sliced else None
        )
        found.scopes.append([source.get("parameters"), *outer])
    for scope in (held for one in found.scopes for held in one):
        if not isinstance(scope, Mapping | None):
            raise UserError(f"parameters must map names to values, got {reprlib.repr(scope)}")
    if len(set(found.models)) != len(found.models):
        raise UserError("a model may be there once only")
    if sliced and len({last - first for first, last in found.ranges}) > 1:
        raise UserError("layer_range must have as many layers for every model of a slice")
    return found


def _whole(value: Any) -> Any:
    """[0.0, 12.0] as [0, 12]."""
    if not isinstance(value, list):
        return value
    return [int(x) if isinstance(x, float) and x.is_integer() else x for x in value]


def stack_of(runs: Sequence[Run], places: Sequence[int]) -> str | list[tuple[str, int, int]]:
    """The model that is at each slice's place, put together; without layer ranges, the model itself."""
    held = [(run.models[i], run.ranges[i]) for run, i in zip(runs, places, strict=True)]
    return held[0][0] if held[0][1] is None else [(model, *layers) for model, layers in held]


def model_named(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{where} must be a path or a name, got {reprlib.repr(value)}")
    if ("+" in value or "@" in value) and not os.path.exists(os.path.expanduser(value)):
        raise UserError(f"{where}: adapters (+) and revisions (@) are not read here, got {value!r}")
    return value
