"""Shared by the fused losses: where they run, and `spread`, the backward pass of a sum over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign import backend
from fastalign.ops.library import Op, define
from fastalign.ops.once import once


def on_triton(device: torch.device) -> bool:
    """Whether a loss on this device is one kernel launch; otherwise it is plain torch, differentiable any number of
    times."""
    return (backend.forced() == "triton" or device.type == "cuda") and backend.choose(device) == "triton"


def _spread_cpu(rows, mask, scales, weights, dtype):
    spread = 0
    if rows is not None:
        spread = torch.where(mask != 0, rows.unsqueeze(-1), 0)
    if scales is not None:
        spread = spread + torch.where(weights != 0, scales.unsqueeze(-1) * weights, 0)
    return spread.to(dtype)


def _spread_fake(rows, mask, scales, weights, dtype):
    over = weights if mask is None else mask
    return over.new_empty(over.shape, dtype=dtype)


_spread_op: Op = define(
    "spread_over_tokens(Tensor? rows, Tensor? mask, Tensor? scales, Tensor? weights, ScalarType dtype) -> Tensor",
    _spread_cpu,
    _spread_fake,
    triton="_spread.spread",
    leading_dims=True,
)


def spread(
    of: Tensor, rows: Tensor | None, mask: Tensor | None, scales: Tensor | None, weights: Tensor | None
) -> Tensor:
    """The gradient of `of` (..., R, T), in its dtype: rows (..., R) over a mask (..., R, T), or scales (..., R) times
    weights (..., R, T), or both added; 0 where the mask and the weights are."""
    return once(lambda _, *given: _spread_op(*given, of.dtype), of, rows, mask, scales, weights)
