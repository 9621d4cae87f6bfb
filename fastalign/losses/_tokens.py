"""Per-token quantities (B, T) and their masks: what the policy losses share.

What stands at masked places is never read, NaN or not, and gets no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.errors import UserError

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum")


def wide(x: Tensor) -> Tensor:
    """float32 for narrow inputs, float64 kept."""
    return x if x.dtype == torch.float64 else x.float()


def tokens(name: str, x: Tensor) -> Tensor:
    """Checked (B, T) floating numbers, wide."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim != 2:
        raise UserError(f"{name} must have shape (B, T), got {tuple(x.shape)}")
    return wide(x)


def valid(mask: Tensor, like: Tensor, name: str) -> Tensor:
    """mask as bool, checked to have the shape of `like`, which is called `name`."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.shape != like.shape:
        raise UserError(f"mask.shape must equal {name}.shape, got {tuple(mask.shape)} and {tuple(like.shape)}")
    return mask != 0


def beside(name: str, x: Tensor, like: Tensor, mask: Tensor, of: str = "logprobs") -> Tensor:
    """x (B, T) in the dtype of `like`, 0 where masked."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.shape != like.shape:
        raise UserError(f"{name}.shape must equal {of}.shape, got {tuple(x.shape)} and {tuple(like.shape)}")
    return x.to(like.dtype).masked_fill(~mask, 0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x over the valid places, 0 where there are none; x (B, 1), one number a row, over rows with any."""
    if x.shape != mask.shape:
        mask = mask.any(-1, keepdim=True)
    return x.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def aggregate(x: Tensor, mask: Tensor, how: str, normalizer: Tensor | float | None = None) -> Tensor:
    """x (B, T) or (B, 1) to a scalar. token_mean: the sum over valid places by their number, or by `normalizer`;
    seq_mean_token_mean: the mean over rows (empty ones too, as 0) of each row's mean; seq_mean_token_sum: of its sum.
    """
    if how not in AGGREGATIONS:
        raise UserError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {how!r}")
    if normalizer is not None and how != "token_mean":
        raise UserError(f"normalizer must be None unless aggregation is 'token_mean', got {how!r}")
    x = x.expand(mask.shape).masked_fill(~mask, 0)
    if how == "token_mean":
        return x.sum() / (mask.sum().clamp(min=1) if normalizer is None else normalizer)
    rows = x.sum(-1)
    if how == "seq_mean_token_mean":
        rows = rows / mask.sum(-1).clamp(min=1)
    return rows.sum() / max(len(rows), 1)
