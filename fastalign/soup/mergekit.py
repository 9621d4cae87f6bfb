"""mergekit's YAML as `merge`'s arguments, for the methods that both have, meaning what mergekit 0.1.5 makes of it.

Where that is not what the papers say: what DARE and DELLA keep is scaled so that the sum of sizes is as it was, not by each
element's probability; TIES elects signs and divides with the models' weights, which the paper does not have; breadcrumbs'
share of small elements follows from density and gamma; Model Stock takes vectors shorter than 1e-3 for less alike than they
are; SLERP's and other lines over the layers begin again at the final norm and the head. Random numbers are our own, and of
elements of equal size at TIES' and breadcrumbs' cut we keep the earlier, mergekit whichever its sort leaves there.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastalign.errors import UserError
from fastalign.soup.mappings import entries, known, text
from fastalign.soup.parameters import METHODS
from fastalign.soup.settings import Setting, numbers

_KEYS = {
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
}  # fmt: skip
_SPARSE = {"ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties"}
# What mergekit takes where a parameter is left out; None: it must be there. DARE and DELLA are rescaled there so that the
# sum of sizes is as it was, in the papers by each element's probability.
_TASKS = {"lambda": 1.0, "normalize": False, "int8_mask": False, "rescale": False, "density": 1.0, "weight": None}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "linear": {"weight": None, "normalize": True},
    "slerp": {"t": None},
    "karcher": {"max_iter": 10, "tol": 1e-5},
    "model_stock": {"filter_wise": False},
    "multislerp": {"weight": None, "normalize_weights": True, "eps": 1e-8},
    "task_arithmetic": _TASKS,
    "ties": {**_TASKS, "normalize": True},
    "dare_linear": {**_TASKS, "rescale": True},
    "dare_ties": {**_TASKS, "rescale": True},
    "della": {**_TASKS, "normalize": True, "rescale": True, "epsilon": 0.15},
    "della_linear": {**_TASKS, "rescale": True, "epsilon": 0.15},
    "breadcrumbs": {**_TASKS, "gamma": 0.01},
    "breadcrumbs_ties": {**_TASKS, "gamma": 0.01},
}
_MODEL_STOCK_FLOOR = 1e-6
_EACH = ("weight", "density", "epsilon", "gamma")  # that differ from model to model
_FLAGS = ("normalize", "normalize_weights", "rescale", "int8_mask", "filter_wise")


def translate(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A mergekit configuration as `merge`'s arguments. Raises UserError: what it asks for is not understood, or not done here."""
    known(recipe, _KEYS, "the configuration")
    method = text(recipe, "merge_method", "the configuration")
    if method not in _DEFAULTS:
        raise UserError(
            f"merge_method must be one of {', '.join(_DEFAULTS)} to be read here, got {reprlib.repr(method)}"
        )
    base = None if recipe.get("base_model") is None else _model(recipe["base_model"], "base_model")
    models, scopes = _models(recipe)
    if base is not None and base not in models:  # as mergekit does
        models, scopes = [*models, base], [*scopes, scopes[0][1:]]
    asked = _Parameters(method, base, models, scopes)
    takes_base = METHODS[method].base != "no"
    merged = [i for i, model in enumerate(models) if not (takes_base and model == base)]
    found: dict[str, Any] = {"method": method, "models": [models[i] for i in merged], "weights": None}
    if takes_base and base is not None:
        found["base"] = base
    if method == "slerp":
        if len(models) != 2 or base is None:
            raise UserError(f"slerp takes two models, one of them the base_model, got {len(models)} and {base}")
        t = asked.shared("t")
        found["models"] = [base, next(model for model in models if model != base)]
        found["weights"] = [_mapped(t, lambda x: 1 - x), t]
    elif "weight" in _DEFAULTS[method]:
        found["weights"] = [asked.of_model("weight", i) for i in merged]
    parameters: dict[str, Any] = {}
    for name in METHODS[method].parameters:
        if name in _EACH:
            parameters[name] = [asked.of_model(name, i) for i in merged]
        elif name == "rescale":
            parameters[name] = "l1" if asked.flag("rescale") else "none"
        elif name in _FLAGS:
            parameters[name] = asked.flag(name)
        elif name in _DEFAULTS[method]:
            parameters[name] = asked.whole(name) if name == "max_iter" else asked.shared(name)
    if method == "linear":
        found["normalize"] = asked.flag("normalize")
    if method == "model_stock":
        if asked.flag("filter_wise"):
            raise UserError("filter_wise: true is not done here; Model Stock is made tensor by tensor")
        parameters["floor"] = _MODEL_STOCK_FLOOR
    found["parameters"] = parameters
    dtype = recipe.get("out_dtype") or recipe.get("dtype")
    if dtype is not None:
        found["dtype"] = text({"dtype": dtype}, "dtype", "the configuration").removeprefix("torch.")
    _tokenizer(recipe)
    if "base" in found:
        found["companion"] = "base"
    return found


# ---- models ----


