"""policy_rows and value_rows: the sums over tokens from which policy and value losses are built, with their gradient.

They return sums per row, which the loss divides by tokens, by rows, or by the tokens of a larger batch. On a GPU one
kernel launch computes the sums and the gradient; on other devices they are plain torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign import empty
from fastalign._base.dtypes import compute_dtype
from fastalign.ops.fused import on_triton, sum_gradient
from fastalign.ops.library import Op, define


class PolicyRows(NamedTuple):
    """Sums over each row's valid tokens, all (B,); objective and entropy carry gradients.

    With a ratio per sequence, `ratio` is that ratio and not a sum, 0 for a row without tokens; with an advantage per
    sequence, so are clip_low and clip_high, 0 or 1.
    """

    objective: Tensor  # policy + kl_coef · kl
    entropy: Tensor
    policy: Tensor
    kl: Tensor
    approx_kl: Tensor
    ratio: Tensor
    clip_low: Tensor
    clip_high: Tensor
    tokens: Tensor


class ValueRows(NamedTuple):
    """Sums over each row's valid tokens, all (B,); objective carries the gradient."""

    objective: Tensor
    clipped: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class KL:
    """The KL penalty to a reference: the estimator, its coefficient, and whether r multiplies it."""

    coef: float = 0.0
    estimator: str = "k3"
    times_ratio: bool = False


@dataclass(frozen=True)
class Clip:
    """The bounds of log r: for A >= 0 at most `high`; for A < 0 at least `low` and at most `cap`."""

    low: float
    high: float
    cap: float = math.inf


@dataclass(frozen=True)
class Objective:
    """What a policy loss takes besides tensors."""

    importance: str
    clip: Clip
    kl: KL

    def flat(self) -> tuple[str, float, float, float, float, str, bool]:
        """In the op's order."""
        clip, kl = self.clip, self.kl
        return self.importance, clip.low, clip.high, clip.cap, float(kl.coef), kl.estimator, kl.times_ratio


def policy_rows(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    importance: str,
    clip: Clip,
    kl: KL,
) -> PolicyRows:
    """PPO's clipped objective, -min(r A, clip(r) A), and a KL estimate to a reference, summed over rows of tokens.

    Args:
        logprobs, old_logprobs, mask, ref_logprobs, entropy: (B, T), as in `losses.ppo_loss`.
        advantages: (B, 1) or (B, T).
        importance: r is each "token"'s, or the sequence's: exp of its tokens' log-ratios' "mean" or "sum".
    """
    arguments = (logprobs, entropy, old_logprobs, advantages, mask, ref_logprobs, Objective(importance, clip, kl))
    if not on_triton(logprobs.device):
        return _clipped_rows(*arguments)
    objective, entropies, figures, *_ = _PolicyRows.apply(*arguments)
    return PolicyRows(objective, entropies, *figures)


def value_rows(
    values: Tensor, old_values: Tensor | None, returns: Tensor, mask: Tensor, clip_range: float
) -> ValueRows:
    """½ max((V - R)², (clip(V, V_old ± clip_range) - R)²) summed over rows of tokens; ½ (V - R)² without old_values."""
    arguments = (values, old_values, returns, mask, float(clip_range))
    if not on_triton(values.device):
        return _value_rows(*arguments)
    objective, figures, _ = _ValueRows.apply(*arguments)
    return ValueRows(objective, *figures)


class Tokens:
    """The tensors of a policy loss in plain torch, in the compute type and 0 at masked tokens."""

    def __init__(self, logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, mask: Tensor):
        self.dtype: torch.dtype = compute_dtype(logprobs.dtype)
        self.mask: Tensor = mask != 0
        self.logprobs: Tensor = self.valid(logprobs)
        old = self.logprobs if old_logprobs is None else self.valid(old_logprobs)
        self.log_ratio: Tensor = self.logprobs - old.detach()
        self.advantages: Tensor = self.valid(advantages.detach())  # (B, 1) or (B, T)

    def valid(self, x: Tensor) -> Tensor:
        """x (B, T) at valid tokens, 0 elsewhere; for x (B, 1), one number per row, 0 in rows without a valid token."""
        mask = self.mask if x.shape == self.mask.shape else self.mask.any(-1, keepdim=True)
        return x.to(self.dtype).masked_fill(~mask, 0)

    def sums(self, x: Tensor) -> Tensor:
        return self.valid(x).sum(-1)

    def sequence_log_ratio(self, importance: str) -> Tensor:
        """(B, 1): the sum or the mean over tokens."""
        total = self.log_ratio.sum(-1, keepdim=True)
        return total / self.mask.sum(-1, keepdim=True).clamp(min=1) if importance == "mean" else total

    def clipped(self, log_ratio: Tensor, clip: Clip) -> Tensor:
        """-min(r A, clip(r) A), the ratio clipped before it is exponentiated."""
        gain = log_ratio.clamp(max=clip.high)
        cost = log_ratio.clamp(min=clip.low, max=clip.cap)
        return -torch.where(self.advantages >= 0, gain, cost).exp() * self.advantages

    def rows(
        self,
        losses: Tensor,
        log_ratio: Tensor,
        clip: Clip | None,
        ref_logprobs: Tensor | None,
        entropy: Tensor | None,
        kl: KL,
    ) -> PolicyRows:
        """The sums of a loss per token, (B, T) or (B, 1), and of the logged metrics. clip: None if there is no
        clipping."""
        none = torch.zeros_like(self.logprobs)
        estimate, low, high = none, none, none
        if ref_logprobs is not None:
            estimate = kl_estimate(self.logprobs - self.valid(ref_logprobs.detach()), kl.estimator)
            if kl.times_ratio:
                estimate = estimate * log_ratio.exp()
        if clip is not None:
            low = (log_ratio < clip.low) & (self.advantages < 0)
            high = (log_ratio > clip.high) & (self.advantages > 0)
        policy, kls = self.sums(losses.expand(self.mask.shape)), self.sums(estimate)
        return PolicyRows(
            policy + kl.coef * kls if kl.coef != 0 else policy,
            self.sums(none if entropy is None else entropy),
            policy.detach(),
            kls.detach(),
            approx_kl=self.sums(torch.expm1(self.log_ratio.detach()) - self.log_ratio.detach()),
            ratio=self.sums(log_ratio.detach().exp()),
            clip_low=self.sums(low),
            clip_high=self.sums(high),
            tokens=self.sums(self.mask),
        )


