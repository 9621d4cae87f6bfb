"""Policy-gradient losses from per-token log-probabilities: PPO, GRPO and its variants, RLOO; and their building blocks.

All arithmetic is in float32 (float64 for float64 inputs). Old and reference log-probabilities, advantages and returns
are constants: no gradient flows to them. Masked tokens are never read, even if NaN, and rows without a valid token add
0 and no gradient. Ratios are clipped before they are exponentiated, so a log-ratio of 10^4 gives the loss's limit and a
finite gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign.losses.tokens import aggregate, check_aggregation, check_beside, check_tokens, valid, wide
from fastalign.ops import checks
from fastalign.ops.policy import KL, Clip, PolicyRows, Tokens, kl_estimate, policy_rows, value_rows

KL_ESTIMATORS = ("k1", "k2", "k3")
GRPO_LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "gspo", "luspo", "cispo", "sapo", "vespo")


class PolicyLoss(NamedTuple):
    """What the policy losses return. `loss` alone carries a gradient; all but `rows` are 0-dimensional."""

    loss: Tensor  # policy_loss + kl_coef · the KL term - entropy_coef · entropy
    policy_loss: Tensor
    kl: Tensor | None  # to the reference, mean over tokens; None without ref_logprobs
    entropy: Tensor | None  # mean over tokens; None where not given
    approx_kl: Tensor  # KL(old, new) by k3, mean over tokens
    ratio: Tensor  # mean of the importance ratio
    clip_low: Tensor  # share of ratios below the clip range with a negative advantage
    clip_high: Tensor  # share of ratios above it with a positive one
    rows: PolicyRows  # the sums per row of which these are made
    weight: Tensor | None = None  # "vespo": mean of φ(w) over rows


class ValueLoss(NamedTuple):
    """What `value_loss` returns, 0-dimensional; `clip_fraction` is the share of tokens at which the clipped error is
    used."""

    loss: Tensor
    clip_fraction: Tensor


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """An estimate of KL(policy, reference) at each token drawn from the policy, with d = log p - log p_ref.

    k1 = d: unbiased. k2 = d²/2: biased, and its gradient is the KL's. k3 = e^{-d} - 1 + d: unbiased, at least 0, as in
    GRPO (arXiv 2402.03300, eq. 4). After J. Schulman, "Approximating KL divergence", 2020.

    Args:
        logprobs, ref_logprobs: (...) of one shape. The reference is a constant.
        estimator: "k1", "k2" or "k3".

    Returns:
        (...) float32, float64 for float64 logprobs.

    Raises:
        UserError: another estimator, or shapes that differ.
    """
    _check_estimator(estimator)
    checks.tensors(logprobs=logprobs, ref_logprobs=ref_logprobs)
    check_beside("ref_logprobs", ref_logprobs, logprobs)
    d = wide(logprobs)
    return kl_estimate(d - ref_logprobs.detach().to(d.dtype), estimator)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """x divided by the standard deviation (unbiased, + 1e-8 under the root) of its valid tokens, 0 elsewhere.

    Args:
        x: (B, T) or any shape; mask: the same, bool or 0/1.
        shift_mean: False keeps the mean.

    Returns:
        Like x, float32 or float64. A single valid token, or equal ones, have no deviation: 0 (or the mean, if it is
        kept).

    >>> import torch
    >>> from fastalign import losses
    >>> losses.whiten(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[True, True, True]])).round(decimals=3)
    tensor([[-1.,  0.,  1.]])
    """
    checks.tensor("x", x)
    x = wide(x)
    mask = valid(mask, x, "x")
    count = mask.sum().clamp(min=1)
    mean = x.masked_fill(~mask, 0).sum() / count
    apart = (x - mean).masked_fill(~mask, 0)
    variance = apart.square().sum() / (count - 1).clamp(min=1)
    whitened = apart * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else (whitened + mean).masked_fill(~mask, 0)


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    aggregation: str = "token_mean",
    normalizer: Tensor | float | None = None,
) -> PolicyLoss:
    """PPO's clipped objective, -min(r A, clip(r, 1 - clip_range, 1 + clip_range_high) A) per token (arXiv 1707.06347,
    eq. 7), with r = p_new / p_old.

    Args:
        logprobs: (B, T) of the tokens under the policy, with a gradient.
        old_logprobs: (B, T) under the policy that drew them; None: `logprobs` itself, the first step after sampling.
        advantages: (B, T), or (B,), one per sequence. Weights >= 0 per token (an importance correction for another
            sampler, a mask of some tokens) may be multiplied into them.
        mask: (B, T) bool or 0/1, 1 on completion tokens.
        clip_range, clip_range_high: how far r may fall and rise; None: the same as clip_range (DAPO's clip-higher,
            arXiv 2503.14476, takes 0.28).
        dual_clip: c > 1 + clip_range_high: under a negative advantage r counts at most c (arXiv 1912.09729).
        ref_logprobs, kl_coef, kl_estimator: adds kl_coef times `kl_penalty`, aggregated like the objective.
        entropy, entropy_coef: (B, T); subtracts entropy_coef times its mean over tokens from the loss.
        aggregation: "token_mean", "seq_mean_token_mean" (mean over rows of each row's mean; rows without tokens count
            as 0) or "seq_mean_token_sum".
        normalizer: with "token_mean", divides the sum over tokens instead of their number.

    Returns:
        PolicyLoss.

    Raises:
        UserError, TypeError: a shape or option that breaks these rules.

    >>> import torch
    >>> from fastalign import losses
    >>> x = torch.zeros(1, 2)
    >>> losses.ppo_loss(x, x, torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool)).loss
    tensor(-2.)
    """
    batch = _Batch(logprobs, old_logprobs, advantages, mask, ref_logprobs, entropy)
    kl = batch.penalty(kl_coef, kl_estimator)
    clip = _clip(clip_range, clip_range_high, dual_clip)
    return batch.finish(batch.clipped("token", clip, kl), "token", entropy_coef, aggregation, normalizer)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_type: str = "dapo",
    importance: str | None = None,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_bias_correction: bool = False,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    normalizer: Tensor | float | None = None,
    max_length: int | None = None,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    vespo_positive: tuple[float, float] = (2.0, 3.0),
    vespo_negative: tuple[float, float] = (3.0, 2.0),
) -> PolicyLoss:
    """GRPO (arXiv 2402.03300, eq. 3) and its variants, equal to TRL's GRPOTrainer.

    loss_type, with r the importance ratio and A the advantage (`group_advantages`):
        "grpo": PPO's clipped term, mean over rows of each row's mean.
        "bnpo": the same, mean over the batch's tokens.
        "dapo": the same over `normalizer` tokens, those of the whole batch that a step accumulates (arXiv 2503.14476).
        "dr_grpo": the same over B · max_length (arXiv 2503.20783).
        "gspo": "grpo" with one ratio a sequence, r = exp(mean log-ratio) (arXiv 2507.18071, eq. 7).
        "luspo": "gspo" with each row's term times its length (arXiv 2602.05261).
        "cispo": -min(r, clip_range_high) A log p, the weight a constant (arXiv 2506.13585); over `normalizer`.
        "sapo": -4/τ sigmoid(τ (r - 1)) A, τ = sapo_temperatures for A > 0 and the rest (arXiv 2511.20347); as "grpo".
        "vespo": -φ(w) A log p, φ(w) = w^k exp(λ (1 - w)) a constant, w the sequence's whole ratio, (k, λ) =
            vespo_positive for A >= 0, else vespo_negative (arXiv 2602.10693); over `normalizer`.

    Args:
        logprobs, old_logprobs, advantages, mask, entropy, entropy_coef: as in `ppo_loss`. "vespo" takes advantages (B,)
            without weights.
        importance: "token" or "sequence": r of each token, or of the sequence as in GSPO. None: "sequence" for
            "gspo" and "luspo", else "token".
        clip_range, clip_range_high, dual_clip: as in `ppo_loss` (TRL's epsilon, epsilon_high, delta). "cispo" must be
            given clip_range_high, the largest ratio itself.
        ref_logprobs, kl_coef, kl_estimator: as in `ppo_loss` (TRL's beta with k3).
        kl_bias_correction: multiplies the KL estimate by r (arXiv 2512.02556).
        normalizer: tokens of the whole batch for "dapo", "cispo" and "vespo"; None: those of this call.
        max_length: the maximum length of a completion, for "dr_grpo".

    Returns:
        PolicyLoss.

    Raises:
        UserError, TypeError: a shape or option that breaks these rules.
    """
    checks.among("loss_type", loss_type, GRPO_LOSS_TYPES)
    importance = importance or ("sequence" if loss_type in ("gspo", "luspo") else "token")
    if importance not in ("token", "sequence"):
        raise UserError(f"importance must be token or sequence, got {importance!r}")
    if normalizer is not None and loss_type not in ("dapo", "cispo", "vespo"):
        raise UserError(f"normalizer must be None unless loss_type is dapo, cispo or vespo, got {loss_type!r}")
    if loss_type == "dr_grpo" and not (isinstance(max_length, int) and max_length >= 1):
        raise UserError(f"max_length must be a positive integer for loss_type 'dr_grpo', got {max_length!r}")
    if loss_type == "cispo" and clip_range_high is None:
        raise UserError("clip_range_high must be given for loss_type 'cispo': the largest ratio itself, such as 5.0")
    batch = _Batch(logprobs, old_logprobs, advantages, mask, ref_logprobs, entropy)
    kl = batch.penalty(kl_coef, kl_estimator, kl_bias_correction)
    importance = "token" if importance == "token" else "mean"
    if loss_type == "cispo" and clip_range_high is not None:
        checks.numbers(clip_range_high=clip_range_high)
        rows = batch.capped(importance, clip_range_high, kl)
    elif loss_type == "sapo":
        _check_pairs(sapo_temperatures=sapo_temperatures)
        rows = batch.softly_gated(importance, *sapo_temperatures, kl)
    elif loss_type == "vespo":
        _check_pairs(vespo_positive=vespo_positive, vespo_negative=vespo_negative)
        rows = batch.gamma_weighted(importance, vespo_positive, vespo_negative, kl)
    else:
        rows = batch.clipped(importance, _clip(clip_range, clip_range_high, dual_clip), kl)
    how = {
        "grpo": "seq_mean_token_mean",
        "gspo": "seq_mean_token_mean",
        "sapo": "seq_mean_token_mean",
        "luspo": "seq_mean_token_sum",
    }.get(loss_type, "token_mean")
    if loss_type == "dr_grpo" and max_length is not None:
        normalizer = max(len(logprobs), 1) * max_length
    return batch.finish(rows, importance, entropy_coef, how, normalizer)


def rloo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
) -> PolicyLoss:
    """RLOO's loss (arXiv 2402.14740) with PPO's clip on the ratio of whole sequences, as TRL's RLOOTrainer.

    The completion is one action: r = exp(Σ_t log-ratio), -min(r A, clip(r) A), mean over rows. Its KL penalty goes
    into the rewards. Arguments as in `ppo_loss`, advantages (B,) from
    `group_advantages` with how "rloo".
    """
    batch = _Batch(logprobs, old_logprobs, advantages, mask)
    if batch.advantages.shape[1] != 1:
        raise UserError(f"advantages must have shape (B,), got {tuple(advantages.shape)}")
    rows = batch.clipped("sum", _clip(clip_range, clip_range_high, None), KL())
    return batch.finish(rows, "sum", 0.0, "seq_mean_token_mean", None)


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float | None = 0.2,
    aggregation: str = "token_mean",
) -> ValueLoss:
    """½ max((V - R)², (clip(V, V_old ± clip_range) - R)²), PPO's value loss with its clip (arXiv 2005.12729, section
    3).

    Args:
        values: (B, T) with a gradient; old_values: (B, T) at the time the advantages were computed, a constant.
        returns: (B, T), as `ops.gae` gives them.
        mask: (B, T) bool or 0/1.
        clip_range: None: ½ (V - R)², and old_values may be None.
        aggregation: as in `ppo_loss`.

    Returns:
        ValueLoss.

    Raises:
        UserError, TypeError: a shape or option that breaks these rules.
    """
    check_tokens("values", values)
    mask = valid(mask, values, "values")
    checks.tensor("returns", returns)
    check_beside("returns", returns, values, "values")
    check_aggregation(aggregation)
    if clip_range is not None:
        checks.numbers(clip_range=clip_range)
    if clip_range is None:
        old_values, clip_range = None, math.inf
    elif not clip_range > 0:
        raise UserError(f"clip_range must be positive or None, got {clip_range!r}")
    elif old_values is None:
        raise UserError("old_values must be given unless clip_range is None")
    check_beside("old_values", old_values, values, "values")
    rows = value_rows(values, old_values, returns, mask, clip_range)
    fraction = rows.clipped.sum() / rows.tokens.sum().clamp(min=1)
    return ValueLoss(aggregate(rows.objective, rows.tokens, aggregation), fraction)


class _Batch:
    """The checked tensors of one loss, and the basic losses from which all others are composed."""

    def __init__(self, logprobs, old_logprobs, advantages, mask, ref_logprobs=None, entropy=None):
        check_tokens("logprobs", logprobs)
        self.logprobs, self.mask = logprobs, valid(mask, logprobs, "logprobs")
        given = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "entropy": entropy}
        for name, x in given.items():
            check_beside(name, x, logprobs)
        self.old_logprobs, self.ref_logprobs, self.entropy = given.values()
        self.advantages = self._advantages(advantages)
        self.weight: Tensor | None = None

    def _advantages(self, x: Tensor) -> Tensor:
        """(B, 1) or (B, T)."""
        checks.tensor("advantages", x)
        rows, length = self.mask.shape
        if x.shape not in ((rows,), (rows, 1), (rows, length)):
            raise UserError(f"advantages must have shape ({rows},) or ({rows}, {length}), got {tuple(x.shape)}")
        return x if x.ndim == 2 else x.unsqueeze(1)

    def penalty(self, coef: float, estimator: str, times_ratio: bool = False) -> KL:
        checks.numbers(kl_coef=coef)
        if self.ref_logprobs is not None:
            _check_estimator(estimator)
        elif coef != 0:
            raise UserError(f"ref_logprobs must be given if kl_coef is not 0, got None and {coef!r}")
        return KL(coef, estimator, times_ratio)

    def clipped(self, importance: str, clip: Clip, kl: KL) -> PolicyRows:
        """-min(r A, clip(r) A): under A >= 0, r counts at most 1 + high; under A < 0, at least 1 - low, at most cap."""
        return policy_rows(
            self.logprobs,
            self.old_logprobs,
            self.advantages,
            self.mask,
            self.ref_logprobs,
            self.entropy,
            importance,
            clip,
            kl,
        )

    def capped(self, importance: str, largest: float, kl: KL) -> PolicyRows:
        """-min(r, largest) A log p, the weight a constant."""
        tokens, log_ratio = self._tokens(importance)
        weight = log_ratio.detach().clamp(max=_log(largest)).exp()
        losses = -weight * tokens.advantages * tokens.logprobs
        return tokens.rows(losses, log_ratio, Clip(-math.inf, _log(largest)), self.ref_logprobs, self.entropy, kl)

    def softly_gated(self, importance: str, positive: float, negative: float, kl: KL) -> PolicyRows:
        """-4/τ sigmoid(τ (r - 1)) A."""
        for x in (positive, negative):
            if not x > 0:
                raise UserError(f"sapo_temperatures must be positive, got {(positive, negative)!r}")
        tokens, log_ratio = self._tokens(importance)
        temperature = _by_sign(tokens.advantages > 0, positive, negative, tokens.advantages)
        # The gate is 1 long before e^40, and its gradient there is 0 and not 0 · inf.
        ratio = log_ratio.clamp(max=40).exp()
        losses = -4 / temperature * torch.sigmoid(temperature * (ratio - 1)) * tokens.advantages
        return tokens.rows(losses, log_ratio, None, self.ref_logprobs, self.entropy, kl)

    def gamma_weighted(self, importance: str, positive, negative, kl: KL) -> PolicyRows:
        """-φ(w) A log p, φ(w) a constant, with TRL's bounds on the logarithms."""
        if self.advantages.shape[1] != 1:
            shape = tuple(self.advantages.shape)
            raise UserError(f"advantages must have shape (B,) for loss_type 'vespo', got {shape}")
        tokens, log_ratio = self._tokens(importance)
        log_w = tokens.log_ratio.detach().clamp(-20, 20).sum(-1, keepdim=True).clamp(math.log(1e-8), 20)
        up = tokens.advantages >= 0
        k, rate = (_by_sign(up, p, n, tokens.advantages) for p, n in zip(positive, negative, strict=True))
        rate = rate.clamp(min=1e-4)
        weight = (rate + k * log_w - rate * log_w.exp()).exp()
        self.weight = weight.mean()
        losses = -weight * tokens.advantages * tokens.logprobs
        return tokens.rows(losses, log_ratio, None, self.ref_logprobs, self.entropy, kl)

    def _tokens(self, importance: str) -> tuple[Tokens, Tensor]:
        tokens = Tokens(self.logprobs, self.old_logprobs, self.advantages, self.mask)
        return tokens, tokens.log_ratio if importance == "token" else tokens.sequence_log_ratio(importance)

    def finish(self, rows: PolicyRows, importance: str, entropy_coef: float, how: str, normalizer) -> PolicyLoss:
        """The scalar loss and the metrics to log."""
        check_aggregation(how, normalizer)
        checks.numbers(entropy_coef=entropy_coef)
        if self.entropy is None and entropy_coef != 0:
            raise UserError(f"entropy must be given if entropy_coef is not 0, got None and {entropy_coef!r}")
        tokens = rows.tokens.sum().clamp(min=1)
        ratios = tokens if importance == "token" else rows.tokens.count_nonzero().clamp(min=1)
        clips = ratios if self.advantages.shape[1] == 1 else tokens
        loss, entropy = aggregate(rows.objective, rows.tokens, how, normalizer), None
        if self.entropy is not None:
            entropy = rows.entropy.sum() / tokens
            if entropy_coef != 0:
                loss = loss - entropy_coef * entropy
        return PolicyLoss(
            loss,
            aggregate(rows.policy, rows.tokens, how, normalizer).detach(),
            None if self.ref_logprobs is None else rows.kl.sum() / tokens,
            None if entropy is None else entropy.detach(),
            approx_kl=rows.approx_kl.sum() / tokens,
            ratio=rows.ratio.sum() / ratios,
            clip_low=rows.clip_low.sum() / clips,
            clip_high=rows.clip_high.sum() / clips,
            rows=rows._replace(objective=rows.objective.detach(), entropy=rows.entropy.detach()),
            weight=self.weight,
        )


def _clip(low: float, high: float | None, cap: float | None) -> Clip:
    high = low if high is None else high
    for name, x in (("clip_range", low), ("clip_range_high", high)):
        checks.numbers(**{name: x})
        if not x > 0:
            raise UserError(f"{name} must be positive, got {x!r}")
    if cap is not None:
        checks.numbers(dual_clip=cap)
    if cap is not None and not cap > 1 + high:
        raise UserError(f"dual_clip must be above 1 + clip_range_high = {1 + high:g}, got {cap!r}")
    return Clip(_log(1 - low), math.log1p(high), math.inf if cap is None else math.log(cap))


def _check_estimator(estimator: str) -> None:
    checks.among("estimator", estimator, KL_ESTIMATORS)


def _check_pairs(**named: tuple[float, float]) -> None:
    for name, pair in named.items():
        if isinstance(pair, str) or not hasattr(pair, "__len__") or len(pair) != 2:
            raise UserError(f"{name} must be two numbers, got {checks.shown(pair)}")
        for x in pair:
            checks.numbers(**{name: x})


def _by_sign(up: Tensor, positive: float, negative: float, like: Tensor) -> Tensor:
    # torch.where of two numbers would be float32, whatever the other dtypes.
    return torch.full_like(like, negative).masked_fill(up, positive)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
