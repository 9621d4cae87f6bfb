"""resample: candidates drawn from each prompt's log-weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign import backend, empty, reference
from fastalign._base.errors import UserError
from fastalign.backend import threads
from fastalign.ops import checks
from fastalign.ops.buffers import buffer, rows
from fastalign.ops.library import Op, define
from fastalign.reference import RESAMPLE_METHODS


def resample(
    log_weights: Tensor, k: int = 1, *, method: str = "multinomial", mask: Tensor | None = None, seed: int
) -> Tensor:
    """Draw k of the N candidates of each of P prompts, with probability proportional to exp(log_weights).

    With replacement, each candidate drawn k times its probability on average (Douc, Cappé, Moulines,
    arXiv cs/0507025): "multinomial", k independent draws in the order drawn; "stratified" and "systematic", one draw
    from each kth part of the cumulative sum, with a uniform number each or one for all, in index order; "residual",
    floor(k p) copies of each candidate in index order, then multinomial draws from the remainder. Without replacement:
    "gumbel_top_k" (arXiv 1903.06059), in the order drawn. "best": the k largest, largest first, the lowest index first
    among ties.

    Random numbers come from Philox4x32-10 with key seed and a counter of prompt and draw (for gumbel_top_k, candidate):
    the same on every backend and for any number of threads, and independent of those of `sample_tokens` with the same
    seed.

    Args:
        log_weights: (P, N) float32 or float64, any strides, not normalised; -inf for weight 0.
        k: at least 1.
        mask: (P, N) bool, True = valid; the others have weight 0, whatever their value. None: all valid.
        seed: in [0, 2^64).

    Returns:
        Indices (P, k) int64. A row with NaN or +inf, or without positive weight, is all -1. With fewer than k
        candidates of positive weight, gumbel_top_k and best fill the remaining entries with -1.

    Raises:
        UserError, TypeError: a shape, dtype, device or option that breaks these rules.

    >>> import torch
    >>> from fastalign import ops
    >>> log_weights = torch.tensor([[0.0, 0.0, 9.0]])
    >>> ops.resample(log_weights, 1, method="best", seed=0)
    tensor([[2]])
    >>> ops.resample(log_weights, 3, method="gumbel_top_k", seed=0).sort().values  # each once
    tensor([[0, 1, 2]])
    """
    _check(log_weights, k, method, mask)
    checks.seed(seed)
    log_weights, seed = log_weights.detach(), checks.as_signed(seed)
    if backend.choose(log_weights.device) == "reference":
        return reference.resample(log_weights, k, method, mask, seed)
    return resample_op(log_weights, k, RESAMPLE_METHODS.index(method), mask, seed)


def _check(log_weights, k, method, mask) -> None:
    checks.tensor("log_weights", log_weights)
    if log_weights.dtype not in (torch.float32, torch.float64):
        raise checks.WrongType(f"log_weights must be float32 or float64, got {log_weights.dtype}")
    if log_weights.ndim != 2 or log_weights.shape[1] == 0:
        raise UserError(f"log_weights must have shape (P, N) with N >= 1, got {tuple(log_weights.shape)}")
    if not (isinstance(k, int) and k >= 1):
        raise UserError(f"k must be an integer, at least 1, got {checks.shown(k)}")
    checks.among("method", method, RESAMPLE_METHODS)
    if mask is not None:
        checks.tensor("mask", mask, "a bool tensor", torch.bool)
        if mask.shape != log_weights.shape:
            raise UserError(
                f"mask.shape must equal log_weights.shape, got {tuple(mask.shape)} and {tuple(log_weights.shape)}"
            )
        if mask.device != log_weights.device:
            raise UserError(f"mask must be on log_weights' device, got {mask.device} and {log_weights.device}")


def _resample_cpu(log_weights, k, method, mask, seed):
    described, kept = rows(log_weights)
    mask = None if mask is None else mask.contiguous()
    ids = empty.resample(log_weights, k)
    backend.native.resample(buffer(ids), described, k, method, buffer(mask), seed, threads())
    del kept
    return ids


resample_op: Op = define(
    "resample(Tensor log_weights, int k, int method, Tensor? mask, int seed) -> Tensor",
    _resample_cpu,
    lambda log_weights, k, *_: empty.resample(log_weights, k),
    triton="resample.resample",
)
