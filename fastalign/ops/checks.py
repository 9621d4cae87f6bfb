"""Checks shared by several ops. Each message states the rule, then the value received."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastalign import backend
from fastalign._base.dtypes import DTYPES
from fastalign._base.errors import UserError
from fastalign.ops.buffers import buffer


class WrongType(UserError, TypeError):
    """A UserError that is also a TypeError: an argument of another class or dtype."""


def tensor(name: str, x: Any, rule: str = "a torch.Tensor", dtype: torch.dtype | str | None = None) -> None:
    """x must be a tensor: of this dtype, or of any floating one for "floating"."""
    if not isinstance(x, Tensor):
        raise WrongType(f"{name} must be {rule}, got {type(x).__name__}")
    if dtype is not None and not (x.is_floating_point() if dtype == "floating" else x.dtype == dtype):
        raise WrongType(f"{name} must be {rule}, got {x.dtype}")


def tensors(**named: Any) -> None:
    for name, x in named.items():
        tensor(name, x)


def shown(value: Any) -> str:
    """A value for a message, on one line: the text of a number, a string or None; else the class."""
    short = value is None or isinstance(value, str | int | float | np.number)
    return f"{value!r:.80}" if short else type(value).__name__


def numbers(**named: Any) -> None:
    """Each must be one number: Python's, numpy's or a tensor ()."""
    for name, value in named.items():
        if not isinstance(value, int | float) and not (hasattr(value, "__float__") and not getattr(value, "ndim", 0)):
            raise UserError(f"{name} must be a number, got {shown(value)}")


def integer(name: str, value: Any, least: int | None = None) -> None:
    if not isinstance(value, int | np.integer) or (least is not None and value < least):
        rule = "" if least is None else f", at least {least}"
        raise UserError(f"{name} must be an integer{rule}, got {shown(value)}")


def among(name: str, value: Any, known: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{name} must be one of {', '.join(known)}, got {shown(value)}")


def arrays(**named: Any) -> None:
    """Each must convert to an array of numbers; shapes, and the contents of a DataFrame, are checked elsewhere."""
    for name, x in named.items():
        numeric = getattr(getattr(x, "dtype", None), "kind", None) in ("f", "i", "u", "b")
        if numeric or isinstance(x, Tensor) or hasattr(x, "columns"):
            continue
        try:
            np.asarray(x, dtype=np.float64)
        except (TypeError, ValueError):
            raise WrongType(f"{name} must be an array of numbers, got {shown(x)}") from None


def logits(name: str, x: Tensor, last: str = "V") -> None:
    if not isinstance(x, Tensor):
        raise WrongType(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise WrongType(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise UserError(f"{name} must have shape (..., {last}) with {last} >= 1, got {tuple(x.shape)}")


def labels(logits_name: str, x: Tensor, labels: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise WrongType(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise WrongType(f"labels must be int64, got {labels.dtype}")
    if labels.shape != x.shape[:-1]:
        raise UserError(
            f"labels.shape must equal {logits_name}.shape[:-1], got {tuple(labels.shape)} and {tuple(x.shape[:-1])}"
        )
    if labels.device != x.device:
        raise UserError(f"labels must be on {logits_name}'s device, got {labels.device} and {x.device}")


def labels_in_range(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Reads the labels' values, so it runs only in an op's implementation, never while torch traces."""
    if torch.compiler.is_compiling():
        return
    if backend.native is not None and labels.device.type == "cpu":
        labels = labels.contiguous()
        position = backend.native.first_bad_label(buffer(labels), vocab, ignore_index)
    else:
        bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
        position = int(bad.flatten().nonzero()[0]) if bool(bad.any()) else -1
    if position >= 0:
        raise UserError(
            f"labels must be in [0, {vocab}) or ignore_index {ignore_index}, "
            f"got {labels.flatten()[position].item()} at position {position}"
        )


def outputs(requested: tuple[str, ...], known: tuple[str, ...]) -> None:
    several = isinstance(requested, tuple | list)
    if not several or not requested or any(not isinstance(name, str) or name not in known for name in requested):
        came = f"{tuple(requested)!r:.80}" if several else shown(requested)
        raise UserError(f"outputs must be some of {', '.join(known)}, got {came}")


def positive(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and 0 < value < math.inf):
        raise UserError(f"{name} must be a positive finite number, got {shown(value)}")


def seed(value: int) -> None:
    if not (isinstance(value, int) and 0 <= value < 2**64):
        raise UserError(f"seed must be an integer in [0, 2^64), got {shown(value)}")


def as_signed(value: int) -> int:
    """The int64 with the bits of a number in [0, 2^64), because op schemas have no larger integer type."""
    return value - 2**64 if value >= 2**63 else value
