"""Every op in plain torch, in any floating dtype: the definition that the compiled backends answer to.

Nothing here is clever. In float64 these are the truth that the tests compare with; they are also what runs where
no compiled backend can.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEG_INF = float("-inf")


def _compute(x: Tensor) -> Tensor:
    """float32 for narrow inputs, float64 kept: the precision that all backends accumulate in."""
    return x if x.dtype == torch.float64 else x.float()


def transform_logits(logits: Tensor, temperature: float = 1.0, softcap: float | None = None) -> Tensor:
    """z = softcap · tanh(x / softcap) / temperature (softcapping as in Gemma 2, arXiv 2408.00118)."""
    z = _compute(logits)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def token_logprobs(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, softcap: float | None = None, ignore_index: int = -100
) -> dict[str, Tensor]:
    """log softmax(z) at the label, and statistics of the softmax. logits (..., V), labels (...) -> each (...).

    entropy = -Σ p log p;  mean_logits = Σ z / V;  log_sum_sq_probs = log Σ p² (WPO, arXiv 2406.11827);
    is_top1: the label is the first largest logit. Ignored positions and rows that are all -inf give 0.
    """
    z = transform_logits(logits, temperature, softcap)
    ignored = labels == ignore_index
    empty = (z == NEG_INF).all(-1)
    skip = ignored | empty
    # Skipped rows are replaced before the softmax, so that no NaN of theirs reaches a gradient.
    safe = torch.where(skip.unsqueeze(-1), torch.zeros_like(z), z)
    logp = torch.log_softmax(safe, -1)
    picked = logp.gather(-1, labels.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    p = logp.exp()
    plogp = torch.where(p == 0, torch.zeros_like(p), p * torch.where(p == 0, torch.zeros_like(logp), logp))
    outputs = {
        "log_probs": picked,
        "entropy": -plogp.sum(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * logp.detach(), -1),
    }
    outputs = {name: x.masked_fill(skip, 0) for name, x in outputs.items()}
    outputs["mean_logits"] = z.detach().mean(-1).masked_fill(ignored, 0)
    outputs["is_top1"] = (z.argmax(-1) == labels) & ~skip & ~z.isnan().any(-1)
    return outputs


def token_logratios(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: float = 1.0, ignore_index: int = -100
) -> Tensor:
    """log p(label) - log p0(label) per token: the implicit reward of DPO over beta (arXiv 2305.18290, eq. 5)."""
    policy = token_logprobs(policy_logits, labels, temperature, None, ignore_index)["log_probs"]
    ref = token_logprobs(ref_logits, labels, temperature, None, ignore_index)["log_probs"]
    return policy - ref


def map_statistics(
    rewards: Tensor,
    lam: Tensor,
    center: Tensor | None = None,
    log_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> dict[str, Tensor]:
    """Moments of R - center under p_i ∝ w_i e^{lam·(R_i - center)}; the mean of each over the groups, if any.

    rewards (n, m), lam (m,) or (K, m) -> log_z (), mean (m,), cov (m, m), ess (), max_score (), float64, K leading.
    log_z and its derivatives mean and cov: the dual of MAP, arXiv 2410.19198.
    """
    x = rewards.double() if center is None else rewards.double() - center.double()
    log_w = x.new_zeros(len(x)) if log_weights is None else log_weights.double()
    members = [torch.arange(len(x), device=x.device)]
    if groups is not None:
        members = [(groups == g).nonzero().flatten() for g in groups.unique()]
    found: dict[str, list[Tensor]] = {"log_z": [], "mean": [], "cov": [], "ess": [], "max_score": []}
    for rows in members:
        part, log_part = x[rows], log_w[rows]
        s = lam.double() @ part.T
        log_p = torch.where(log_part == NEG_INF, log_part, s + log_part)
        p = torch.softmax(log_p, -1)
        mean = p @ part
        found["log_z"].append(torch.logsumexp(log_p, -1) - torch.logsumexp(log_part, -1))
        found["mean"].append(mean)
        apart = part - mean.unsqueeze(-2)
        found["cov"].append((p.unsqueeze(-1) * apart).mT @ apart)
        found["ess"].append(1 / p.square().sum(-1))
        found["max_score"].append(s.masked_fill(log_part == NEG_INF, NEG_INF).amax(-1))
    return {name: torch.stack(each).mean(0) for name, each in found.items()}
