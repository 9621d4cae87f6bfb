"""What each method takes: how many models, a base or none, and its parameters with their bounds."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastalign._base.errors import UserError
from fastalign.soup.methods.settings import Setting, parse

MAX_INPUTS = 128  # of the kernel
RESCALES = ("expected", "l1", "none")


@dataclass(frozen=True)
class Number:
    """A number that may differ from tensor to tensor, and where `each` is set from model to model."""

    default: float | None = None  # None: must be given
    least: float = -math.inf
    most: float = math.inf
    each: bool = False

    def read(self, name: str, value: Any, m: int) -> Any:
        def one(argument: str, held: Any) -> Setting:
            return parse(argument, held, least=self.least, most=self.most)

        if not self.each:
            return one(name, value)
        if not isinstance(value, list | tuple):
            return [one(name, value)] * m
        if len(value) != m:
            raise UserError(f"{name} must be one for all or one for each of {m} models, got {len(value)}")
        return [one(f"{name} of model {i}", held) for i, held in enumerate(value)]


@dataclass(frozen=True)
class Whole:
    """A whole number."""

    default: int
    least: int = 0
    most: int = 2**63 - 1

    def read(self, name: str, value: Any, m: int) -> int:
        if not (type(value) is int and self.least <= value <= self.most):
            raise UserError(
                f"{name} must be a whole number within [{self.least}, {self.most}], got {reprlib.repr(value)}"
            )
        return value


@dataclass(frozen=True)
class Flag:
    default: bool

    def read(self, name: str, value: Any, m: int) -> bool:
        if type(value) is not bool:
            raise UserError(f"{name} must be true or false, got {reprlib.repr(value)}")
        return value


@dataclass(frozen=True)
class Rescale:
    """expected: divided by the probability of staying; l1: so that the sum of sizes is as it was; none."""

    default: str

    def read(self, name: str, value: Any, m: int) -> str:
        if value not in RESCALES:
            raise UserError(f"{name} must be one of {', '.join(RESCALES)}, got {reprlib.repr(value)}")
        return value


@dataclass(frozen=True)
class Method:
    """base: "no", "yes" or "may". weights: "rows" where they must be given, "equal" where they may be left out, "none"."""

    base: str = "no"
    least: int = 1
    most: int = MAX_INPUTS
    weights: str = "rows"
    parameters: Mapping[str, Number | Whole | Flag | Rescale] = field(default_factory=dict)


def _tasks(*, density: float | None = None, normalize: bool = False, rescale: str = "none", **more) -> Method:
    return Method(
        base="yes",
        parameters={
            "density": Number(density, 0, 1, each=True),
            "lambda": Number(1.0),
            "normalize": Flag(normalize),
            "rescale": Rescale(rescale),
            **more,
        },
    )


_SEED = {"seed": Whole(0)}
_EPSILON = {"epsilon": Number(0.15, 0, 1, each=True)}
_GAMMA = {"gamma": Number(0.01, 0, 1, each=True)}

METHODS: dict[str, Method] = {
    "linear": Method(weights="equal"),
    "task_arithmetic": Method(base="yes", parameters={"lambda": Number(1.0), "normalize": Flag(False)}),
    "slerp": Method(least=2, most=2),
    "ties": _tasks(density=0.2, normalize=True),
    "dare_linear": _tasks(rescale="expected", **_SEED),
    "dare_ties": _tasks(rescale="expected", **_SEED),
    "della": _tasks(normalize=True, rescale="expected", **_EPSILON, **_SEED),
    "della_linear": _tasks(rescale="expected", **_EPSILON, **_SEED),
    "breadcrumbs": _tasks(density=0.9, **_GAMMA),
    "breadcrumbs_ties": _tasks(density=0.9, **_GAMMA),
    "multislerp": Method(
        base="may", weights="equal", parameters={"normalize_weights": Flag(True), "eps": Number(1e-8, 0, 1)}
    ),
    "nuslerp": Method(
        base="may", least=2, most=2, parameters={"nuslerp_row_wise": Flag(False), "nuslerp_flatten": Flag(True)}
    ),
    "sce": Method(base="yes", weights="none", parameters={"select_topk": Number(1.0, 0, 1)}),
    "nearswap": Method(base="yes", most=1, weights="none", parameters={"t": Number(None, 0)}),
    "arcee_fusion": Method(base="yes", most=1, weights="none"),
    "ram": Method(base="yes", weights="none", parameters={"epsilon": Number(1e-5, 0)}),
    "karcher": Method(weights="equal", parameters={"max_iter": Whole(10, 0, 10_000), "tol": Number(1e-5, 0, 1)}),
    "model_stock": Method(
        base="yes", least=2, weights="none", parameters={"floor": Number(0.0, 0, 1), "filter_wise": Flag(False)}
    ),
    "warp": Method(base="yes", least=2, weights="equal", parameters={"eta": Number(1.0)}),
    "ema": Method(weights="none", parameters={"decay": Number(None, 0, 1)}),
}


def check(method: str, m: int, *, with_base: bool) -> Method:
    """The method of that name. Raises UserError where there is none, or it does not take so many models or a base."""
    if method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    found = METHODS[method]
    if found.base == "yes" and not with_base:
        raise UserError(f"{method} needs base, the model that the others were trained from")
    if found.base == "no" and with_base:
        takers = ", ".join(name for name, one in METHODS.items() if one.base != "no")
        raise UserError(f"{method} takes no base; those that do: {takers}")
    if m + with_base > MAX_INPUTS:
        raise UserError(f"at most {MAX_INPUTS} models can be mixed at once (base included), got {m + with_base}")
    if not found.least <= m <= found.most:
        wanted = f"{found.least}" if found.least == found.most else f"at least {found.least}"
        raise UserError(f"{method} takes {wanted} models, got {m}")
    return found


def read(method: str, given: Mapping[str, Any] | None, m: int) -> dict[str, Any]:
    """Every parameter of a method, from what a user gave and the defaults.

    A number may be {pattern: number or numbers over the layers}; density, epsilon and gamma may be lists, one for each
    model. Raises UserError that names the parameter.
    """
    if given is not None and not isinstance(given, Mapping):
        raise UserError(f"parameters must map names to values, got {reprlib.repr(given)}")
    wanted = METHODS[method].parameters
    unknown = [name for name in given or () if name not in wanted]
    if unknown:
        takes = f"takes {', '.join(wanted)}" if wanted else "takes none"
        raise UserError(f"{reprlib.repr(unknown[0])} is no parameter of {method}, which {takes}")
    found = {}
    for name, kind in wanted.items():
        value = kind.default if given is None or name not in given else given[name]
        if value is None:
            raise UserError(f"{method} needs the parameter {name}")
        found[name] = kind.read(name, value, m)
    return found


def told(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON, for the record."""

    def one(value: Any) -> Any:
        if isinstance(value, Setting):
            return value.told()
        return [one(held) for held in value] if isinstance(value, list) else value

    return {name: one(value) for name, value in values.items()}
