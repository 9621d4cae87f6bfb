"""How each method turns what a user asks for into work on one tensor: weighted sums, or merges of sparse task vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from fastalign import backend
from fastalign._base.errors import UserError
from fastalign.soup.checkpoint import Checkpoint
from fastalign.soup.methods import sparse as sparsify
from fastalign.soup.methods import spheres as geometry
from fastalign.soup.methods.base import METHODS as _TABLE
from fastalign.soup.methods.settings import Places, Setting, parse
from fastalign.soup.steps import Segment, StreamError, Tasks
from fastalign.soup.stream import dots

METHODS = tuple(_TABLE)
Step = list[float] | Tasks  # weights of the inputs, (K × inputs) row by row; or a merge of task vectors


# ---- weights ----


def weight_rows(weights, m: int) -> np.ndarray:
    """`weights` as (K, m) float64. Raises UserError for any other shape and for numbers that are not finite."""
    try:
        rows = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"weights must be {m} numbers, or rows of {m} numbers, got {weights!r}") from None
    if rows.ndim not in (1, 2) or rows.shape[-1] != m or rows.size == 0:
        raise UserError(f"weights must have shape ({m},) or (K, {m}) for {m} models, got {rows.shape}")
    if not np.isfinite(rows).all():
        raise UserError("weights must be finite numbers")
    return np.atleast_2d(rows)


class Weights:
    """Of every tensor: the same rows for all, or one row of Settings. `single`: one output, not a list of them."""

    def __init__(self, weights: Any, m: int, names: Sequence[str] = ()):
        self._places = Places(names)
        self.settings: list[Setting] | None = None
        if isinstance(weights, list | tuple) and any(isinstance(one, Setting | Mapping) for one in weights):
            if len(weights) != m:
                raise UserError(f"weights must be one for each of {m} models, got {len(weights)}")
            self.settings = [parse(f"weight of model {i}", one) for i, one in enumerate(weights)]
            self.single, self.count = True, 1
        else:
            self.rows = weight_rows(weights, m)
            self.single, self.count = np.ndim(weights) == 1, len(self.rows)

    def of(self, name: str) -> np.ndarray:
        """(K, m). Raises UserError where a model has none for this tensor."""
        if self.settings is None:
            return self.rows
        found = [one.at(name, self._places[name]) for one in self.settings]
        lacking = next((i for i, weight in enumerate(found) if weight is None), None)
        if lacking is not None:
            raise UserError(f"weight of model {lacking}: none of its patterns matches {name}")
        return np.array([found], dtype=np.float64)

    def told(self) -> list[list[Any]]:
        """As JSON, one row for each output."""
        return [[one.told() for one in self.settings]] if self.settings is not None else self.rows.tolist()


def simplex_grid(m: int, points: int) -> np.ndarray:
    """All weights of m models that sum to 1 in steps of 1 / (points - 1): (K, m), the first model's weight falling."""
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


def linear_rows(rows: np.ndarray, normalize: bool | None) -> np.ndarray:
    """Weights of a linear soup. normalize: True divides by the sum, False keeps them, None wants a sum of 1."""
    sums = rows.sum(1, keepdims=True)
    if normalize:
        if (np.abs(sums) < 1e-12).any():
            raise UserError("weights that sum to 0 cannot be normalised")
        return rows / sums
    if normalize is None and (np.abs(sums - 1) > 1e-6).any():
        off = float(sums[np.abs(sums - 1).argmax()][0])
        raise UserError(
            f"weights of a linear soup must sum to 1, got {off:g} (normalize=True divides by the sum, normalize=False keeps them)"
        )
    return rows


def ema_rows(m: int, decay: float) -> np.ndarray:
    """Weights of the exponential moving average of m checkpoints, the oldest first: e_0 = w_0, e_i = decay e_(i-1) +
    (1 - decay) w_i."""
    steps = np.arange(m - 1, -1, -1)
    weights = (1 - decay) * np.power(decay, steps)
    weights[0] = decay ** (m - 1)
    return weights[None]


# ---- steps ----


def by_whole_tensors(method: str, values: Mapping[str, Any]) -> bool:
    """Whether a method is made by whole_tensors.py, not by steps."""
    return method in ("sce", "nearswap", "arcee_fusion", "ram") or (
        method == "nuslerp" and not values["nuslerp_flatten"]
    )


def settings_of(
    method: str, weights: Weights, values: Mapping[str, Any], names: Sequence[str]
) -> Callable[[str], tuple[np.ndarray, Mapping[str, Any]]]:
    """Each tensor's weights (K, m) and its parameters. Raises UserError at once where a pattern leaves out a tensor."""
    places = Places(names)

    def of(name: str) -> tuple[np.ndarray, Mapping[str, Any]]:
        found = {key: x.at(name, places[name]) if isinstance(x, Setting) else x for key, x in values.items()}
        lacking = next((key for key, x in found.items() if x is None), None)
        if lacking is not None:
            raise UserError(f"{lacking}: none of its patterns matches {name}")
        return weights.of(name), found

    for name in names:
        of(name)
    return of


