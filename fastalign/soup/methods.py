"""How each method turns what a user asks for into weighted sums of checkpoints.

Every method here is linear in its inputs once a few numbers are known, so that one kernel serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import torch

from fastalign.errors import UserError
from fastalign.soup.checkpoint import Checkpoint
from fastalign.soup.stream import Segment, StreamError, dots

METHODS = ("linear", "task_arithmetic", "slerp")
MAX_INPUTS = 128  # of the kernel
_PARALLEL = 0.9995  # cosines beyond: the great circle is a straight line
Rows = Callable[[str], list[float]]


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


def check(method: str, m: int, *, with_base: bool) -> None:
    """Raises UserError where there is no such method, or it does not take so many models or a base."""
    if method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "task_arithmetic" and not with_base:
        raise UserError("task_arithmetic needs base, the model that the others were trained from")
    if method != "task_arithmetic" and with_base:
        raise UserError(f"base is task_arithmetic's, {method} takes none")
    if method == "slerp" and m != 2:
        raise UserError(f"slerp takes two models, got {m}")
    if not 1 <= m + with_base <= MAX_INPUTS:
        raise UserError(f"at most {MAX_INPUTS} models can be mixed at once (base included), got {m + with_base}")


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
            f"weights of a linear soup must sum to 1, got {off:g} (normalize=True divides by the sum, False keeps them)"
        )
    return rows


def task_arithmetic_rows(rows: np.ndarray) -> np.ndarray:
    """base + Σ λ (w - base) (arXiv 2212.04089) as weights of base, w: the first column is 1 - Σ λ."""
    return np.concatenate([1 - rows.sum(1, keepdims=True), rows], 1)


def slerp_rows(rows: np.ndarray, pair: Sequence[Checkpoint]) -> Rows:
    """Weights per tensor of the great circle between two tensors as vectors, at t = the second's share of each row.

    (sin((1 - t) θ), sin(t θ)) / sin θ with θ the angle between them (Shoemake 1985); tensors that are nearly parallel,
    or zero, are mixed along the line.
    """
    sums = rows.sum(1)
    if (rows < 0).any() or (sums <= 0).any():
        raise UserError("slerp's weights must be 0 or more, and not all 0")
    t = rows[:, 1] / sums

    def of(name: str) -> list[float]:
        cosine = _cosine(pair, name)
        if not abs(cosine) < _PARALLEL:
            return np.stack([1 - t, t], 1).ravel().tolist()
        theta = math.acos(cosine)
        return (np.stack([np.sin((1 - t) * theta), np.sin(t * theta)], 1) / math.sin(theta)).ravel().tolist()

    return of


def _cosine(pair: Sequence[Checkpoint], name: str) -> float:
    """Between the two tensors of this name; 1 where one is zero. NaN where one holds a NaN."""
    held = [one[name] for one in pair]
    with ExitStack() as stack:
        files = [stack.enter_context(open(one.files[one.where[name]].path, "rb")) for one in pair]
        segment = Segment(
            held[0].count, tuple(tensor.dtype for tensor in held), tuple(file.fileno() for file in files),
            tuple(tensor.offset for tensor in held), (), (), [],
        )  # fmt: skip
        try:
            gram = dots(segment, threads=torch.get_num_threads())
        except StreamError as error:
            raise OSError(error.errno or 5, error.strerror, str(files[error.file].name)) from None
    if gram[0, 0] == 0 or gram[1, 1] == 0:
        return 1.0
    return float(gram[0, 1] / math.sqrt(gram[0, 0]) / math.sqrt(gram[1, 1]))
