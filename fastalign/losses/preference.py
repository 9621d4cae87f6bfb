"""Preference losses from sequence log-probabilities: DPO and its family, KTO, ORPO, SimPO, CPO.

All arithmetic is in float32 (float64 for float64 inputs). Losses are returned per row, for the caller to average;
rewards carry no gradient. The formulas are in `fastalign.ops.pairwise.TABLE`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign.losses.tokens import check_beside
from fastalign.ops import checks
from fastalign.ops.pairwise import (
    F_DIVERGENCES,
    TABLE,
    Margin,
    Options,
    check_options,
    check_smoothing,
    divergence_margin,
    logistic,
    power_margin,
    power_score,
)

LOSS_TYPES = (*TABLE, "sft")
CPO_LOSS_TYPES = ("sigmoid", "hinge", "ipo", "simpo")
KTO_LOSS_TYPES = ("kto", "apo_zero_unpaired")


class PreferenceLoss(NamedTuple):
    """Each (B,): the loss with its gradient, and the implicit rewards without."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class OddsRatioLoss(NamedTuple):
    """What `orpo_loss` returns, each (B,); log_odds is the log odds ratio of chosen over rejected, without gradient."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    log_odds: Tensor


class KTOLoss(NamedTuple):
    """What `kto_loss` returns, each (B,) in the order of the input; rewards without gradient."""

    losses: Tensor
    rewards: Tensor


def sequence_logps(
    log_probs: Tensor,
    mask: Tensor,
    *,
    average: bool = False,
    ld_alpha: float | None = None,
    shared_lengths: Tensor | None = None,
) -> Tensor:
    """The log-probability of each sequence from those of its tokens.

    Args:
        log_probs: (R, T) per-token log-probabilities; values outside the mask are never read, even if NaN.
        mask: (R, T) bool or integer, nonzero on the completion's tokens.
        average: the mean over a sequence's tokens instead of the sum; a row without tokens gives 0.
        ld_alpha: LD-DPO's length desensitising (arXiv 2409.06411): tokens past the first `shared_lengths` of a
            completion count ld_alpha each, in [0, 1]; 1 changes nothing. None for off.
        shared_lengths: (R,) tokens of each completion that count in full under ld_alpha. None: the rows are
            [chosen; rejected] halves of pairs, and it is the shorter completion's length, as in the paper.

    Returns:
        (R,) float32, float64 for float64 log_probs.

    Raises:
        UserError, TypeError: a shape or option that breaks these rules.
    """
    _check_float("log_probs", log_probs)
    checks.tensor("mask", mask)
    if log_probs.ndim != 2 or mask.shape != log_probs.shape:
        raise UserError(
            "log_probs and mask must have one shape (rows, tokens), "
            f"got {tuple(log_probs.shape)} and {tuple(mask.shape)}"
        )
    mask = mask != 0
    kept = _wide(log_probs).masked_fill(~mask, 0)
    if ld_alpha is None:
        total = kept.sum(-1)
        return total / mask.sum(-1).clamp(min=1) if average else total
    if average:
        raise UserError("average must be False if ld_alpha is given: LD-DPO is defined on sums")
    checks.numbers(ld_alpha=ld_alpha)
    if not 0 <= ld_alpha <= 1:
        raise UserError(f"ld_alpha must be in [0, 1], got {ld_alpha!r}")
    if shared_lengths is None:
        chosen, rejected = _halves("mask", mask.sum(-1))
        shared_lengths = torch.minimum(chosen, rejected).repeat(2)
    _check_extras(mask.shape[:1], shared_lengths=shared_lengths)
    tail = mask.cumsum(-1) > shared_lengths.unsqueeze(-1)
    return torch.where(tail, ld_alpha * kept, kept).sum(-1)


def wpo_weights(log_probs: Tensor, log_sum_sq_probs: Tensor, mask: Tensor) -> Tensor:
    """WPO's weight of each pair (arXiv 2406.11827, eq. 2, with its sampled alignment): both sequences' probability.

    exp of the mean over tokens of log p - log sum p², times the other sequence's. No gradient.

    Args:
        log_probs, log_sum_sq_probs: (2B, T), rows [chosen; rejected], as `token_logprobs` gives them.
        mask: (2B, T), nonzero on the completion's tokens.

    Returns:
        (B,) weights for `dpo_loss(weights=)`.
    """
    for name, x in (("log_probs", log_probs), ("log_sum_sq_probs", log_sum_sq_probs)):
        _check_float(name, x)
        check_beside(name, x, log_probs, "log_probs")
    aligned = _wide(log_probs.detach()) - _wide(log_sum_sq_probs.detach())
    chosen, rejected = _halves("log_probs", sequence_logps(aligned, mask, average=True))
    return chosen.exp() * rejected.exp()


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    *,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    sft_logps: Tensor | None = None,
    weights: Tensor | None = None,
) -> PreferenceLoss:
    """DPO (arXiv 2305.18290) and every loss type of TRL's DPOTrainer, from sequence log-probabilities.

    Args:
        policy_chosen_logps, policy_rejected_logps: (B,) log pi(y|x), summed over the completion's tokens.
        ref_chosen_logps, ref_rejected_logps: (B,) the same under the reference model; both None for reference-free.
        beta: strength of the penalty for leaving the reference; IPO's tau; hinge's reciprocal margin.
        loss_type: one of LOSS_TYPES, or several (MPO, arXiv 2411.10442): their sum by `loss_weights`.
        loss_weights: one weight per loss type; None: 1 each.
        label_smoothing: the chance that a label is flipped, in [0, 1): for sigmoid and sigmoid_norm (cDPO; TRL's
            trainer ignores it there), aot, aot_unpaired, robust (below 0.5) and exo_pair (above 0). Others ignore it.
        f_divergence_type: reverse_kl, forward_kl, js_divergence or alpha_divergence (f-DPO, arXiv 2309.16240), for
            the losses of the reward difference: sigmoid, sigmoid_norm, hinge, ipo, exo_pair, robust, discopop, sft.
        f_alpha_divergence_coef: alpha of the alpha-divergence.
        discopop_tau: temperature of discopop.
        chosen_lengths, rejected_lengths: (B,) tokens per completion, for ipo and sigmoid_norm; the first for sft.
        sft_logps: (B,) chosen log-probabilities for sft, where the first argument was length-desensitised.
        weights: (B,) factor of each pair's loss (`wpo_weights`); not with aot or aot_unpaired, which sort the batch.

    Returns:
        PreferenceLoss. The rewards are beta times the log-ratios. sft, a mean over all chosen tokens of the batch, is
        the same number in each row.

    Raises:
        UserError, TypeError: a shape or option that breaks these rules.

    >>> import torch
    >>> from fastalign import losses
    >>> chosen, rejected = torch.tensor([-10.0]), torch.tensor([-12.0])
    >>> loss, better, worse = losses.dpo_loss(chosen, rejected, chosen - 1, rejected, beta=0.1)
    >>> loss, better, worse
    (tensor([0.6444]), tensor([0.1000]), tensor([0.]))
    """
    kinds, factors = _loss_types(loss_type, loss_weights)
    for name, x in (("beta", beta), ("discopop_tau", discopop_tau)):
        checks.positive(name, x)
    checks.numbers(label_smoothing=label_smoothing, f_alpha_divergence_coef=f_alpha_divergence_coef)
    options = Options(beta, label_smoothing, discopop_tau)
    check_options(kinds, options)
    _check_divergence(kinds, f_divergence_type)
    vectors: dict[str, Any] = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
    }
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        raise UserError("ref_chosen_logps and ref_rejected_logps must both be tensors or both None")
    if ref_chosen_logps is not None:
        vectors |= {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
    _check_vectors(vectors)
    batch = policy_chosen_logps.shape
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    _check_extras(batch, **lengths, sft_logps=sft_logps, weights=weights)
    if weights is not None and not {"aot", "aot_unpaired"}.isdisjoint(kinds):
        raise UserError("weights must be None for aot and aot_unpaired, which sort the batch and so separate the pairs")

    chosen, rejected = _wide(policy_chosen_logps), _wide(policy_rejected_logps)
    if ref_chosen_logps is None or ref_rejected_logps is None:
        ref_chosen, ref_rejected = torch.zeros_like(chosen), torch.zeros_like(rejected)
    else:
        ref_chosen, ref_rejected = _wide(ref_chosen_logps), _wide(ref_rejected_logps)
    c, r = chosen - ref_chosen, rejected - ref_rejected
    divergence = (f_divergence_type, f_alpha_divergence_coef)

    losses = torch.zeros_like(c)
    for kind, factor in zip(kinds, factors, strict=True):
        if kind == "sft":
            losses = losses + factor * _sft(chosen if sft_logps is None else _wide(sft_logps), chosen_lengths)
            continue
        row = TABLE[kind]
        if row.margin is Margin.DIFFERENCE:
            margin = divergence_margin(c, r, *divergence)
        elif row.margin is Margin.PER_TOKEN:
            lengths = _lengths(kind, c.dtype, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
            margin = divergence_margin(c, r, *divergence, *lengths)
        elif row.margin is Margin.SORTED_PAIRS:
            margin = (chosen - rejected).sort(0).values - (ref_chosen - ref_rejected).sort(0).values
        else:
            margin = c.sort(0).values - r.sort(0).values
        losses = losses + factor * row.formula(c, r, margin, options)
    if weights is not None:
        losses = losses * _wide(weights)
    return PreferenceLoss(losses, beta * c.detach(), beta * r.detach())


def kto_loss(
    policy_logps: Tensor,
    ref_logps: Tensor | None,
    desirable: Tensor,
    kl: Tensor | float = 0.0,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
) -> KTOLoss:
    """KTO (arXiv 2402.01306, eq. 7): unpaired completions, each labelled desirable or not.

    w · (1 - sigmoid(s · beta · (log-ratio - kl))), s = +1 if desirable, else -1.

    Args:
        policy_logps, ref_logps: (B,) log-probabilities of the completions; ref None for reference-free.
        desirable: (B,) bool.
        kl: the reference point, a number or a tensor () as returned by `kto_kl`; without gradient. Used by "kto" only.
        desirable_weight, undesirable_weight: w of each side.
        loss_type: "kto", or "apo_zero_unpaired" (arXiv 2408.06266, eq. 7, unpaired), whose reference point is 0.

    Raises:
        UserError, TypeError: a shape or option that breaks these rules.
    """
    checks.positive("beta", beta)
    checks.among("loss_type", loss_type, KTO_LOSS_TYPES)
    _check_vectors({"policy_logps": policy_logps} | ({} if ref_logps is None else {"ref_logps": ref_logps}))
    checks.tensor("desirable", desirable)
    checks.tensor("desirable", desirable, "bool", torch.bool)
    _check_extras(policy_logps.shape, desirable=desirable)
    checks.numbers(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    if not isinstance(kl, Tensor):
        checks.numbers(kl=kl)
    ratio = _wide(policy_logps)
    if ref_logps is not None:
        ratio = ratio - _wide(ref_logps)
    if loss_type == "kto":
        above = ratio - (kl.detach().to(ratio.dtype) if isinstance(kl, Tensor) else kl)
    else:
        above = ratio
    worth = beta * torch.where(desirable, above, -above)
    weight = torch.full_like(ratio, undesirable_weight).masked_fill(desirable, desirable_weight)
    return KTOLoss(weight * (-worth).sigmoid(), beta * ratio.detach())


def kto_kl(policy_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KTO's reference point: max(0, mean of log pi - log pi0) over completions paired with others' prompts.

    policy_logps, ref_logps (B,) -> () without gradient (arXiv 2402.01306, section 4.2).
    """
    _check_vectors({"policy_logps": policy_logps, "ref_logps": ref_logps})
    return (_wide(policy_logps.detach()) - _wide(ref_logps.detach())).mean().clamp(min=0)


def cpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
    chosen_nll: Tensor | None = None,
    cpo_alpha: float = 1.0,
) -> PreferenceLoss:
    """CPO (arXiv 2401.08417, eq. 3): a reference-free preference loss and a likelihood term on the chosen.

    Args:
        policy_chosen_logps, policy_rejected_logps: (B,) summed log-probabilities for "sigmoid" and "hinge", averaged
            over tokens for "ipo" and "simpo".
        loss_type: sigmoid, hinge, ipo or simpo, the last with a target margin simpo_gamma.
        label_smoothing: for sigmoid and simpo, in [0, 1).
        alpha: AlphaPO's reward (1 - p^-alpha) / alpha in place of log p (arXiv 2501.03884); 0 for off.
        chosen_nll: () or (B,) negative log-likelihood of the chosen, added cpo_alpha times; None for none.

    Returns:
        PreferenceLoss; the rewards are beta times the log-probabilities (AlphaPO's rewards if alpha is not 0).

    Raises:
        UserError, TypeError: a shape or option that breaks these rules.
    """
    checks.positive("beta", beta)
    checks.among("loss_type", loss_type, CPO_LOSS_TYPES)
    checks.numbers(label_smoothing=label_smoothing, simpo_gamma=simpo_gamma, alpha=alpha, cpo_alpha=cpo_alpha)
    check_smoothing(label_smoothing)
    _check_vectors({"policy_chosen_logps": policy_chosen_logps, "policy_rejected_logps": policy_rejected_logps})
    _check_nll(chosen_nll, policy_chosen_logps.shape)
    chosen, rejected = _wide(policy_chosen_logps), _wide(policy_rejected_logps)
    margin = power_margin(chosen, rejected, -alpha)
    if loss_type == "simpo":
        margin, loss_type = margin - simpo_gamma / beta, "sigmoid"
    losses = TABLE[loss_type].formula(chosen, rejected, margin, Options(beta, label_smoothing))
    if chosen_nll is not None:
        losses = losses + cpo_alpha * chosen_nll
    rewards = (beta * power_score(x.detach(), -alpha) for x in (chosen, rejected))
    return PreferenceLoss(losses, *rewards)


def simpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
) -> PreferenceLoss:
    """SimPO (arXiv 2405.14734, eq. 6): -log sigmoid(beta · (mean log p+ - mean log p-) - gamma), reference-free.

    policy_chosen_logps, policy_rejected_logps: (B,) log-probabilities averaged over tokens. alpha: AlphaPO's reward
    shape (arXiv 2501.03884), 0 for off. Raises UserError, TypeError on shapes and options that break these rules.

    >>> import torch
    >>> from fastalign import losses
    >>> losses.simpo_loss(torch.tensor([-1.0]), torch.tensor([-2.0]), beta=2.0, gamma=0.5)
    PreferenceLoss(losses=tensor([0.2014]), chosen_rewards=tensor([-2.]), rejected_rewards=tensor([-4.]))
    """
    checks.numbers(gamma=gamma)
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "simpo_gamma": gamma, "alpha": alpha}
    return cpo_loss(policy_chosen_logps, policy_rejected_logps, beta=beta, loss_type="simpo", **options)


def orpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    chosen_nll: Tensor | None = None,
) -> OddsRatioLoss:
    """ORPO (arXiv 2403.07691, eq. 4, 6, 7): chosen_nll - beta · log sigmoid(log odds ratio), reference-free.

    Args:
        policy_chosen_logps, policy_rejected_logps: (B,) log-probabilities averaged over tokens, at most 0. A
        probability of exactly 1 is taken as 1 minus the smallest normal number.
        chosen_nll: () or (B,) negative log-likelihood of the chosen, the paper's L_SFT; None for the odds term alone.

    Raises:
        UserError, TypeError: a shape or option that breaks these rules.
    """
    checks.positive("beta", beta)
    _check_vectors({"policy_chosen_logps": policy_chosen_logps, "policy_rejected_logps": policy_rejected_logps})
    _check_nll(chosen_nll, policy_chosen_logps.shape)
    chosen, rejected = _wide(policy_chosen_logps), _wide(policy_rejected_logps)
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    losses = beta * logistic(log_odds)
    if chosen_nll is not None:
        losses = losses + chosen_nll
    return OddsRatioLoss(losses, beta * chosen.detach(), beta * rejected.detach(), log_odds.detach())


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, by the accurate branch on each side (Maechler 2012); each branch gets only its own
    inputs."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    close = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, close, far)