def _models(recipe: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Paths, and for each the parameters that hold for it, the nearest first: its own, its slice's, the whole recipe's."""
    if ("models" in recipe) == ("slices" in recipe):
        raise UserError("the configuration must have either models or slices")
    outer = recipe.get("parameters")
    slices, inner = None, None
    if "slices" in recipe:
        slices = entries(recipe, "slices")
        if len(slices) != 1:
            raise UserError(f"slices must be one slice over all layers to be read here, got {len(slices)} slices")
        whole = slices[0]
        if not isinstance(whole, Mapping):
            raise UserError(f"a slice must be a mapping with sources, got {reprlib.repr(whole)}")
        known(whole, {"sources", "parameters"}, "a slice")
        inner = whole.get("parameters")
        sources = entries(whole, "sources")
    else:
        sources = entries(recipe, "models")
    paths, scopes, ranges = [], [], set()
    for i, source in enumerate(sources):
        if not isinstance(source, Mapping):
            raise UserError(f"model {i} must be a mapping with model, got {reprlib.repr(source)}")
        known(source, {"model", "parameters", *(["layer_range"] if slices else [])}, f"model {i}")
        if "model" not in source:
            raise UserError(f"model {i} lacks model, the path")
        paths.append(_model(source["model"], f"model {i}"))
        scopes.append([source.get("parameters"), inner, outer])
        if slices:
            ranges.add(_range(source.get("layer_range"), i))
    for scope in (held for one in scopes for held in one):
        if not isinstance(scope, Mapping | None):
            raise UserError(f"parameters must map names to values, got {reprlib.repr(scope)}")
    if len(set(paths)) != len(paths):
        raise UserError("a model may be there once only")
    if len(ranges) > 1 or any(first for first, _ in ranges):
        raise UserError("layer_range must be that of all layers, and the same for every model, to be read here")
    return paths, scopes


def _range(value: Any, i: int) -> tuple[int, int]:
    if not (isinstance(value, list) and len(value) == 2 and all(type(x) is int for x in value) and value[0] < value[1]):
        raise UserError(f"layer_range of model {i} must be two whole numbers, got {reprlib.repr(value)}")
    return value[0], value[1]


def _model(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{where} must be a path or a name, got {reprlib.repr(value)}")
    if ("+" in value or "@" in value) and not os.path.exists(os.path.expanduser(value)):
        raise UserError(f"{where}: adapters (+) and revisions (@) are not read here, got {value!r}")
    return value


def _tokenizer(recipe: Mapping[str, Any]) -> None:
    """All vocabularies must be equal here, so that every source gives the same one; anything more is refused."""
    held = recipe.get("tokenizer")
    if held is not None:
        if not isinstance(held, Mapping):
            raise UserError(f"tokenizer must be a mapping with source, got {reprlib.repr(held)}")
        known(held, {"source"}, "tokenizer")
    source = recipe.get("tokenizer_source") if held is None else held.get("source")
    if source is not None and not isinstance(source, str):
        raise UserError(f"tokenizer_source must be base, union or a model, got {reprlib.repr(source)}")


# ---- parameters ----


class _Parameters:
    """Each parameter as mergekit finds it: in a model's own, then the slice's, then the recipe's, then the default."""

    def __init__(self, method: str, base: str | None, models: Sequence[str], scopes: Sequence[Sequence[Any]]):
        self.method, self.models, self.scopes = method, models, scopes
        defaults = _DEFAULTS[method]
        for scope in (held for one in scopes for held in one if held):
            unknown = [name for name in scope if name not in defaults]
            if unknown:
                raise UserError(
                    f"{reprlib.repr(unknown[0])} is no parameter of {method}, which takes {', '.join(defaults)}"
                )

    def of_model(self, name: str, i: int) -> Setting:
        return self._setting(name, self.scopes[i], f"{name} of {self.models[i]}")

    def shared(self, name: str) -> Setting:
        return self._setting(name, self.scopes[0][-2:], name)

    def flag(self, name: str) -> bool:
        found = self._plain(name)
        if type(found) is not bool:
            raise UserError(f"{name} must be true or false for all tensors to be read here, got {reprlib.repr(found)}")
        return found

    def whole(self, name: str) -> int:
        found = self._plain(name)
        if type(found) is not int:
            raise UserError(f"{name} must be a whole number, got {reprlib.repr(found)}")
        return found

    def _plain(self, name: str) -> Any:
        held = [scope[name] for scope in self.scopes[0][-2:] if scope and name in scope]
        return held[0] if held else _DEFAULTS[self.method].get(name)

    def _setting(self, name: str, scopes: Sequence[Any], told: str) -> Setting:
        rules = [rule for scope in scopes if scope and name in scope for rule in _rules(told, scope[name])]
        default = _DEFAULTS[self.method][name]
        if default is not None:
            rules.append(("*", (float(default),)))
        if not rules:
            raise UserError(f"{told} is missing, and {self.method} needs it")
        return Setting(rules)


def _rules(told: str, value: Any) -> list[tuple[str, tuple[float, ...]]]:
    """A number, numbers over the layers, or a list of {filter, value}: the first whose filter is part of the name counts."""
    conditions = [value] if isinstance(value, Mapping) else value
    if not (isinstance(conditions, list) and any(isinstance(one, Mapping) for one in conditions)):
        return [("*", numbers(told, value))] if value != [] else []
    found = []
    for one in conditions:
        if not isinstance(one, Mapping) or "value" not in one:
            raise UserError(f"{told}: each entry must have value, and may have filter, got {reprlib.repr(one)}")
        known(one, {"value", "filter"}, f"{told}: an entry")
        part = one.get("filter")
        if part is not None and not isinstance(part, str):
            raise UserError(f"{told}: filter must be text, got {reprlib.repr(part)}")
        if one["value"] != []:
            found.append((_contains(part), numbers(told, one["value"])))
    return found


def _contains(part: str | None) -> str:
    """The pattern of names that have `part` in them."""
    if part is None or part == "*":
        return "*"
    return "*" + "".join(f"[{c}]" if c in "*?[" else c for c in part) + "*"


def _mapped(setting: Setting, of) -> Setting:
    return Setting((pattern, tuple(of(x) for x in values)) for pattern, values in setting.rules)
