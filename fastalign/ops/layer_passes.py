"""layer_passes: the small passes of a Llama-form layer in a step of decoding, one launch each. On GPUs alone: on CPUs
`models.compiled_layers` has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops.library import define


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / sqrt(mean(x²) + eps), of rows (rows, width) (arXiv 1910.07467)."""
    return _norm_op(x, None, weight, eps)[0]


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(the norm of x + residual, x + residual)."""
    return _norm_op(x, residual, weight, eps)


def rotate(
    q: Tensor, k: Tensor, v: Tensor, turn: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, lengths: Tensor
) -> Tensor:
    """q (rows, heads, d) turned by `turn`, the cos and sin (rows, d) of its rotary embedding (of halves, arXiv
    2104.09864); k (rows, kv heads, d), turned, and v are written to keys and values (rows or more, kv heads, room, d)
    at lengths (rows,)."""
    return _rotate_op(q, k, v, *turn, keys, values, lengths)


def gate(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) u (arXiv 2002.05202)."""
    return _gate_op(g, u)


_norm_op = define(
    "layer_norm(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    None,
    lambda x, residual, *_: (x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)),
    triton="layer_passes.norm",
)
_rotate_op = define(
    "layer_rotate(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor lengths) -> Tensor",
    None,
    lambda q, *_: torch.empty_like(q, memory_format=torch.contiguous_format),
    triton="layer_passes.rotate",
)
_gate_op = define(
    "layer_gate(Tensor g, Tensor u) -> Tensor",
    None,
    lambda g, u: torch.empty_like(g, memory_format=torch.contiguous_format),
    triton="layer_passes.gate",
)
