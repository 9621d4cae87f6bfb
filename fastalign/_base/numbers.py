"""Checks of numbers in a user's data, before they are used."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from fastalign._base.errors import UserError


def number(name: str, value: Any, *, missing: float | None = None, least: float = -math.inf) -> float:
    """A finite number, at least `least`, from a number or its text; for None and "", `missing` if given.

    name: for the error, with its position ("row 3: margin"). Raises UserError.
    """
    if (value is None or value == "") and missing is not None:
        return missing
    try:
        result = float(value)
    except (TypeError, ValueError):
        came = "nothing" if value is None or value == "" else repr(value)
        raise UserError(f"{name} must be a number, got {came}") from None
    except OverflowError:  # an integer of hundreds of digits
        result = math.inf
    if not math.isfinite(result):
        raise UserError(f"{name} must be a finite number, got {result}")
    if result < least:
        raise UserError(f"{name} must be at least {least:g}, got {result:g}")
    return result


def weights(lam: Any, count: int, of: str = "") -> np.ndarray:
    """lam as (count,) float64, one finite number per reward, or UserError; of: the rewards' names, for it."""
    rule = f"lam must have one weight per reward, {count}{of and f' ({of})'}"
    try:
        result = np.asarray(lam, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"lam must be numbers, one per reward, got {lam!r:.80}") from None
    if result.shape != (count,):
        raise UserError(f"{rule}, got {result.size if result.ndim == 1 else f'shape {result.shape}'}")
    if not np.isfinite(result).all():
        raise UserError(f"lam must be finite, got {result.tolist()}")
    return result


def column(source: str, name: str, values: Iterable[Any], **rules: float) -> list[float]:
    """`number` of each; the error has the row, counted from 0."""
    return [number(f"{source} row {i}: {name}", value, **rules) for i, value in enumerate(values)]
