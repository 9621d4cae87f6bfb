"""Advantages of completions drawn in groups, from rewards for several values: GRPO, RLOO and their variants."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign.losses.tokens import wide
from fastalign.ops import checks

HOW = ("grpo", "batch", "dr_grpo", "rloo", "gdpo", "rank")
# TRL's; prevents division by 0 in a group of equal rewards.
STD_FLOOR = 1e-4


def group_advantages(rewards: Tensor, *, weights: Tensor | Sequence[float] | None = None, how: str = "grpo") -> Tensor:
    """How much better each completion is than the others in its group. Constants: no gradient flows to the rewards.

    how, with s = Σ_k weights_k · rewards_k and every standard deviation unbiased:
        "grpo": s less its mean over the group, divided by its standard deviation over the group + 1e-4
            (arXiv 2402.03300, 4.1.2).
        "batch": the same, divided by the standard deviation of s over the whole batch + 1e-4 (arXiv 2508.08221).
        "dr_grpo": the same, not divided (arXiv 2503.20783).
        "rloo": s less its mean over the others in the group (arXiv 2402.14740).
        "gdpo": each value less its mean over the group, divided by its standard deviation over the group + 1e-4; their
            weighted sum, less its mean over the batch, is divided by its standard deviation over the batch + 1e-4
            (arXiv 2601.05242).
        "rank": the weighted sum of each value's rank in its group, from -1 for the lowest to 1 for the highest; equal
            rewards share their mean rank.
    The first three equal TRL's GRPOTrainer with scale_rewards "group", "batch" and "none", "gdpo" with
    multi_objective_aggregation "normalize_then_sum".

    Args:
        rewards: (B, G, m): for each of B prompts, G completions, judged by m values. NaN: not scored. Such a reward has
            no part in sums and statistics, nor has a completion that no value scored, whose advantage is 0.
        weights: (m,) finite, of any sign; None: all 1.
        how: one of the above.

    Returns:
        (B, G), float64 for float64 rewards, else float32. Exactly 0 in groups of equal rewards or one completion.

    Raises:
        UserError, TypeError: another shape or `how`; infinite rewards or weights, or so large that results overflow.

    >>> import torch
    >>> from fastalign import losses
    >>> rewards = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 100.0], [1.0, 100.0]]])  # (1, 4, 2)
    >>> losses.group_advantages(rewards, how="grpo").round(decimals=2)  # the second value drowns the first
    tensor([[-0.8700, -0.8600,  0.8600,  0.8700]])
    >>> losses.group_advantages(rewards, how="gdpo").round(decimals=1) + 0
    tensor([[-1.2000,  0.0000,  0.0000,  1.2000]])
    """
    checks.tensor("rewards", rewards, "a tensor of shape (B, G, m)")
    if rewards.ndim != 3:
        raise UserError(f"rewards must be a tensor of shape (B, G, m), got {tuple(rewards.shape)}")
    checks.among("how", how, HOW)
    rewards = wide(rewards.detach())
    weights = _checked_weights(weights, rewards)
    _refuse(rewards.isinf(), "rewards must be finite, or NaN where not scored, got an infinite one")
    if rewards.numel() == 0:
        return rewards.new_zeros(rewards.shape[:2])
    unscored = rewards.isnan().all(-1)

    def summed(values: Tensor) -> Tensor:
        return (values * weights).nansum(-1).masked_fill(unscored, math.nan)

    if how == "rank":
        advantages = summed(_ranks(rewards))
    elif how == "gdpo":
        scores = summed(_centred(rewards, 1) / (_deviation(rewards, 1) + STD_FLOOR))
        # Their mean is 0: a normalised value's sum over a group is.
        advantages = scores / (_deviation(scores, (0, 1)) + STD_FLOOR)
    else:
        scores = summed(rewards)
        advantages = _centred(scores, 1)
        if how == "rloo":
            count = (~unscored).sum(1, keepdim=True)
            advantages = advantages * count / (count - 1).clamp(min=1)
        elif how != "dr_grpo":
            advantages = advantages / (_deviation(scores, 1 if how == "grpo" else (0, 1)) + STD_FLOOR)
    advantages = advantages.masked_fill(unscored, 0)
    _refuse_overflow(~advantages.isfinite(), advantages.dtype)
    return advantages


def _checked_weights(weights: Tensor | Sequence[float] | None, rewards: Tensor) -> Tensor:
    values = rewards.shape[-1]
    if weights is None:
        return rewards.new_ones(values)
    checks.arrays(weights=weights)
    if not isinstance(weights, Tensor):
        weights = torch.from_numpy(np.array(weights, dtype=np.float64))
    weights = weights.detach().to(rewards)
    if weights.shape != (values,):
        raise UserError(f"weights must have shape ({values},), one per value, got {tuple(weights.shape)}")
    _refuse(~weights.isfinite(), "weights must be finite, got an infinite one or NaN")
    return weights


def _refuse(wrong: Tensor, message: str) -> None:
    """Reads values, so it does nothing while torch traces."""
    if not torch.compiler.is_compiling() and bool(wrong.any()):
        raise UserError(message)


def _refuse_overflow(wrong: Tensor, dtype: torch.dtype) -> None:
    _refuse(wrong, f"rewards must be small enough for weighted sums and variances to fit {dtype}, got larger ones")


def _centred(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """x less its mean, ignoring NaN. The least is taken away first, so that equal numbers give exactly 0."""
    x = x - x.masked_fill(x.isnan(), math.inf).amin(dim, keepdim=True)
    return x - x.nanmean(dim, keepdim=True)


def _deviation(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The unbiased standard deviation, ignoring NaN; 0 for fewer than two numbers."""
    count = (~x.isnan()).sum(dim, keepdim=True)
    variance = _centred(x, dim).square().nansum(dim, keepdim=True) / (count - 1).clamp(min=1)
    _refuse_overflow(variance.isinf(), x.dtype)
    return variance.sqrt()


def _ranks(x: Tensor) -> Tensor:
    """(B, G, m): the share of the others in the group that are lower, less the share that are higher."""
    others = (~x.isnan()).sum(1, keepdim=True) - 1
    return (x[:, :, None] - x[:, None]).sign().nansum(2) / others.clamp(min=1)
