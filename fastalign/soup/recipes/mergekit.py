"""Translates mergekit's YAML to `merge`'s arguments, for the methods that both have, with the meaning of mergekit
0.1.5.

mergekit differs from the papers: DARE and DELLA rescale kept elements to preserve the sum of magnitudes, not by each
element's probability; TIES elects signs and divides with the models' weights, which the paper does not have;
breadcrumbs' share of small elements follows from density and gamma; Model Stock takes vectors shorter than 1e-3 as less
similar than they are; gradients over the layers, as for SLERP, restart at the final norm and the head. We differ from
mergekit in the random numbers, and in ties at TIES' and breadcrumbs' cut: we keep the earlier elements, mergekit those
that its sort leaves. Everything is computed in float32 and rounded once; mergekit first rounds the models to `dtype`
and computes in it, so in float16 its TIES ranks and elects differently for one element in a thousand.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastalign._base.errors import UserError
from fastalign.soup.methods import METHODS
from fastalign.soup.methods.settings import Runs, Setting, numbers
from fastalign.soup.recipes.fields import entries, known, layer_range, text

_KEYS = {
    "merge_method",
    "models",
    "slices",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
}
# mergekit's defaults; None: required. It rescales DARE and DELLA to preserve the sum of magnitudes, the papers by each
# element's probability.
_TASKS = {"lambda": 1.0, "normalize": False, "int8_mask": False, "rescale": False, "density": 1.0, "weight": None}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "passthrough": {"scale": 1.0},
    "linear": {"weight": None, "normalize": True},
    "slerp": {"t": None},
    "karcher": {"max_iter": 10, "tol": 1e-5},
    "model_stock": {"filter_wise": False},
    "nuslerp": {"weight": None, "nuslerp_row_wise": False, "nuslerp_flatten": True},
    "sce": {"select_topk": 1.0, "int8_mask": False},
    "nearswap": {"t": None},
    "arcee_fusion": {},
    "ram": {"epsilon": 1e-5},
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
_PARAMETERS = {name for defaults in _DEFAULTS.values() for name in defaults}
_MODEL_STOCK_FLOOR = 1e-6
_NUMBERED = re.compile(r"[.*]\d+[.*]")
_FLAGS = {name for defaults in _DEFAULTS.values() for name, default in defaults.items() if type(default) is bool}


def translate(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A mergekit configuration as `merge`'s arguments. Raises UserError for anything unknown or unsupported."""
    known(recipe, _KEYS, "the configuration")
    method = text(recipe, "merge_method", "the configuration")
    if method not in _DEFAULTS:
        raise UserError(
            f"merge_method must be one of {', '.join(_DEFAULTS)} to be read here, got {reprlib.repr(method)}"
        )
    base = None if recipe.get("base_model") is None else model_named(recipe["base_model"], "base_model")
    kind = METHODS["linear" if method == "passthrough" else method]
    runs = runs_of(recipe)
    if base is not None and "models" in recipe:  # mergekit adds it if it is not among the models
        runs[0].with_base(base)
    if method == "slerp":
        for run in runs:
            run.order_for_slerp(base)
    parameters_of = [
        _Parameters(method, run, renumbered=len(runs) > 1 or any(at and at[0] for at in run.ranges)) for run in runs
    ]
    merged = [[i for i, one in enumerate(run.models) if not (kind.base != "no" and one == base)] for run in runs]
    if len({len(one) for one in merged}) > 1 or (kind.base != "no" and len({base in run.models for run in runs}) > 1):
        raise UserError(
            "all slices must have as many sources as the first one, and the base_model where one of them has it"
        )

    def together(of: Callable[[_Parameters, Sequence[int]], Setting]) -> Setting:
        """A setting of all slices."""
        parts = [of(one, places) for one, places in zip(parameters_of, merged, strict=True)]
        return parts[0] if len(runs) == 1 else Runs([run.length for run in runs], parts)

    def shared(name: str) -> Setting:
        return together(lambda one, _: one.shared(name))

    def each(name: str) -> list[Setting]:
        def at(i: int) -> Setting:
            return together(lambda one, places: one.of_model(name, places[i]))

        return [at(i) for i in range(len(merged[0]))]

    def same(name: str, of: Callable[[_Parameters, str], Any]) -> Any:
        values = {of(one, name) for one in parameters_of}
        if len(values) > 1:
            raise UserError(f"{name} must be the same in all slices to be read here")
        return values.pop()

    arguments: dict[str, Any] = {"method": method, "weights": None}
    arguments["models"] = [stack_of(runs, [places[i] for places in merged]) for i in range(len(merged[0]))]
    if kind.base != "no" and base in runs[0].models:
        arguments["base"] = stack_of(runs, [run.models.index(base) for run in runs])
    if method == "slerp":
        t = shared("t")
        arguments["weights"] = [t.mapped(lambda x: 1 - x), t]
    elif method == "passthrough":
        arguments |= {"method": "linear", "normalize": False, "weights": each("scale")}
        if len(arguments["models"]) != 1:
            raise UserError(f"passthrough takes one model, in each slice, got {len(arguments['models'])}")
    elif "weight" in _DEFAULTS[method]:
        arguments["weights"] = each("weight")
    parameters: dict[str, Any] = {}
    for name, wanted in kind.parameters.items():
        if getattr(wanted, "each", False):
            parameters[name] = each(name)
        elif name == "rescale":
            parameters[name] = "l1" if same(name, _Parameters.flag) else "none"
        elif name in _FLAGS:
            parameters[name] = same(name, _Parameters.flag)
        elif name in _DEFAULTS[method]:
            parameters[name] = same(name, _Parameters.whole) if name == "max_iter" else shared(name)
    if method == "linear":
        arguments["normalize"] = same("normalize", _Parameters.flag)
    if method == "model_stock":
        parameters["floor"] = _MODEL_STOCK_FLOOR
    arguments["parameters"] = parameters
    dtype = recipe.get("out_dtype") or recipe.get("dtype")
    if dtype is not None:
        arguments["dtype"] = text({"dtype": dtype}, "dtype", "the configuration").removeprefix("torch.")
    if "base" in arguments:
        arguments["sidecar_from"] = "base"
    elif base is not None and any(base in run.models for run in runs):
        arguments["sidecar_from"] = base
    tokenizer = _tokenizer(recipe)
    if "tokenizer" in tokenizer and base is not None and not any(base in run.models for run in runs):
        raise UserError("with a tokenizer, the base_model must be one of the models")
    return arguments | tokenizer


