"""Preference losses from hidden states and an lm_head's weight: the (tokens, vocabulary) logits are never held.

Each module stores its options; `forward` takes tensors and returns the mean loss and a dict of metrics with the names
that TRL's trainers log, 0-dimensional and without gradient.

Labels are aligned with the hidden states that predict them: labels[:, t] is the token that hidden[:, t] must predict,
or `ignore_index` on prompts and padding, which are never projected. `shift_labels` makes them from input ids. Pairs
form one batch of 2B rows, first the B chosen, then the B rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastalign._base.errors import UserError
from fastalign.losses.preference import (
    cpo_loss,
    dpo_loss,
    kto_kl,
    kto_loss,
    orpo_loss,
    sequence_logps,
    wpo_weights,
)
from fastalign.ops import checks, linear_token_logprobs
from fastalign.ops.fused import on_triton
from fastalign.ops.head import Adapter
from fastalign.ops.pairwise import FUSED
from fastalign.ops.preference import pairwise_loss

STATISTICS = ("entropy", "mean_logits", "is_top1")


def shift_labels(input_ids: Tensor, completion_mask: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Labels for the hidden states of `input_ids`: position t gets token t + 1 if that belongs to the completion.

    input_ids, completion_mask (R, T) -> (R, T) int64; the last position, which predicts nothing, is ignored.

    >>> import torch
    >>> from fastalign import losses
    >>> losses.shift_labels(torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 1]]))
    tensor([[   6,    7, -100]])
    """
    checks.tensors(input_ids=input_ids, completion_mask=completion_mask)
    if input_ids.shape != completion_mask.shape or input_ids.ndim != 2:
        raise UserError(
            "input_ids and completion_mask must have one shape (rows, tokens), "
            f"got {tuple(input_ids.shape)} and {tuple(completion_mask.shape)}"
        )
    labels = input_ids.masked_fill(completion_mask == 0, ignore_index)
    return torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], ignore_index)), 1)