def _sft(chosen_logps: Tensor, chosen_lengths: Tensor | None) -> Tensor:
    """Mean negative log-likelihood per chosen token of the batch, the same in each row."""
    if chosen_lengths is None:
        raise UserError("chosen_lengths must be given for loss_type 'sft'")
    return (-chosen_logps.sum() / chosen_lengths.sum().clamp(min=1)).expand(chosen_logps.shape)


def _lengths(kind: str, dtype: torch.dtype, **lengths: Tensor | None) -> list[Tensor]:
    result = []
    for name, value in lengths.items():
        if value is None:
            raise UserError(f"{name} must be given for loss_type {kind!r}")
        result.append(value.to(dtype).clamp(min=1))
    return result


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _halves(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    if len(x) % 2:
        raise UserError(f"{name} must have an even number of rows, chosen then rejected, got {len(x)}")
    return x[: len(x) // 2], x[len(x) // 2 :]


def _loss_types(loss_type, loss_weights) -> tuple[tuple[str, ...], tuple[float, ...]]:
    kinds = (loss_type,) if isinstance(loss_type, str) or not isinstance(loss_type, Sequence) else tuple(loss_type)
    if not kinds:
        raise UserError("loss_type must name at least one loss, got none")
    for kind in kinds:
        checks.among("loss_type", kind, LOSS_TYPES)
    if loss_weights is not None and (isinstance(loss_weights, str) or not hasattr(loss_weights, "__len__")):
        raise UserError(f"loss_weights must be one number per loss type, got {checks.shown(loss_weights)}")
    factors = (1.0,) * len(kinds) if loss_weights is None else tuple(loss_weights)
    if len(factors) != len(kinds):
        raise UserError(f"loss_weights must have one weight per loss type, {len(kinds)}, got {len(factors)}")
    for factor in factors:
        checks.numbers(loss_weights=factor)
    return kinds, factors


def _check_divergence(kinds, f_divergence_type) -> None:
    checks.among("f_divergence_type", f_divergence_type, F_DIVERGENCES)
    if f_divergence_type != "reverse_kl":
        for kind in kinds:
            if kind != "sft" and not TABLE[kind].takes_f_divergence:
                raise UserError(
                    f"f_divergence_type must be 'reverse_kl' for loss_type {kind!r}, which is not a function of the "
                    f"reward difference alone, got {f_divergence_type!r}"
                )


def _check_float(name: str, x: Tensor) -> None:
    checks.tensor(name, x)
    checks.tensor(name, x, "floating point", "floating")


def _check_vectors(vectors: dict[str, Tensor]) -> None:
    first, *_ = vectors.values()
    for name, x in vectors.items():
        _check_float(name, x)
        if x.ndim != 1 or x.shape != first.shape:
            raise UserError(f"{', '.join(vectors)} must have one shape (B,), got {tuple(x.shape)} for {name}")


def _check_nll(nll: Any, batch: torch.Size) -> None:
    if isinstance(nll, Tensor) and nll.ndim:
        _check_extras(batch, chosen_nll=nll)
    elif nll is not None:
        checks.numbers(chosen_nll=nll)


def _check_extras(batch: torch.Size, **extras: Tensor | None) -> None:
    for name, x in extras.items():
        if x is None:
            continue
        checks.tensor(name, x)
        if x.shape != batch:
            raise UserError(f"{name} must have shape {tuple(batch)}, got {tuple(x.shape)}")
