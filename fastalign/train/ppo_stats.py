"""What `PPOTrainer.step` reports, under TRL 0.11's names, and the running moments of scores."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastalign.losses import PolicyLoss, ValueLoss, kl_penalty

# Means over tokens that an optimiser step reports, in the order of their sum over processes.
MEANS = (
    "loss/policy",
    "loss/value",
    "loss/total",
    "policy/entropy",
    "policy/approxkl",
    "policy/policykl",
    "policy/clipfrac",
    "policy/advantages_mean",
    "val/vpred",
    "val/error",
    "val/clipfrac",
)


class Stopwatch:
    """Seconds by part of a step, under TRL's names."""

    began: float
    parts: dict[str, float]

    def __init__(self) -> None:
        self.began, self.parts = time.perf_counter(), {}

    @contextmanager
    def __call__(self, name: str):
        began = time.perf_counter()
        yield
        self.parts[f"time/ppo/{name}"] = time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        return self.parts | {"time/ppo/total": time.perf_counter() - self.began}


class RunningMoments:
    """Mean and deviation of all scores so far (Chan, Golub and LeVeque 1983, parallel updates)."""

    mean: float
    sum_squares: float

    count: int

    def __init__(self) -> None:
        self.count, self.mean, self.sum_squares = 0, 0.0, 0.0  # sum of squares about the mean

    def update(self, scores: Tensor) -> None:
        x = scores.double()
        count, mean = len(x), float(x.mean())
        apart, total = mean - self.mean, self.count + count
        self.sum_squares += float((x - mean).square().sum()) + apart**2 * self.count * count / total
        self.mean += apart * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Unbiased; 1 for a single score."""
        return math.sqrt(self.sum_squares / (self.count - 1)) if self.count > 1 else 1.0


def masked(x: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean and unbiased variance of x over the mask; 0 for the variance of one place."""
    x = x[mask].double()
    return float(x.mean()), float(x.var()) if len(x) > 1 else 0.0


def minibatch_sums(
    policy: PolicyLoss,
    value: ValueLoss,
    total: Tensor,
    new: Any,
    old_logprobs: Tensor,
    advantages: Tensor,
    returns: Tensor,
    mask: Tensor,
) -> Tensor:
    """Each of MEANS times the number of tokens of a mini batch, float64 (len(MEANS),)."""
    logprobs, values, tokens = new.log_probs.detach(), new.values.detach(), mask.sum().double()
    sums = (
        policy.policy_loss * tokens,
        value.loss.detach() * tokens,
        total.detach() * tokens,
        _sum(new.entropy.detach(), mask),
        _sum(kl_penalty(logprobs, old_logprobs, "k2"), mask),
        _sum(kl_penalty(old_logprobs, logprobs, "k1"), mask),
        (policy.clip_low + policy.clip_high) * tokens,
        _sum(advantages, mask),
        _sum(values, mask),
        _sum((values - returns).square(), mask),
        value.clip_fraction * tokens,
    )
    return torch.stack(sums)


def _sum(x: Tensor, mask: Tensor) -> Tensor:
    """Over the mask, without asking a GPU how many places it has."""
    return torch.where(mask, x, 0).double().sum()


def objective(batch: dict[str, Tensor], kl_coef: float) -> dict[str, Any]:
    """Figures of a global batch before any update. Tensors (B, T), 0 where masked; scores (B,)."""
    mask, scores = batch["mask"], batch["scores"]
    kl = batch["kl"].sum(-1)
    stats = {
        "objective/kl": float(kl.mean()),
        "objective/kl_dist": kl.cpu().numpy(),
        "objective/logprobs": batch["logprobs"].cpu().numpy(),
        "objective/ref_logprobs": batch["ref_logprobs"].cpu().numpy(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": float(-batch["logprobs"].sum(-1).mean()),
        "ppo/mean_non_score_reward": masked(-kl_coef * batch["kl"], mask)[0],
        "ppo/mean_scores": float(scores.mean()),
        "ppo/std_scores": float(scores.std()) if len(scores) > 1 else 0.0,
    }
    for name in ("queries", "responses"):
        lengths = batch[f"{name}_lengths"]
        stats[f"tokens/{name}_len_mean"] = float(lengths.mean())
        stats[f"tokens/{name}_len_std"] = float(lengths.std()) if len(lengths) > 1 else 0.0
        stats[f"tokens/{name}_dist"] = lengths.cpu().numpy()
    return stats


def training(batch: dict[str, Tensor], means: np.ndarray, ratios: np.ndarray) -> dict[str, Any]:
    """means (optimiser steps, len(MEANS)); ratios (n,): p_new / p_old of this process's tokens at every pass."""
    stats: dict[str, Any] = {f"ppo/{n}": float(x) for n, x in zip(MEANS, means.mean(0), strict=True)}
    stats["ppo/policy/advantages"] = batch["advantages"][batch["mask"]].cpu().numpy()
    stats["ppo/policy/ratio"] = ratios
    stats["ppo/returns/mean"], variance = masked(batch["returns"], batch["mask"])
    stats["ppo/returns/var"] = variance
    stats["ppo/val/mean"], stats["ppo/val/var"] = masked(batch["values"], batch["mask"])
    stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / variance if variance > 0 else float("nan")
    return stats