class LinearLoss(nn.Module):
    """The head's options, and the code common to all losses."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        ignore_index: int = -100,
        grad_filter: float | None = None,
        memory_budget: int = 0,
        token_metrics: bool = False,
    ):
        """The options of `ops.linear_token_logprobs`, and token_metrics: entropy, mean logits and accuracy too."""
        super().__init__()
        self.head: dict[str, Any] = {
            "temperature": temperature,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "ignore_index": ignore_index,
        }
        self.backward_options: dict[str, Any] = {"grad_filter": grad_filter, "memory_budget": memory_budget}
        self.token_metrics = token_metrics

    def _project(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        adapter: Adapter | None,
        outputs: tuple[str, ...] = (),
    ) -> dict[str, Tensor]:
        """log_probs, `outputs`, and the statistics if token metrics are requested, each (R, T)."""
        checks.tensors(hidden=hidden, weight=weight, labels=labels)
        if hidden.ndim != 3 or labels.shape != hidden.shape[:-1]:
            raise UserError(
                "hidden must be (rows, tokens, H) and labels (rows, tokens), "
                f"got {tuple(hidden.shape)} and {tuple(labels.shape)}"
            )
        wanted = ("log_probs", *outputs, *(STATISTICS if self.token_metrics else ()))
        options = self.head | self.backward_options
        result = linear_token_logprobs(hidden, weight, labels, bias=bias, adapter=adapter, outputs=wanted, **options)
        return {"log_probs": result} if isinstance(result, Tensor) else {name: getattr(result, name) for name in wanted}

    def _reference(
        self, labels: Tensor, ref_hidden: Tensor, ref_weight: Tensor | None, ref_bias: Tensor | None
    ) -> Tensor:
        """The reference model's log_probs (R, T) from its own hidden states and head."""
        if ref_weight is None:
            raise UserError("ref_weight must be given with ref_hidden: the reference model's own lm_head, got None")
        checks.tensors(ref_hidden=ref_hidden, ref_weight=ref_weight)
        if ref_bias is not None:
            checks.tensor("ref_bias", ref_bias)
            ref_bias = ref_bias.detach()
        return linear_token_logprobs(ref_hidden.detach(), ref_weight.detach(), labels, bias=ref_bias, **self.head)

    def _mask(self, labels: Tensor) -> Tensor:
        return labels != self.head["ignore_index"]

    def _token_metrics(self, scored: dict[str, Tensor], mask: Tensor, is_chosen: Tensor) -> dict[str, Tensor]:
        """Means over completion tokens; is_chosen (R,) says which rows are the chosen ones."""
        if not self.token_metrics:
            return {}
        chosen, rejected = mask & is_chosen.unsqueeze(-1), mask & ~is_chosen.unsqueeze(-1)
        return {
            "entropy": _mean_over(scored["entropy"], mask),
            "logits/chosen": _mean_over(scored["mean_logits"], chosen),
            "logits/rejected": _mean_over(scored["mean_logits"], rejected),
            "mean_token_accuracy": _mean_over(scored["is_top1"], chosen),
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_") and k != "training")


class _LinearPairLoss(LinearLoss):
    """Base of the losses over [chosen; rejected] rows."""

    def _project_pairs(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        adapter: Adapter | None,
        outputs: tuple[str, ...] = (),
    ) -> dict[str, Tensor]:
        checks.tensors(hidden=hidden, weight=weight, labels=labels)
        if labels.ndim and labels.shape[0] % 2:
            raise UserError(f"hidden must have an even number of rows, chosen then rejected, got {labels.shape[0]}")
        return self._project(hidden, weight, labels, bias, adapter, outputs)

    def _pair_metrics(
        self,
        scored: dict[str, Tensor],
        mask: Tensor,
        chosen_rewards: Tensor,
        rejected_rewards: Tensor,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
    ) -> dict[str, Tensor]:
        is_chosen = torch.arange(len(mask), device=mask.device) < len(mask) // 2
        return {
            "rewards/chosen": chosen_rewards.mean(),
            "rewards/rejected": rejected_rewards.mean(),
            "rewards/accuracies": (chosen_rewards > rejected_rewards).to(chosen_rewards.dtype).mean(),
            "rewards/margins": (chosen_rewards - rejected_rewards).mean(),
            "logps/chosen": chosen_logps.detach().mean(),
            "logps/rejected": rejected_logps.detach().mean(),
            **self._token_metrics(scored, mask, is_chosen),
        }


class LinearDPOLoss(_LinearPairLoss):
    """`dpo_loss` on hidden states: every loss type, f-divergence and mixture, LD-DPO, WPO weights.

    Args:
        beta, loss_type, loss_weights, label_smoothing, f_divergence_type, f_alpha_divergence_coef, discopop_tau: as
            in `dpo_loss`.
        ld_alpha: as in `sequence_logps`.
        use_weighting: WPO's weights (`wpo_weights`).
        head: options of the head, as in `ops.linear_token_logprobs`: temperature, softcap, logit_scale, ignore_index,
            grad_filter, memory_budget; and token_metrics=True for "entropy", "logits/*" and "mean_token_accuracy" too.
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        loss_type: str | Sequence[str] = "sigmoid",
        loss_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        f_divergence_type: str = "reverse_kl",
        f_alpha_divergence_coef: float = 0.5,
        discopop_tau: float = 0.05,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
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
            "beta": beta,
            "loss_type": loss_type,
            "loss_weights": loss_weights,
            "label_smoothing": label_smoothing,
            "f_divergence_type": f_divergence_type,
            "f_alpha_divergence_coef": f_alpha_divergence_coef,
            "discopop_tau": discopop_tau,
        }
        self.ld_alpha = ld_alpha
        self.use_weighting = use_weighting

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ref_logps: tuple[Tensor, Tensor] | None = None,
        adapter: Adapter | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over pairs and its metrics.

        Args:
            hidden: (2B, T, H), rows [chosen; rejected]; weight: (V, H); bias: (V,).
            labels: (2B, T) int64, aligned with hidden, `ignore_index` outside completions.
            ref_hidden, ref_weight, ref_bias: the reference model's hidden states (2B, T, H') and head.
            ref_logps: the reference's sequence log-probabilities (chosen (B,), rejected (B,)) instead of its hidden
                states, computed with the same ld_alpha. With neither, the loss is reference-free.
            adapter: (A (r, H), B (V, r), scale), a LoRA on the policy's head.

        Raises:
            UserError, TypeError: a shape or option that breaks these rules.
        """
        if ref_hidden is not None and ref_logps is not None:
            raise UserError("ref_hidden and ref_logps must not both be given")
        if ref_logps is not None:
            if not isinstance(ref_logps, tuple | list) or len(ref_logps) != 2:
                raise UserError(f"ref_logps must be two tensors, chosen and rejected, got {checks.shown(ref_logps)}")
            for x in ref_logps:
                checks.tensor("ref_logps", x, "two tensors, chosen and rejected")
        outputs = ("log_sum_sq_probs",) if self.use_weighting else ()
        scored = self._project_pairs(hidden, weight, labels, bias, adapter, outputs)
        mask = self._mask(labels)
        log_probs, ref_log_probs = scored["log_probs"], None
        if ref_hidden is not None:
            ref_log_probs = self._reference(labels, ref_hidden, ref_weight, ref_bias)
        if self._fuses(log_probs):
            ref = torch.cat(ref_logps) if ref_logps is not None else ref_log_probs
            names = ("beta", "loss_type", "label_smoothing", "discopop_tau")
            losses, *figures = pairwise_loss(log_probs, ref, mask, **{name: self.options[name] for name in names})
            return losses.mean(), self._pair_metrics(scored, mask, *figures)
        chosen, rejected = sequence_logps(log_probs, mask, ld_alpha=self.ld_alpha).chunk(2)
        if ref_log_probs is not None:
            ref_logps = sequence_logps(ref_log_probs, mask, ld_alpha=self.ld_alpha).chunk(2)
        chosen_lengths, rejected_lengths = mask.sum(-1).chunk(2)
        half = len(labels) // 2
        plain = None if self.ld_alpha is None else sequence_logps(log_probs[:half], mask[:half])
        losses, chosen_rewards, rejected_rewards = dpo_loss(
            chosen,
            rejected,
            *(ref_logps or (None, None)),
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            sft_logps=plain,
            weights=wpo_weights(log_probs, scored["log_sum_sq_probs"], mask) if self.use_weighting else None,
            **self.options,
        )
        return losses.mean(), self._pair_metrics(scored, mask, chosen_rewards, rejected_rewards, chosen, rejected)

    if TYPE_CHECKING:
        __call__ = forward

    def _fuses(self, log_probs: Tensor) -> bool:
        """Whether `pairwise_loss` computes this loss in one kernel launch: a single loss of the plain log-ratios, on a
        GPU."""
        plain = self.options["f_divergence_type"] == "reverse_kl" and self.options["loss_weights"] is None
        plain = plain and self.ld_alpha is None and not self.use_weighting
        return plain and self.options["loss_type"] in FUSED and on_triton(log_probs.device)


class LinearCPOLoss(_LinearPairLoss):
    """`cpo_loss` on hidden states, plus cpo_alpha times the chosen completions' likelihood term.

    loss_type "alphapo" is "simpo" without the likelihood term, as in TRL. Other arguments as in `cpo_loss`; head as in
    `LinearDPOLoss`.
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        simpo_gamma: float = 0.5,
        alpha: float = 0.0,
        cpo_alpha: float = 1.0,
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
        if loss_type == "alphapo":
            loss_type, cpo_alpha = "simpo", 0.0
        self.options: dict[str, Any] = {
            "beta": beta,
            "loss_type": loss_type,
            "label_smoothing": label_smoothing,
            "simpo_gamma": simpo_gamma,
            "alpha": alpha,
            "cpo_alpha": cpo_alpha,
        }

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        adapter: Adapter | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Arguments as in `LinearDPOLoss`, without a reference; metrics also "nll_loss" if it is used."""
        scored = self._project_pairs(hidden, weight, labels, bias, adapter)
        log_probs, mask = scored["log_probs"], self._mask(labels)
        average = self.options["loss_type"] in ("ipo", "simpo")
        chosen, rejected = sequence_logps(log_probs, mask, average=average).chunk(2)
        half = len(labels) // 2
        nll = None if self.options["cpo_alpha"] == 0 else -_mean_over(log_probs[:half], mask[:half], grad=True)
        losses, better, worse = cpo_loss(chosen, rejected, chosen_nll=nll, **self.options)
        metrics = self._pair_metrics(scored, mask, better, worse, chosen, rejected)
        return losses.mean(), metrics if nll is None else metrics | {"nll_loss": nll.detach()}

    if TYPE_CHECKING:
        __call__ = forward


class LinearSimPOLoss(LinearCPOLoss):
    """`simpo_loss` on hidden states: no reference and no likelihood term. Arguments as in `simpo_loss` and
    `LinearDPOLoss`."""

    def __init__(
        self,
        *,
        beta: float = 2.0,
        gamma: float = 1.0,
        label_smoothing: float = 0.0,
        alpha: float = 0.0,
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        ignore_index: int = -100,
        grad_filter: float | None = None,
        memory_budget: int = 0,
        token_metrics: bool = False,
    ):
        super().__init__(
            beta=beta, loss_type="simpo", label_smoothing=label_smoothing, simpo_gamma=gamma, alpha=alpha,
            cpo_alpha=0.0, temperature=temperature, softcap=softcap, logit_scale=logit_scale, ignore_index=ignore_index,
            grad_filter=grad_filter, memory_budget=memory_budget, token_metrics=token_metrics,
        )  # fmt: skip


class LinearORPOLoss(_LinearPairLoss):
    """`orpo_loss` on hidden states, with the chosen rows' likelihood term. head as in `LinearDPOLoss`."""

    def __init__(
        self,
        *,
        beta: float = 0.1,
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
        self.beta = beta

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        adapter: Adapter | None = None,
        nll_labels: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Arguments as in `LinearDPOLoss`, without a reference; metrics also nll_loss, log_odds_ratio, log_odds_chosen.

        nll_labels: (B, T) labels of the chosen rows for the likelihood term, equal to `labels` on the completion; give
        the prompt's labels too for TRL's and the authors' loss. None: the completion alone.
        """
        checks.tensors(hidden=hidden, weight=weight, labels=labels)
        half = len(labels) // 2 if labels.ndim else 0
        projected = labels
        if nll_labels is not None:
            checks.tensor("nll_labels", nll_labels)
            if nll_labels.shape != labels[:half].shape:
                raise UserError(
                    f"nll_labels must have shape {tuple(labels[:half].shape)}, got {tuple(nll_labels.shape)}"
                )
            projected = torch.cat((nll_labels, labels[half:]))
        scored = self._project_pairs(hidden, weight, projected, bias, adapter)
        log_probs, mask = scored["log_probs"], self._mask(labels)
        chosen, rejected = sequence_logps(log_probs, mask, average=True).chunk(2)
        nll = -_mean_over(log_probs[:half], self._mask(projected)[:half], grad=True)
        losses, better, worse, log_odds = orpo_loss(chosen, rejected, beta=self.beta, chosen_nll=nll)
        metrics = self._pair_metrics(scored, mask, better, worse, chosen, rejected)
        metrics |= {
            "nll_loss": nll.detach(),
            "log_odds_ratio": nn.functional.logsigmoid(log_odds).mean(),
            "log_odds_chosen": log_odds.mean(),
        }
        return losses.mean(), metrics

    if TYPE_CHECKING:
        __call__ = forward


class LinearKTOLoss(LinearLoss):
    """`kto_loss` on hidden states. beta, weights and loss_type as in `kto_loss`; head as in `LinearDPOLoss`."""

    def __init__(
        self,
        *,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        loss_type: str = "kto",
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
            "beta": beta,
            "desirable_weight": desirable_weight,
            "undesirable_weight": undesirable_weight,
            "loss_type": loss_type,
        }

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        desirable: Tensor,
        *,
        bias: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ref_logps: Tensor | None = None,
        kl: Tensor | float | None = None,
        kl_hidden: Tensor | None = None,
        kl_labels: Tensor | None = None,
        ref_kl_hidden: Tensor | None = None,
        adapter: Adapter | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over rows and its metrics; those of a side without rows are NaN.

        Args:
            hidden: (B, T, H); weight: (V, H); bias: (V,); labels: (B, T) int64, aligned with hidden.
            desirable: (B,) bool.
            ref_hidden, ref_weight, ref_bias, ref_logps: the reference, (B,) for the last, as in `LinearDPOLoss`.
            kl: the reference point, a number or a tensor (); or instead, for `kto_kl`:
            kl_hidden, kl_labels, ref_kl_hidden: (B', T', H) hidden states of policy and reference on completions
                paired with others' prompts. loss_type "apo_zero_unpaired" needs none of these.
            adapter: (A (r, H), B (V, r), scale), a LoRA on the policy's head.

        Raises:
            UserError, TypeError: a shape or option that breaks these rules.
        """
        if ref_hidden is not None and ref_logps is not None:
            raise UserError("ref_hidden and ref_logps must not both be given")
        checks.tensor("desirable", desirable)
        scored = self._project(hidden, weight, labels, bias, adapter)
        mask = self._mask(labels)
        logps = sequence_logps(scored["log_probs"], mask)
        if ref_hidden is not None:
            ref_logps = sequence_logps(self._reference(labels, ref_hidden, ref_weight, ref_bias), mask)
        if self.options["loss_type"] != "kto":
            kl = 0.0
        elif kl is None:
            kl = self._kl(kl_hidden, kl_labels, ref_kl_hidden, weight, bias, adapter, ref_weight, ref_bias)
        losses, rewards = kto_loss(logps, ref_logps, desirable, kl, **self.options)
        metrics = {"kl": torch.as_tensor(kl, dtype=rewards.dtype, device=rewards.device).detach()}
        for name, rows in (("chosen", desirable), ("rejected", ~desirable)):
            metrics[f"rewards/{name}"] = torch.where(rows, rewards, 0).sum() / rows.sum()
            metrics[f"logps/{name}"] = torch.where(rows, logps.detach(), 0).sum() / rows.sum()
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        token_metrics = self._token_metrics(scored, mask, desirable)
        token_metrics.pop("mean_token_accuracy", None)
        return losses.mean(), metrics | token_metrics

    if TYPE_CHECKING:
        __call__ = forward

    def _kl(
        self,
        kl_hidden: Tensor | None,
        kl_labels: Tensor | None,
        ref_kl_hidden: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        adapter: Adapter | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
    ) -> Tensor:
        if kl_hidden is None or kl_labels is None or ref_kl_hidden is None:
            raise UserError("kl, or kl_hidden with kl_labels and ref_kl_hidden, must be given for loss_type 'kto'")
        checks.tensors(kl_hidden=kl_hidden, kl_labels=kl_labels, ref_kl_hidden=ref_kl_hidden)
        mask = self._mask(kl_labels)
        with torch.no_grad():
            policy = linear_token_logprobs(kl_hidden, weight, kl_labels, bias=bias, adapter=adapter, **self.head)
            ref = self._reference(kl_labels, ref_kl_hidden, ref_weight, ref_bias)
            return kto_kl(sequence_logps(policy, mask), sequence_logps(ref, mask))


def _mean_over(x: Tensor, mask: Tensor, *, grad: bool = False) -> Tensor:
    """Mean of x over mask, 0 if the mask is empty."""
    x = x if grad else x.detach()
    x = x if x.is_floating_point() else x.float()
    return x.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)
