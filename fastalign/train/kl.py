"""The KL to the reference in PPO: the coefficient's controllers, and the penalty per token."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.losses import kl_penalty
from fastalign.models.head import Head
from fastalign.reference import transform_logits

TOKENS_AT_ONCE = 128  # rows for the exact KL: two tiles of logits, 50 MB in total for 49,152 entries


class FixedKLController:
    """A constant coefficient."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, current: float, n_steps: int) -> None:
        pass


class AdaptiveKLController:
    """A coefficient that follows the KL: value ← value · (1 + clip(KL / target - 1, ±0.2) · n / horizon).

    Source: Ziegler et al., "Fine-tuning language models from human preferences", arXiv 1909.08593, section 2.2.
    """

    value: float
    target: float
    horizon: float

    def __init__(self, init_kl_coef: float, target: float, horizon: float):
        self.value, self.target, self.horizon = init_kl_coef, target, horizon

    def update(self, current: float, n_steps: int) -> None:
        """current: KL in nats per response, over n_steps responses."""
        error = min(max(current / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon


def token_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """The penalty on each token from the two models' log-probabilities of it: "kl", "abs" or "mse"."""
    if kind == "mse":
        return kl_penalty(logprobs, ref_logprobs, "k2")
    apart = kl_penalty(logprobs, ref_logprobs, "k1")
    return apart.abs() if kind == "abs" else apart


@torch.no_grad()
def exact_kl(hidden: Tensor, head: Head, ref_hidden: Tensor, ref_head: Head) -> Tensor:
    """KL(policy, reference) = Σ_v p log(p / p_ref) at each of n positions, for a few rows of logits at a time.

    hidden (n, H), ref_hidden (n, H') -> (n,) float32, float64 for float64.
    """
    parts = []
    for rows, ref_rows in zip(hidden.split(TOKENS_AT_ONCE), ref_hidden.split(TOKENS_AT_ONCE), strict=True):
        logp, ref_logp = (_logits(h, w).log_softmax(-1) for h, w in ((rows, head), (ref_rows, ref_head)))
        p = logp.exp()
        parts.append((p * torch.where(p > 0, logp - ref_logp, 0)).sum(-1))
    return torch.cat(parts) if parts else hidden.new_zeros(0)


def _logits(hidden: Tensor, head: Head) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    h = hidden.to(dtype)
    logits = h @ head.weight.to(dtype).T
    if head.adapter is not None:
        a, b, scale = head.adapter
        logits = logits + scale * (h @ a.to(dtype).T) @ b.to(dtype).T
    if head.bias is not None:
        logits = logits + head.bias.to(dtype)
    return transform_logits(logits * head.logit_scale, softcap=head.softcap)