def kl_estimate(d: Tensor, estimator: str) -> Tensor:
    """k1, k2 or k3 of KL(policy, reference) at a token, d its log-ratio."""
    if estimator == "k1":
        return d
    return d.square() / 2 if estimator == "k2" else torch.expm1(-d) + d


def _clipped_rows(logprobs, entropy, old_logprobs, advantages, mask, ref_logprobs, objective: Objective) -> PolicyRows:
    tokens, importance = Tokens(logprobs, old_logprobs, advantages, mask), objective.importance
    log_ratio = tokens.log_ratio if importance == "token" else tokens.sequence_log_ratio(importance)
    losses = tokens.clipped(log_ratio, objective.clip)
    return tokens.rows(losses, log_ratio, objective.clip, ref_logprobs, entropy, objective.kl)


def _value_rows(values, old_values, returns, mask, clip_range) -> ValueRows:
    tokens = Tokens(values, old_values, returns, mask)
    values, returns = tokens.logprobs, tokens.advantages
    errors = (values - returns).square()
    over = torch.zeros_like(errors)
    if old_values is not None:
        old = tokens.valid(old_values.detach())
        clipped = (torch.minimum(torch.maximum(values, old - clip_range), old + clip_range) - returns).square()
        over = clipped > errors
        errors = torch.maximum(errors, clipped)
    return ValueRows(tokens.sums(errors / 2), tokens.sums(over), tokens.sums(tokens.mask))


class _PolicyRows(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logprobs, entropy, old_logprobs, advantages, mask, ref_logprobs, objective):
        return policy_op(logprobs, entropy, old_logprobs, advantages, mask, ref_logprobs, *objective.flat())

    @staticmethod
    def setup_context(ctx, inputs, output):
        logprobs, entropy, _, _, mask, _, objective = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(logprobs, entropy, mask, *output[3:])
        ctx.importance = objective.importance

    @staticmethod
    def backward(ctx, grad, grad_entropy, *_constants):
        logprobs, entropy, mask, shares, scales, weights = ctx.saved_tensors
        if ctx.importance == "token":
            gradient = sum_gradient(logprobs, None, None, grad, weights)
        elif weights.numel() == 0:
            gradient = sum_gradient(logprobs, grad * shares, mask, None, None)
        else:
            gradient = sum_gradient(logprobs, grad * shares, mask, grad * scales, weights)
        entropy = sum_gradient(entropy, grad_entropy, mask, None, None) if ctx.needs_input_grad[1] else None
        return gradient, entropy, None, None, None, None, None


class _ValueRows(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return value_op(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], output[2])

    @staticmethod
    def backward(ctx, grad, *_constants):
        values, weights = ctx.saved_tensors
        return sum_gradient(values, None, None, grad, weights), None, None, None, None


def _policy_cpu(logprobs, entropy, old_logprobs, advantages, mask, ref_logprobs, importance, low, high, cap, *kl):
    objective = Objective(importance, Clip(low, high, cap), KL(*kl))

    def summed(logprobs):
        rows = _clipped_rows(logprobs, entropy, old_logprobs, advantages, mask, ref_logprobs, objective)
        return rows.objective.sum(), rows

    weights, rows = torch.func.grad(summed, has_aux=True)(logprobs.to(compute_dtype(logprobs.dtype)))
    none = torch.zeros_like(rows.objective)
    return rows.objective, rows.entropy.clone(), torch.stack(rows[2:]), none, none + 1, weights


def _policy_fake(logprobs, entropy, old, advantages, mask, ref_logprobs, importance, low, high, cap, kl_coef, *_):
    return empty.policy_rows(logprobs, ref_logprobs, importance, kl_coef)


def _value_cpu(values, *rest):
    def objective(values):
        rows = _value_rows(values, *rest)
        return rows.objective.sum(), rows

    weights, rows = torch.func.grad(objective, has_aux=True)(values.to(compute_dtype(values.dtype)))
    return rows.objective, torch.stack(rows[1:]), weights


# objective (B,), entropy (B,), the other fields of PolicyRows (7, B); and the gradient of objective by a valid token's
# log-probability: shares (B,) + scales (B,) · weights (B, T). Under "token" it is the weights alone; otherwise the
# weights are empty unless there is a KL term.
policy_op: Op = define(
    "policy_rows(Tensor logprobs, Tensor? entropy, Tensor? old_logprobs, Tensor advantages, Tensor mask, "
    "Tensor? ref_logprobs, str importance, float low, float high, float cap, float kl_coef, str kl_estimator, "
    "bool kl_times_ratio) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _policy_cpu,
    _policy_fake,
    triton="policy.policy_rows",
    vmap_in_turn=True,
)

# objective (B,), the other fields of ValueRows (2, B), the gradient of objective by each value (B, T)
value_op: Op = define(
    "value_rows(Tensor values, Tensor? old_values, Tensor returns, Tensor mask, float clip_range) -> "
    "(Tensor, Tensor, Tensor)",
    _value_cpu,
    lambda values, *_: empty.value_rows(values),
    triton="policy.value_rows",
    vmap_in_turn=True,
)
