"""Shared by the fused losses: where they run, and `sum_gradient`, the backward pass of a sum over tokens."""

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


def _sum_gradient_cpu(rows, mask, scales, weights, dtype):
    gradient = 0
    if rows is not None:
        gradient = torch.where(mask != 0, rows.unsqueeze(-1), 0)
    if scales is not None:
        gradient = gradient + torch.where(weights != 0, scales.unsqueeze(-1) * weights, 0)
    return gradient.to(dtype)


def _sum_gradient_fake(rows, mask, scales, weights, dtype):
    over = weights if mask is None else mask
    return over.new_empty(over.shape, dtype=dtype)


_sum_gradient_op: Op = define(
    "sum_gradient(Tensor? rows, Tensor? mask, Tensor? scales, Tensor? weights, ScalarType dtype) -> Tensor",
    _sum_gradient_cpu,
    _sum_gradient_fake,
    triton="_sum_gradient.sum_gradient",
    leading_dims=True,
)


def sum_gradient(
    of: Tensor, rows: Tensor | None, mask: Tensor | None, scales: Tensor | None, weights: Tensor | None
) -> Tensor:
    """The gradient of `of` (..., R, T), in its dtype: rows (..., R) over a mask (..., R, T), or scales (..., R) times
    weights (..., R, T), or both added; 0 where the mask and the weights are."""
    return once(lambda _, *given: _sum_gradient_op(*given, of.dtype), of, rows, mask, scales, weights)