# ---- tokenizer ----


def _tokenizer(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer's source, and the padding of its rows; entries in `tokens` are not supported."""
    arguments: dict[str, Any] = {}
    tokenizer = recipe.get("tokenizer")
    if tokenizer is not None:
        if not isinstance(tokenizer, Mapping):
            raise UserError(f"tokenizer must be a mapping with source, got {reprlib.repr(tokenizer)}")
        if recipe.get("tokenizer_source") is not None:
            raise UserError("the configuration must have either tokenizer or tokenizer_source")
        known(tokenizer, {"source", "pad_to_multiple_of"}, "tokenizer")
        multiple = tokenizer.get("pad_to_multiple_of") or None
        if isinstance(multiple, float) and multiple.is_integer():
            multiple = int(multiple)
        if multiple is not None:
            arguments["pad_to_multiple_of"] = multiple
    source = recipe.get("tokenizer_source") if tokenizer is None else tokenizer.get("source", "union")
    if source is not None:
        if not isinstance(source, str) or not source:
            raise UserError(f"tokenizer_source must be base, union or a model, got {reprlib.repr(source)}")
        arguments["tokenizer"] = {"base": "sidecar", "union": "union"}.get(source) or model_named(
            source, "tokenizer_source"
        )
    if recipe.get("chat_template") is not None:
        arguments["chat_template"] = text(recipe, "chat_template", "the configuration")
    return arguments


# ---- parameters ----


class _Parameters:
    """Each parameter as in mergekit: the model's own, else the slice's, the recipe's or the default."""

    def __init__(self, method: str, run: Run, *, renumbered: bool):
        self.method, self.models, self.scopes = method, run.models, run.scopes
        self.renumbered = renumbered  # a layer has another number in the output than in its model
        defaults = _DEFAULTS[method]
        for scope in (scope_of_model for one in run.scopes for scope_of_model in one if scope_of_model):
            unknown = [name for name in scope if name not in _PARAMETERS]  # another method's is ignored, as in mergekit
            if unknown:
                raise UserError(
                    f"{reprlib.repr(unknown[0])} is no parameter of {method}, which takes {', '.join(defaults)}"
                )

    def of_model(self, name: str, i: int) -> Setting:
        label = f"{name} of {self.models[i]}"
        setting = self._setting(name, self.scopes[i], label)
        numbered = next((pattern for pattern, _ in setting.rules if _NUMBERED.search(pattern)), None)
        if self.renumbered and numbered:  # mergekit matches it against the source's names
            raise UserError(
                f"{label}: filters with a layer's number are not read here in slices, got {numbered.strip('*')!r}"
            )
        return setting

    def shared(self, name: str) -> Setting:
        return self._setting(name, self.scopes[0][-2:], name)

    def flag(self, name: str) -> bool:
        return bool(self._number(name, "must be true or false, or a number,"))

    def whole(self, name: str) -> int:
        number = self._number(name, "must be a whole number")
        if number != int(number):
            raise UserError(f"{name} must be a whole number, got {number}")
        return int(number)

    def _number(self, name: str, rule: str) -> float:
        """A flag or count: all of mergekit's parameters are numbers, so its files have 1.0 for true and 5.0 for 5."""
        value = self._plain(name)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{name} {rule} for all tensors to be read here, got {reprlib.repr(value)}")
        return number

    def _plain(self, name: str) -> Any:
        values = [scope[name] for scope in self.scopes[0][-2:] if scope and name in scope]
        return values[0] if values else _DEFAULTS[self.method].get(name)

    def _setting(self, name: str, scopes: Sequence[Any], label: str) -> Setting:
        rules = [rule for scope in scopes if scope and name in scope for rule in _rules(label, scope[name])]
        default = _DEFAULTS[self.method][name]
        if default is not None:
            rules.append(("*", (float(default),)))
        if not rules:
            raise UserError(f"{label} is missing, and {self.method} needs it")
        return Setting(rules)


def _rules(label: str, value: Any) -> list[tuple[str, tuple[float, ...]]]:
    """A number, numbers over the layers, or a list of {filter, value}: the first entry whose filter is in the name
    counts."""
    conditions = [value] if isinstance(value, Mapping) else value
    if not (isinstance(conditions, list) and any(isinstance(one, Mapping) for one in conditions)):
        return [("*", _numbers(label, value))] if value != [] else []
    rules = []
    for one in conditions:
        if not isinstance(one, Mapping) or "value" not in one:
            raise UserError(f"{label}: each entry must have value, and may have filter, got {reprlib.repr(one)}")
        known(one, {"value", "filter"}, f"{label}: an entry")
        part = one.get("filter")
        if part is not None and not isinstance(part, str):
            raise UserError(f"{label}: filter must be text, got {reprlib.repr(part)}")
        if one["value"] != []:
            rules.append((_contains(part), _numbers(label, one["value"])))
    return rules


def _numbers(label: str, value: Any) -> tuple[float, ...]:
    """A number; true is 1 and false 0."""
    plain = [float(x) if type(x) is bool else x for x in (value if isinstance(value, list) else [value])]
    return numbers(label, plain)


def _contains(part: str | None) -> str:
    """The pattern of names that contain `part`."""
    if part is None or part == "*":
        return "*"
    return "*" + "".join(f"[{c}]" if c in "*?[" else c for c in part) + "*"


# ---- models ----


@dataclass
class Run:
    """The inputs of some of the output's layers: models, their layers (None for all), and for each its parameters in
    order of precedence: its own, its slice's, the whole recipe's."""

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
            for column in (self.models, self.ranges, self.scopes):
                column.reverse()


def runs_of(recipe: Mapping[str, Any]) -> list[Run]:
    """One for `models`, one for each of `slices`."""
    if ("models" in recipe) == ("slices" in recipe):
        raise UserError("the configuration must have either models or slices")
    outer = recipe.get("parameters")
    if "models" in recipe:
        return [_run(entries(recipe, "models"), [outer], sliced=False)]
    runs = []
    for one in entries(recipe, "slices"):
        if not isinstance(one, Mapping):
            raise UserError(f"a slice must be a mapping with sources, got {reprlib.repr(one)}")
        known(one, {"sources", "parameters"}, "a slice")
        runs.append(_run(entries(one, "sources"), [one.get("parameters"), outer], sliced=True))
    return runs


def _run(sources: Sequence[Any], outer: list[Any], *, sliced: bool) -> Run:
    run = Run([], [], [])
    for i, source in enumerate(sources):
        if not isinstance(source, Mapping):
            raise UserError(f"model {i} must be a mapping with model, got {reprlib.repr(source)}")
        known(source, {"model", "parameters", *(["layer_range"] if sliced else [])}, f"model {i}")
        if "model" not in source:
            raise UserError(f"model {i} lacks model, the path")
        run.models.append(model_named(source["model"], f"model {i}"))
        run.ranges.append(
            layer_range(_whole(source.get("layer_range")), f"layer_range of model {i}") if sliced else None
        )
        run.scopes.append([source.get("parameters"), *outer])
    for scope in (one_scope for one in run.scopes for one_scope in one):
        if not isinstance(scope, Mapping | None):
            raise UserError(f"parameters must map names to values, got {reprlib.repr(scope)}")
    if len(set(run.models)) != len(run.models):
        raise UserError("a model may occur only once")
    if len({last - first for first, last in filter(None, run.ranges)}) > 1:
        raise UserError("layer_range must have as many layers for every model of a slice")
    return run


def _whole(value: Any) -> Any:
    """[0.0, 12.0] as [0, 12]."""
    if not isinstance(value, list):
        return value
    return [int(x) if isinstance(x, float) and x.is_integer() else x for x in value]


def stack_of(runs: Sequence[Run], places: Sequence[int]) -> str | list[tuple[str, int, int]]:
    """The stack of one position's models over all slices; without layer ranges, the model itself."""
    pieces = [(run.models[i], run.ranges[i]) for run, i in zip(runs, places, strict=True)]
    return pieces[0][0] if pieces[0][1] is None else [(model, *layers) for model, layers in pieces if layers]


def model_named(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{where} must be a path or a name, got {reprlib.repr(value)}")
    if ("+" in value or "@" in value) and not os.path.exists(os.path.expanduser(value)):
        raise UserError(f"{where}: adapters (+) and revisions (@) are not read here, got {value!r}")
    return value
