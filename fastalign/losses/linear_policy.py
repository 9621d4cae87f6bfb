"""Policy losses from hidden states and an lm_head's weight: the (tokens, vocabulary) logits are never held.

Each module stores its options; `forward` takes tensors and returns the loss and a dict of metrics, 0-dimensional and
without gradient. Labels are aligned with the hidden states that predict them, as in `losses.linear` (`shift_labels`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastalign._base.errors import UserError
from fastalign.losses.linear import LinearLoss
from fastalign.losses.policy import PolicyLoss, grpo_loss, ppo_loss
from fastalign.ops import checks
from fastalign.ops.head import Adapter


class _LinearPolicyLoss(LinearLoss):
    options: dict[str, Any]
    _loss: Callable[..., PolicyLoss]

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        advantages: Tensor,
        old_logprobs: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        adapter: Adapter | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its metrics: policy_loss, approx_kl, ratio, clip_ratio/low_mean, clip_ratio/high_mean, kl if
        there is a reference, and entropy if it is in the loss or token_metrics is set.

        Args:
            hidden: (B, T, H); weight: (V, H); bias: (V,).
            labels: (B, T) int64, aligned with hidden, `ignore_index` outside completions: only these are projected.
            advantages: (B,) or (B, T).
            old_logprobs: (B, T) at the time of sampling, at this module's temperature; None: the policy's current ones.
            mask: (B, T) bool or 0/1, excludes further tokens; None: all labels that are not ignored count.
            ref_logprobs: (B, T); or instead
            ref_hidden, ref_weight, ref_bias: the reference model's hidden states (B, T, H') and head.
            normalizer: as in the loss.
            adapter: (A (r, H), B (V, r), scale), a LoRA on the policy's head.

        Raises:
            UserError, TypeError: a shape or option that breaks these rules.
        """
        if ref_hidden is not None and ref_logprobs is not None:
            raise UserError("ref_hidden and ref_logprobs must not both be given")
        checks.tensors(hidden=hidden, weight=weight, labels=labels)
        if mask is not None:
            checks.tensor("mask", mask)
            if mask.shape != labels.shape:
                raise UserError(
                    f"mask.shape must equal labels.shape, got {tuple(mask.shape)} and {tuple(labels.shape)}"
                )
            labels = labels.masked_fill(mask == 0, self.head["ignore_index"])
        checks.numbers(entropy_coef=self.options["entropy_coef"])
        in_loss = self.options["entropy_coef"] != 0
        scored = self._project(hidden, weight, labels, bias, adapter, ("entropy",) if in_loss else ())
        if ref_hidden is not None:
            ref_logprobs = self._reference(labels, ref_hidden, ref_weight, ref_bias)
        entropy = scored.get("entropy")
        result = self._loss(
            scored["log_probs"],
            old_logprobs,
            advantages,
            self._mask(labels),
            ref_logprobs=ref_logprobs,
            entropy=entropy if in_loss or entropy is None else entropy.detach(),
            normalizer=normalizer,
            **self.options,
        )
        return result.loss, _metrics(result)

    if TYPE_CHECKING:
        __call__ = forward


class LinearPPOLoss(_LinearPolicyLoss):
    """`ppo_loss` on hidden states.

    Args:
        clip_range, clip_range_high, dual_clip, kl_coef, kl_estimator, entropy_coef, aggregation: as in `ppo_loss`.
        head: options of the head, as in `ops.linear_token_logprobs`: temperature (that of sampling), softcap,
            logit_scale, ignore_index, grad_filter; and token_metrics=True for "entropy" even if it is not in the loss.
    """

    _loss = staticmethod(ppo_loss)

    def __init__(
        self,
        *,
        clip_range: float = 0.2,
        clip_range_high: float | None = None,
        dual_clip: float | None = None,
        kl_coef: float = 0.0,
        kl_estimator: str = "k3",
        entropy_coef: float = 0.0,
        aggregation: str = "token_mean",
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        ignore_index: int = -100,
        grad_filter: float | None = None,
        memory_budget: int = 0,
        token_metrics: bool = False,
    ):
        super().__init__(
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            grad_filter=grad_filter,
            memory_budget=memory_budget,
            token_metrics=token_metrics,
        )
        self.options: dict[str, Any] = {
            "clip_range": clip_range,
            "clip_range_high": clip_range_high,
            "dual_clip": dual_clip,
            "kl_coef": kl_coef,
            "kl_estimator": kl_estimator,
            "entropy_coef": entropy_coef,
            "aggregation": aggregation,
        }


class LinearGRPOLoss(_LinearPolicyLoss):
    """`grpo_loss` on hidden states, for every loss type. Arguments as in `grpo_loss`; head as in `LinearPPOLoss`."""

    _loss = staticmethod(grpo_loss)

    def __init__(
        self,
        *,
        loss_type: str = "dapo",
        importance: str | None = None,
        clip_range: float = 0.2,
        clip_range_high: float | None = None,
        dual_clip: float | None = None,
        kl_coef: float = 0.0,
        kl_estimator: str = "k3",
        kl_bias_correction: bool = False,
        entropy_coef: float = 0.0,
        max_length: int | None = None,
        sapo_temperatures: tuple[float, float] = (1.0, 1.05),
        vespo_positive: tuple[float, float] = (2.0, 3.0),
        vespo_negative: tuple[float, float] = (3.0, 2.0),
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        ignore_index: int = -100,
        grad_filter: float | None = None,
        memory_budget: int = 0,
        token_metrics: bool = False,
    ):
        super().__init__(
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            grad_filter=grad_filter,
            memory_budget=memory_budget,
            token_metrics=token_metrics,
        )
        self.options: dict[str, Any] = {
            "loss_type": loss_type,
            "importance": importance,
            "clip_range": clip_range,
            "clip_range_high": clip_range_high,
            "dual_clip": dual_clip,
            "kl_coef": kl_coef,
            "kl_estimator": kl_estimator,
            "kl_bias_correction": kl_bias_correction,
            "entropy_coef": entropy_coef,
            "max_length": max_length,
            "sapo_temperatures": sapo_temperatures,
            "vespo_positive": vespo_positive,
            "vespo_negative": vespo_negative,
        }


def _metrics(result: PolicyLoss) -> dict[str, Tensor]:
    names = {"clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean", "weight": "vespo/phi_seq_mean"}
    fields = result._asdict()
    return {names.get(name, name): x for name, x in fields.items() if name not in ("loss", "rows") and x is not None}
