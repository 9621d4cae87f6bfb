"""Recipes: a merge in YAML, in fastalign's own format or in mergekit's for the methods that both have."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastalign._base.errors import UserError
from fastalign._base.files import check_input
from fastalign.soup.recipes.fields import entries, known, layer_range, text
from fastalign.soup.recipes.mergekit import translate

_MOST = 1_000_000  # bytes of a recipe
_KEYS = {
    "method", "models", "base", "weights", "grid", "parameters", "dtype", "normalize", "sidecar_from", "tokenizer",
    "pad_to_multiple_of", "chat_template", "max_shard_size", "memory_limit", "force",
}  # fmt: skip
_EACH = ("density", "epsilon", "gamma")


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A recipe as `merge`'s arguments, all but `out`: `merge(**read_recipe("soup.yaml"), out="soup")`.

    fastalign's own format has merge's arguments by name, with models as a list of paths, or of mappings with `model`
    and its `weight`, `density`, `epsilon` or `gamma`; `grid: 11` means weights on a grid. A file with `merge_method` is
    in mergekit's format, with the same meaning as there. Raises FileNotFoundError or UserError with one line that names
    the file and the mistake.
    """
    path = Path(path)
    check_input(path)
    try:
        recipe = _load(path)
        if not isinstance(recipe, Mapping):
            raise UserError(f"must be a mapping of names to values, got {type(recipe).__name__}")
        return translate(recipe) if "merge_method" in recipe else _own(recipe)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _load(path: Path) -> Any:
    import yaml

    if path.stat().st_size > _MOST:
        raise UserError(f"a recipe has at most {_MOST:,} bytes, this file has {path.stat().st_size:,}")
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise UserError(f"not YAML ({' '.join(str(error).split())[:120]})") from None
    if len(documents) > 1:
        raise UserError(f"contains {len(documents)} recipes: put each in its own file, in the order of merging")
    return documents[0] if documents else None


def _today(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe with today's names for those of earlier versions."""
    if recipe.get("tokenizer") == "companion":
        recipe = {**recipe, "tokenizer": "sidecar"}
    if "companion" in recipe and "sidecar_from" not in recipe:
        recipe = {("sidecar_from" if name == "companion" else name): value for name, value in recipe.items()}
    return recipe


def _own(recipe: Mapping[str, Any]) -> dict[str, Any]:
    recipe = _today(recipe)
    known(recipe, _KEYS, "a recipe")
    for key in ("method", "dtype", "sidecar_from", "tokenizer", "chat_template"):
        if recipe.get(key) is not None:
            text(recipe, key, "a recipe")
    for key in ("normalize", "force"):
        if not isinstance(recipe.get(key), bool | None):
            raise UserError(f"{key} must be true or false, got {reprlib.repr(recipe[key])}")
    models = entries(recipe, "models")
    paths, own = [], []
    for i, entry in enumerate(models):
        model = entry if isinstance(entry, Mapping) else {"model": entry}
        known(model, {"model", "weight", *_EACH}, f"model {i}")
        paths.append(_model(model, "model", f"model {i}"))
        own.append({key: value for key, value in model.items() if key != "model"})
    arguments: dict[str, Any] = {key: value for key, value in recipe.items() if key not in ("grid", "models")}
    arguments["models"] = paths
    if recipe.get("base") is not None:
        arguments["base"] = _model(recipe, "base", "a recipe")
    parameters = recipe.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise UserError(f"parameters must map names to values, got {reprlib.repr(parameters)}")
    arguments["parameters"] = {
        **parameters,
        **{key: _each(own, key) for key in _EACH if any(key in one for one in own)},
    }
    weights = _each(own, "weight") if any("weight" in one for one in own) else None
    given = [weights is not None, "weights" in recipe, "grid" in recipe]
    if sum(given) > 1:
        raise UserError("weights must be given once: each model's weight, or weights, or grid")
    if given[2]:
        from fastalign.soup.methods.settings import simplex_grid

        weights = simplex_grid(len(paths), recipe["grid"])
    arguments["weights"] = recipe.get("weights") if weights is None else weights
    return arguments


def _model(mapping: Mapping[str, Any], key: str, where: str) -> str | list[tuple[str, int, int]]:
    """A path, or a stack: a list of {model: path, layers: [first, last]}."""
    if not isinstance(mapping.get(key), list):
        return text(mapping, key, where)
    pieces = []
    for piece in entries(mapping, key):
        if not isinstance(piece, Mapping):
            raise UserError(
                f"{where}: a piece of a stack must be {{model: path, layers: [first, last]}}, got {reprlib.repr(piece)}"
            )
        known(piece, {"model", "layers"}, f"{where}: a piece of a stack")
        pieces.append((text(piece, "model", where), *layer_range(piece.get("layers"), f"{where}: layers")))
    return pieces


def _each(models: list[dict[str, Any]], key: str) -> list[Any]:
    """Each model's value; numbers over the layers as in `merge`."""
    lacking = next((i for i, one in enumerate(models) if key not in one), None)
    if lacking is not None:
        raise UserError(f"model {lacking} has no {key}, others have one")
    return [{"*": one[key]} if isinstance(one[key], list) else one[key] for one in models]
