"""sample_tokens: one token per row of logits, by a counter-based generator, with its log-probability."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign import backend, empty, reference
from fastalign._base.errors import UserError
from fastalign.backend import threads
from fastalign.ops import checks
from fastalign.ops.buffers import buffer
from fastalign.ops.buffers import rows as described_rows
from fastalign.ops.library import Op, define

MAX_VOCAB = 2**31 - 1


class SampledTokens(NamedTuple):
    """What `sample_tokens` returns, for B rows."""

    ids: Tensor  # (B,) int64; -1 in a row with nothing to draw
    log_probs: Tensor  # (B,) float32, float64 for float64 logits; NaN there


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int,
    offset: int = 0,
    rows: Tensor | None = None,
) -> SampledTokens:
    """Draw one token per row from softmax(logits / temperature), truncated as in transformers, without copying the
    logits.

    The filters apply in the order temperature, top_k, top_p, min_p, each to the result of the previous one. The draw is
    the first token, in index order, whose cumulative probability exceeds a uniform number. That number is a function of
    (seed, rows[i], offset) alone: Philox4x32-10 (Salmon et al. 2011) with key seed and that counter, the same on every
    backend and at any number of threads.

    Args:
        logits: (B, V) float32, float64, bfloat16 or float16, any strides. -inf masks a token.
        temperature: at least 0; 0 takes the largest logit (the lowest index among ties, log-probability 0).
        top_k: keep the k largest and all ties of the k-th; 0 for off.
        top_p: keep the most likely tokens until their mass reaches top_p, at least one (nucleus sampling, arXiv
            1904.09751); among ties at the cut-off the higher indices stay. 1 for off. A mass that falls short by at
            most the epsilon of the logits' dtype counts as reaching it; likewise for min_p.
        min_p: keep tokens at least min_p times as likely as the most likely one (arXiv 2407.01082); 0 for off.
        seed: in [0, 2^64).
        offset: the step number; a new one gives new draws for the same rows. In [0, 2^63).
        rows: (B,) int64, the random stream of each row, so that a draw does not depend on how rows are batched. None:
            0..B-1. Or (B, 2), each row's stream and its own step, which is added to offset.

    Returns:
        SampledTokens, without gradients. log_probs are under the truncated, renormalised distribution that was sampled.
        A row with NaN or +inf, or without a finite logit, gives id -1 and log-probability NaN.

    Raises:
        UserError, TypeError: a shape, dtype, device or option that breaks these rules.

    >>> import torch
    >>> from fastalign import ops
    >>> ids, log_probs = ops.sample_tokens(torch.tensor([[0.0, 0.0, -torch.inf]]), temperature=0.8, seed=0)
    >>> ids.item() < 2, log_probs.round(decimals=4)
    (True, tensor([-0.6931]))
    """
    check(logits, temperature, top_k, top_p, min_p, offset, rows)
    checks.seed(seed)
    options = (
        float(temperature),
        min(top_k, MAX_VOCAB),
        float(top_p),
        float(min_p),
        checks.as_signed(seed),
        offset,
        rows,
    )
    if backend.choose(logits.device) == "reference":
        return SampledTokens(*reference.sample_tokens(logits.detach(), *options))
    return SampledTokens(*sample_op(logits.detach(), *options))


def check(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, offset: int, rows: Tensor | None
) -> None:
    checks.logits("logits", logits)
    if logits.ndim != 2 or logits.shape[1] > MAX_VOCAB:
        raise UserError(f"logits must have shape (B, V) with V below 2^31, got {tuple(logits.shape)}")
    if not (isinstance(temperature, int | float) and 0 <= temperature < math.inf):
        raise UserError(f"temperature must be a finite number, at least 0, got {checks.shown(temperature)}")
    if not (isinstance(top_k, int) and top_k >= 0):
        raise UserError(f"top_k must be an integer, at least 0, got {checks.shown(top_k)}")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if not (isinstance(value, int | float) and 0 <= value <= 1):
            raise UserError(f"{name} must be in [0, 1], got {checks.shown(value)}")
    if not (isinstance(offset, int) and 0 <= offset < 2**63):
        raise UserError(f"offset must be an integer in [0, 2^63), got {checks.shown(offset)}")
    if rows is not None:
        checks.tensor("rows", rows, "an int64 tensor", torch.int64)
        if rows.shape not in (logits.shape[:1], (len(logits), 2)):
            raise UserError(
                f"rows.shape must be (B,) or (B, 2) with logits' B, got {tuple(rows.shape)} and {tuple(logits.shape)}"
            )
        if rows.device != logits.device:
            raise UserError(f"rows must be on logits' device, got {rows.device} and {logits.device}")


def _sample_cpu(logits, temperature, top_k, top_p, min_p, seed, offset, rows):
    described, kept = described_rows(logits)
    rows = None if rows is None else rows.contiguous()
    ids, log_probs = empty.sample_tokens(logits)
    backend.native.sample_tokens(
        buffer(ids), buffer(log_probs), described, temperature, top_k, top_p, min_p, seed, offset, buffer(rows),
        1 if rows is None else rows.ndim, threads(),
    )  # fmt: skip
    del kept
    return ids, log_probs


sample_op: Op = define(
    "sample_tokens(Tensor logits, float temperature, int top_k, float top_p, float min_p, int seed, int offset, "
    "Tensor? rows) -> (Tensor, Tensor)",
    _sample_cpu,
    lambda logits, *_: empty.sample_tokens(logits),
    triton="sample_tokens.sample",
)