def steps(
    method: str,
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    weights: Weights,
    values: Mapping[str, Any],
    normalize: bool | None,
    names: Sequence[str],
) -> Callable[[str], Step]:
    """What is done for each tensor. Weights are over the base, where there is one, and the models.

    values: the method's parameters, as `parameters.read` gives them. Raises UserError, at once where it can be known.
    """
    places, m = Places(names), len(models)

    def number(parameter: str, name: str) -> float:
        found = values[parameter].at(name, places[name])
        if found is None:
            raise UserError(f"{parameter}: none of its patterns matches {name}")
        return found

    def each(parameter: str, name: str) -> list[float]:
        found = [one.at(name, places[name]) for one in values[parameter]]
        if None in found:
            raise UserError(f"{parameter} of model {found.index(None)}: none of its patterns matches {name}")
        return found

    def rows(name: str) -> np.ndarray:
        """Over the inputs, (K, inputs)."""
        held = weights.of(name)
        if method == "linear":
            return linear_rows(held, normalize)
        if method == "ema":
            return ema_rows(m, number("decay", name))
        if method == "task_arithmetic":
            if values["normalize"]:
                sums = held.sum(1, keepdims=True)
                held = held / np.where(np.abs(sums) < 1e-8, 1, sums)
            return _with_base(held * number("lambda", name))
        if method == "slerp":
            t = _shares(held)
            return np.stack([geometry.slerp(gram(models, name), x) for x in t])
        if method == "karcher":
            held_gram = gram(models, name)
            return np.stack(
                [geometry.karcher(held_gram, row, steps=values["max_iter"], tol=number("tol", name)) for row in held]
            )
        if method == "nuslerp":
            held_gram = gram(models if base is None else (base, *models), name, centered=base is not None)[-2:, -2:]
            found = np.stack([geometry.nuslerp(held_gram, row) for row in held])
            return found if base is None else _with_base(found)
        if method == "multislerp":
            inputs = models if base is None else (base, *models)
            held_gram = gram(inputs, name, centered=base is not None)[len(inputs) - m :, len(inputs) - m :]
            options = {"normalize": values["normalize_weights"], "eps": number("eps", name)}
            found = np.stack([geometry.multislerp(held_gram, row, **options) for row in held])
            # As mergekit does, a lone model is itself, whatever its weight.
            return found if base is None else _with_base(found)
        held_gram = gram((base, *models), name, centered=True)[1:, 1:]
        if method == "model_stock":
            t = geometry.model_stock(held_gram, floor=number("floor", name))
            return _with_base(np.full((1, m), t / m))
        return _with_base(number("eta", name) * np.stack([geometry.warp(held_gram, row) for row in held]))

    def tasks(name: str) -> Tasks:
        tensor = models[0][name]
        asked = {
            parameter: each(parameter, name) for parameter in ("density", "epsilon", "gamma") if parameter in values
        }
        choices = [
            sparsify.choice(
                method, tensor.count, name, i, rescale=values["rescale"], **{k: v[i] for k, v in asked.items()}
            )
            for i in range(m)
        ]
        held = tuple(tuple(row) for row in weights.of(name).tolist())
        elect = method in ("ties", "dare_ties", "della", "breadcrumbs_ties")
        row = tensor.shape[-1] if tensor.shape else 1
        return Tasks(
            tuple(choices), held, number("lambda", name), elect, values["normalize"], values.get("seed", 0), row
        )

    if by_whole_tensors(method, values):
        return lambda name: []
    if "density" in values:
        for name in names:
            tasks(name)
        return tasks
    if method in ("linear", "task_arithmetic", "ema"):
        if weights.settings is None and not _varies(values):
            flat = rows("").ravel().tolist()  # the same for every name
            return lambda name: flat
        for name in names:
            rows(name)
    if method == "slerp":
        for name in names:
            _shares(weights.of(name))

    def weighted(name: str) -> list[float]:
        with np.errstate(invalid="ignore", over="ignore"):  # of a tensor with NaN or infinities, NaN is made
            return rows(name).ravel().tolist()

    return weighted


def _varies(values: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Setting) and value.constant is None for value in values.values())


def _with_base(rows: np.ndarray) -> np.ndarray:
    """Weights of task vectors as weights of base and models (arXiv 2212.04089): the base's is 1 less their sum."""
    return np.concatenate([1 - rows.sum(1, keepdims=True), rows], 1)


def _shares(rows: np.ndarray) -> list[float]:
    """SLERP's t: the second model's share of each row."""
    sums = rows.sum(1)
    if (rows < 0).any() or (sums <= 0).any():
        raise UserError("slerp's weights must be 0 or more, and not all 0")
    return (rows[:, 1] / sums).tolist()


def gram(checkpoints: Sequence[Checkpoint], name: str, *, centered: bool = False) -> np.ndarray:
    """Dot products of the tensors of this name; centered: of what they differ by from the first one. (m, m) float64."""
    held = [one[name] for one in checkpoints]
    with ExitStack() as stack:
        files = [stack.enter_context(open(one.files[one.where[name]].path, "rb")) for one in checkpoints]
        segment = Segment(
            held[0].count, tuple(tensor.dtype for tensor in held), tuple(file.fileno() for file in files),
            tuple(tensor.offset for tensor in held), (), (), [],
        )  # fmt: skip
        try:
            return dots(segment, centered=centered, threads=backend.threads())
        except StreamError as error:
            raise OSError(error.errno or 5, error.strerror, str(files[error.file].name)) from None
