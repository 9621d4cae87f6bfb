"""Per-token quantities (B, T) and their masks, for the policy losses.

Masked places are never read, even if NaN, and get no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign.ops import checks

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum")


def wide(x: Tensor) -> Tensor:
    """float32 for narrow inputs, float64 kept."""
    return x if x.dtype == torch.float64 else x.float()


def check_tokens(name: str, x: Tensor) -> None:
    """x must be (B, T) floating numbers."""
    checks.tensor(name, x, "a floating tensor", "floating")
    if x.ndim != 2:
        raise UserError(f"{name} must have shape (B, T), got {tuple(x.shape)}")


def valid(mask: Tensor, like: Tensor, name: str) -> Tensor:
    """mask as bool, checked to have the shape of `like`, whose name is `name`."""
    checks.tensor("mask", mask)
    if mask.shape != like.shape:
        raise UserError(f"mask.shape must equal {name}.shape, got {tuple(mask.shape)} and {tuple(like.shape)}")
    return mask if mask.dtype == torch.bool else mask != 0


def check_beside(name: str, x: Tensor | None, like: Tensor, of: str = "logprobs") -> None:
    """x, if given, must have the shape of `like`, whose name is `of`."""
    if x is None:
        return
    checks.tensor(name, x)
    if x.shape != like.shape:
        raise UserError(f"{name}.shape must equal {of}.shape, got {tuple(x.shape)} and {tuple(like.shape)}")


def check_aggregation(how: str, normalizer: Tensor | float | None = None) -> None:
    checks.among("aggregation", how, AGGREGATIONS)
    if normalizer is not None and how != "token_mean":
        raise UserError(f"normalizer must be None unless aggregation is 'token_mean', got {how!r}")
    if normalizer is not None and not isinstance(normalizer, Tensor):
        checks.numbers(normalizer=normalizer)


def aggregate(rows: Tensor, tokens: Tensor, how: str, normalizer: Tensor | float | None = None) -> Tensor:
    """A scalar from the sums (B,) over each row's valid tokens and their counts. token_mean: the mean over all tokens,
    or the sum divided by `normalizer`; seq_mean_token_mean: the mean over rows (0 for an empty row) of the rows' means;
    seq_mean_token_sum: of their sums.
    """
    if how == "token_mean":
        return rows.sum() / (tokens.sum().clamp(min=1) if normalizer is None else normalizer)
    if how == "seq_mean_token_mean":
        rows = rows / tokens.clamp(min=1)
    return rows.sum() / max(len(rows), 1)
