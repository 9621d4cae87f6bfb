"""Numbers that may vary by tensor: one for all, one per name pattern, or a gradient over the layers; and weights."""

from __future__ import annotations

import fnmatch
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastalign._base.errors import UserError
from fastalign.soup.stacks import comes_before, layer_of

_MOST = 1000  # patterns, or points over the layers, of one setting


class Places:
    """A tensor's position between the first layer (0) and the last (1); tensors outside the layers are at 0.

    The layer is the first integer in the tensor's name, among names with the same prefix. This is the t of mergekit's
    gradients, in which the final norm and the head are at 0 too, and a single layer at 1.
    """

    def __init__(self, names: Iterable[str]):
        self._layers: dict[str, tuple[str, int]] = {}
        self._last: dict[str, int] = {}
        for name in names:
            layer = layer_of(name)
            if layer:
                self._layers[name] = layer.begin, layer.number
                self._last[layer.begin] = max(layer.number, self._last.get(layer.begin, 0))

    def __getitem__(self, name: str) -> float:
        if name not in self._layers:
            return 0.0
        begin, layer = self._layers[name]
        last = self._last[begin]
        return layer / last if last else 1.0


class Setting:
    """(pattern, numbers) pairs; the first pattern that matches the tensor's name counts; several numbers are a
    piecewise linear gradient over the layers. A pattern is a glob ("*.mlp.*")."""

    def __init__(self, rules: Iterable[tuple[str, tuple[float, ...]]]):
        self.rules: tuple[tuple[str, tuple[float, ...]], ...] = tuple(rules)

    def at(self, name: str, place: float) -> float | None:
        """The number for a tensor; None if no pattern matches."""
        for pattern, values in self.rules:
            if fnmatch.fnmatchcase(name, pattern):
                scaled = place * (len(values) - 1)
                low = int(scaled)
                high, part = min(low + 1, len(values) - 1), scaled - low
                return (1 - part) * values[low] + part * values[high] if part else values[low]
        return None

    @property
    def constant(self) -> float | None:
        """The common number of all tensors, None if they may differ."""
        pattern, values = self.rules[0] if self.rules else ("", ())
        return values[0] if pattern == "*" and len(set(values)) == 1 else None

    def to_json(self) -> float | dict[str, Any]:
        """As a user would write it."""
        if self.constant is not None:
            return self.constant
        return {pattern: values[0] if len(values) == 1 else list(values) for pattern, values in self.rules}

    def mapped(self, of: Callable[[float], float]) -> Setting:
        """The same with mapped numbers."""
        return Setting((pattern, tuple(of(x) for x in values)) for pattern, values in self.rules)


class Runs(Setting):
    """A Setting per run of layers, with gradients over the run's own layers. Tensors before the layers use the first
    run's value at its first layer, those after them the last run's, likewise."""

    def __init__(self, lengths: Sequence[int], parts: Sequence[Setting]):
        self.lengths: tuple[int, ...] = tuple(lengths)
        self.parts: tuple[Setting, ...] = tuple(parts)
        super().__init__(rule for part in parts for rule in part.rules)

    def at(self, name: str, place: float) -> float | None:
        layer = layer_of(name)
        if layer is None:
            return self.parts[0 if comes_before(name) else -1].at(name, 0.0)
        first = 0
        for length, part in zip(self.lengths, self.parts, strict=True):
            if layer.number < first + length:
                return part.at(name, (layer.number - first) / (length - 1) if length > 1 else 1.0)
            first += length
        raise UserError(f"{name}: is beyond the {first} configured layers")

    @property
    def constant(self) -> float | None:
        constants = {part.constant for part in self.parts}
        return constants.pop() if len(constants) == 1 else None

    def to_json(self) -> float | dict[str, Any]:
        if self.constant is not None:
            return self.constant
        runs = zip(self.lengths, self.parts, strict=True)
        return {"runs": [{"layers": length, "value": part.to_json()} for length, part in runs]}

    def mapped(self, of: Callable[[float], float]) -> Setting:
        return Runs(self.lengths, [part.mapped(of) for part in self.parts])


def parse(argument: str, value: Any, *, least: float = -math.inf, most: float = math.inf) -> Setting:
    """A Setting from a number, or from {pattern: number or numbers over the layers}.

    Raises UserError that names `argument` for anything else, and for numbers that are not finite or not within bounds.
    """
    if isinstance(value, Runs):
        return Runs(value.lengths, [parse(argument, part, least=least, most=most) for part in value.parts])
    if isinstance(value, Setting):
        rules = value.rules
    elif isinstance(value, Mapping):
        rules = tuple((_pattern(argument, key), numbers(argument, numbers_of)) for key, numbers_of in value.items())
    else:
        rules = (("*", (_number(argument, value),)),)
    if not 1 <= len(rules) <= _MOST:
        raise UserError(f"{argument} must have 1 to {_MOST} patterns, got {len(rules)}")
    for _, values in rules:
        for x in values:
            if not least <= x <= most:
                raise UserError(f"{argument} must be {_bounds(least, most)}, got {x:g}")
    return Setting(rules)


