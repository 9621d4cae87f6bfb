"""The results of every op, not yet filled: what torch traces with, and what the C++ and Triton kernels write to."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign._base.dtypes import compute_dtype

# Which statistics of the softmax a pass over the logits makes; 0: none.
ENTROPY, ALL = 1, 2


def token_logprobs(logits: Tensor, labels: Tensor, *, statistics: int) -> tuple[Tensor, ...]:
    """log_probs, row_max, row_sum, entropy, mean_logits, log_sum_sq_probs, is_top1; of the last four (..., 0) those
    that are not among the statistics."""
    given, dtype = (labels.shape, (*labels.shape, 0)), compute_dtype(logits.dtype)
    shapes = [given[0]] * 3 + [given[statistics < ENTROPY]] + [given[statistics < ALL]] * 2
    made = [logits.new_empty(shape, dtype=dtype) for shape in shapes]
    return (*made, logits.new_empty(shapes[-1], dtype=torch.bool))


def token_logratios(policy_logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """log p / p0, and the maximum and the sum of the policy's and of the reference's rows."""
    dtype = compute_dtype(policy_logits.dtype)
    return tuple(policy_logits.new_empty(labels.shape, dtype=dtype) for _ in range(5))


def linear_token_logprobs(
    hidden: Tensor, labels: Tensor, *, statistics: int, unit: bool, kept: int = 0
) -> tuple[Tensor, ...]:
    """As token_logprobs; then `kept` elements of tiles, and hidden's gradient if it is made at once."""
    gradient = hidden.new_empty(hidden.shape if unit else 0, dtype=compute_dtype(hidden.dtype))
    tiles = hidden.new_empty(kept, dtype=gradient.dtype)
    return (*token_logprobs(hidden, labels, statistics=statistics), tiles, gradient)


def sample_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """ids and log_probs (B,), of logits (B, V) or of a head's hidden states (B, H)."""
    ids = logits.new_empty(logits.shape[:1], dtype=torch.int64)
    return ids, logits.new_empty(logits.shape[:1], dtype=compute_dtype(logits.dtype))


def shared_attention(q: Tensor, values: Tensor) -> Tensor:
    """(rows, heads, dv) from q (rows, heads, d) and values (..., dv)."""
    return q.new_empty(*q.shape[:2], values.shape[-1])


def shared_attention_prompts(q: Tensor, values: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Each share's output (splits, rows, heads, dv), and the log of its weights' sum (splits, rows, heads)."""
    logs = q.new_empty(splits, *q.shape[:2], dtype=torch.float32)
    return logs.new_empty(*logs.shape, values.shape[-1]), logs


def resample(log_weights: Tensor, k: int) -> Tensor:
    return log_weights.new_empty((log_weights.shape[0], k), dtype=torch.int64)


def gae(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """advantages, returns."""
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


def pairwise_loss(log_probs: Tensor, ref_log_probs: Tensor | None) -> tuple[Tensor, ...]:
    """losses, chosen and rejected rewards, each (B,); the rows' sums and their slopes, each (2B,)."""
    rows, dtype = log_probs.shape[0], pair_dtype(log_probs, ref_log_probs)
    return tuple(log_probs.new_empty(n, dtype=dtype) for n in (*(rows // 2,) * 3, rows, rows))


def pair_dtype(log_probs: Tensor, ref_log_probs: Tensor | None) -> torch.dtype:
    """The type that a preference loss computes in."""
    return compute_dtype(
        log_probs.dtype if ref_log_probs is None else torch.promote_types(log_probs.dtype, ref_log_probs.dtype)
    )


def policy_rows(logprobs: Tensor, ref_logprobs: Tensor | None, importance: str, kl_coef: float) -> tuple[Tensor, ...]:
    """objective, entropy, the other seven figures of each row, shares, scales, and weights of tokens, if any."""
    dtype, (rows, length) = compute_dtype(logprobs.dtype), logprobs.shape
    weighted = importance == "token" or (ref_logprobs is not None and kl_coef != 0)
    shapes = ((rows,), (rows,), (7, rows), (rows,), (rows,), (rows, length) if weighted else (0,))
    return tuple(logprobs.new_empty(shape, dtype=dtype) for shape in shapes)


def value_rows(values: Tensor) -> tuple[Tensor, ...]:
    """objective, the other two figures of each row, and the weights of each token."""
    dtype, rows = compute_dtype(values.dtype), values.shape[0]
    return tuple(values.new_empty(shape, dtype=dtype) for shape in ((rows,), (2, rows), values.shape))


def map_statistics(rewards: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
    """log_z, mean, cov, ess, max_score, with lam's leading dimensions."""
    leading, m = lam.shape[:-1], rewards.shape[1]
    shapes = (leading, (*leading, m), (*leading, m, m), leading, leading)
    return tuple(rewards.new_empty(shape, dtype=torch.float64) for shape in shapes)
