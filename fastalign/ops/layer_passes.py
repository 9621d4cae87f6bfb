"""layer_passes: the small passes of a layer of Llama's or Gemma's form in a step of decoding, one launch each. On GPUs
alone: on CPUs `models.compiled_layers` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.library import define


class Turn(NamedTuple):
    """What is done to queries and keys: an RMSNorm of each head by (weight (d,), eps) and the offset, unless the weight
    is None; then the rotary embedding of halves, by cos and sin (rows, d) (arXiv 2104.09864)."""

    cos: Tensor
    sin: Tensor
    norms: Sequence[tuple[Tensor | None, float]] = ((None, 0.0), (None, 0.0))
    offset: float = 0.0


def norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """(offset + weight) · x / sqrt(mean(x²) + eps), of rows (rows, width) (arXiv 1910.07467; Gemma's weights are the
    deviations from an offset of 1)."""
    return _norm_op(x, None, weight, eps, offset)[0]


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """(the norm of x + residual, x + residual)."""
    return _norm_op(x, residual, weight, eps, offset)


def rotate(q: Tensor, k: Tensor, v: Tensor, turn: Turn, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """q (rows, heads, d) turned; k (rows, kv heads, d), turned, and v are written to keys and values (rows or more, kv
    heads, room, d) at lengths (rows,)."""
    (q_weight, q_eps), (k_weight, k_eps) = turn.norms
    return _rotate_op(q, k, v, turn.cos, turn.sin, q_weight, k_weight, q_eps, k_eps, turn.offset, keys, values, lengths)


def gate(g: Tensor, u: Tensor, gelu: bool = False) -> Tensor:
    """silu(g) u, or gelu(g) u in its tanh form (arXiv 2002.05202)."""
    return _gate_op(g, u, gelu)


_norm_op = define(
    "layer_norm(Tensor x, Tensor? residual, Tensor weight, float eps, float offset) -> (Tensor, Tensor)",
    None,
    lambda x, residual, *_: (x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)),
    triton="layer_passes.norm",
)
_rotate_op = define(
    "layer_rotate(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, "
    "float q_eps, float k_eps, float offset, Tensor(a!) keys, Tensor(b!) values, Tensor lengths) -> Tensor",
    None,
    lambda q, *_: torch.empty_like(q, memory_format=torch.contiguous_format),
    triton="layer_passes.rotate",
)
_gate_op = define(
    "layer_gate(Tensor g, Tensor u, bool gelu) -> Tensor",
    None,
    lambda g, *_: torch.empty_like(g, memory_format=torch.contiguous_format),
    triton="layer_passes.gate",
)