def numbers(argument: str, value: Any) -> tuple[float, ...]:
    """One number, or a list of them, as a tuple."""
    if not isinstance(value, list | tuple):
        return (_number(argument, value),)
    if not 1 <= len(value) <= _MOST:
        raise UserError(f"{argument} must have 1 to {_MOST} numbers over the layers, got {len(value)}")
    return tuple(_number(argument, x) for x in value)


def _number(argument: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)  # also "1e-5", which YAML reads as text
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{argument} must be a number, got {reprlib.repr(value)}") from None
    if not math.isfinite(number):
        raise UserError(f"{argument} must be finite, got {number}")
    return number


def _pattern(argument: str, key: Any) -> str:
    if not isinstance(key, str):
        raise UserError(f"{argument}'s patterns must be text such as '*.mlp.*', got {reprlib.repr(key)}")
    return key


def _bounds(least: float, most: float) -> str:
    if math.isinf(most):
        return f"{least:g} or more"
    return f"{most:g} or less" if math.isinf(least) else f"within [{least:g}, {most:g}]"


def to_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """A method's parameters, for the record."""

    def one(value: Any) -> Any:
        if isinstance(value, Setting):
            return value.to_json()
        return [one(x) for x in value] if isinstance(value, list) else value

    return {name: one(value) for name, value in values.items()}


# ---- weights ----


def weight_rows(weights: ArrayLike, m: int) -> np.ndarray:
    """`weights` as (K, m) float64. Raises UserError for any other shape and for numbers that are not finite."""
    try:
        rows = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"weights must be {m} numbers, or rows of {m} numbers, got {weights!r}") from None
    if rows.ndim not in (1, 2) or rows.shape[-1] != m or rows.size == 0:
        raise UserError(f"weights must have shape ({m},) or (K, {m}) for {m} models, got {rows.shape}")
    if not np.isfinite(rows).all():
        raise UserError(f"weights must be finite numbers, got {rows.tolist()}")
    return np.atleast_2d(rows)


class Weights:
    """Weights for every tensor: the same rows for all, or one row of Settings. `single`: one output, not a list."""

    settings: list[Setting] | None
    rows: np.ndarray
    single: bool

    def __init__(self, weights: Any, m: int):
        self.settings = None
        if isinstance(weights, list | tuple) and any(isinstance(one, Setting | Mapping) for one in weights):
            if len(weights) != m:
                raise UserError(f"weights must be one for each of {m} models, got {len(weights)}")
            self.settings = [parse(f"weight of model {i}", one) for i, one in enumerate(weights)]
            self.single = True
        else:
            self.rows = weight_rows(weights, m)
            self.single = np.ndim(weights) == 1

    def at(self, name: str, place: float) -> np.ndarray:
        """(K, m) for one tensor. Raises UserError if a model has none for it."""
        if self.settings is None:
            return self.rows
        row = [one.at(name, place) for one in self.settings]
        if None in row:
            raise UserError(f"weight of model {row.index(None)}: none of its patterns matches {name}")
        return np.array([row], dtype=np.float64)

    def to_json(self) -> list[list[Any]]:
        """One row for each output."""
        return self.rows.tolist() if self.settings is None else [[one.to_json() for one in self.settings]]


def simplex_grid(m: int, points: int) -> np.ndarray:
    """All weights of m models that sum to 1, in steps of 1 / (points - 1): (K, m), the first model's weight
    descending.

    >>> from fastalign import soup
    >>> soup.simplex_grid(2, 3).tolist()
    [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    """
    if not (isinstance(m, int) and m >= 1):
        raise UserError(f"m must be an integer, at least 1, got {m!r}")
    if not (isinstance(points, int) and points >= 2):
        raise UserError(f"grid must be at least 2 points a side, got {points!r}")
    if math.comb(points - 1 + m - 1, m - 1) > 10_000:
        raise UserError(
            f"grid {points} of {m} models has {math.comb(points + m - 2, m - 1):,} soups, at most 10,000 are made"
        )

    def parts(total: int, left: int) -> Iterator[tuple[int, ...]]:
        if left == 1:
            yield (total,)
            return
        for mine in range(total, -1, -1):
            for rest in parts(total - mine, left - 1):
                yield (mine, *rest)

    return np.array(list(parts(points - 1, m)), dtype=np.float64) / (points - 1)
