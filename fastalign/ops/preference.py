"""pairwise_loss: any pairwise preference loss and its gradient from the log-probabilities of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastalign import empty
from fastalign._base.errors import UserError
from fastalign.ops import checks
from fastalign.ops.fused import on_triton, sum_gradient
from fastalign.ops.library import Op, define
from fastalign.ops.pairwise import FUSED, TABLE, Margin, Options, check_options


class PairLosses(NamedTuple):
    """What `pairwise_loss` returns, each (B,); `losses` alone carries a gradient."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor  # summed over the completion's tokens
    rejected_logps: Tensor


def pairwise_loss(
    log_probs: Tensor,
    ref_log_probs: Tensor | None,
    mask: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
) -> PairLosses:
    """DPO and its variants from per-token log-probabilities: masked sums, log-ratios, loss and gradient in one kernel
    launch.

    `losses.dpo_loss` of the rows' sums, for one loss type and the reverse KL. On a GPU one kernel reads each pair's
    rows once and keeps two numbers per pair for the backward pass; on other devices it is plain torch.

    Args:
        log_probs: (2B, T), rows [chosen; rejected]: the B chosen completions, then the B rejected. Has the gradient.
        ref_log_probs: the reference's, (2B, T) per token or (2B,) summed, a constant; None for reference-free.
        mask: (2B, T) bool or 0/1, nonzero on the completion's tokens. Values elsewhere are never read, even if NaN.
        beta, label_smoothing, discopop_tau: as in `losses.dpo_loss`.
        loss_type: any loss that is computed pair by pair: not aot and aot_unpaired (which sort the batch), and not sft.

    Returns:
        PairLosses, float32, float64 for float64 inputs. The rewards are beta times the log-ratios.

    Raises:
        UserError, TypeError: a shape, device or option that breaks these rules.
    """
    checks.among("loss_type", loss_type, FUSED)
    check_options((loss_type,), Options(beta, label_smoothing, discopop_tau))
    options = Options(float(beta), float(label_smoothing), float(discopop_tau))
    _check(log_probs, ref_log_probs, mask)
    ref_log_probs = None if ref_log_probs is None else ref_log_probs.detach()
    if on_triton(log_probs.device):
        result = _PairwiseLoss.apply(log_probs, ref_log_probs, mask, loss_type, options)
        return PairLosses(*result[:3], *result[3].chunk(2))
    sums, c, r, margin = _log_ratios(log_probs, ref_log_probs, mask, loss_type)
    losses = TABLE[loss_type].formula(c, r, margin, options)
    return PairLosses(losses, beta * c.detach(), beta * r.detach(), *sums.detach().chunk(2))


def _check(log_probs, ref_log_probs, mask) -> None:
    checks.logits("log_probs", log_probs, "T")
    if log_probs.ndim != 2 or len(log_probs) % 2:
        raise UserError(f"log_probs must have shape (2B, T), chosen then rejected, got {tuple(log_probs.shape)}")
    checks.tensor("mask", mask)
    if mask.shape != log_probs.shape:
        raise UserError(f"mask.shape must equal log_probs.shape, got {tuple(mask.shape)} and {tuple(log_probs.shape)}")
    beside = {"mask": mask}
    if ref_log_probs is not None:
        checks.logits("ref_log_probs", ref_log_probs, "T")
        if ref_log_probs.shape not in (log_probs.shape, log_probs.shape[:1]):
            raise UserError(
                f"ref_log_probs must have shape {tuple(log_probs.shape)} or {tuple(log_probs.shape[:1])}, "
                f"got {tuple(ref_log_probs.shape)}"
            )
        beside["ref_log_probs"] = ref_log_probs
    for name, x in beside.items():
        if x.device != log_probs.device:
            raise UserError(f"{name} must be on log_probs' device, got {x.device} and {log_probs.device}")


def _log_ratios(log_probs, ref_log_probs, mask, loss_type) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The policy's sums (2B,), and each pair's two log-ratios and margin."""
    dtype = empty.pair_dtype(log_probs, ref_log_probs)
    mask = mask != 0

    def summed(x):
        return x.to(dtype).masked_fill(~mask, 0).sum(-1) if x.ndim == 2 else x.to(dtype)

    sums = summed(log_probs)
    ratios = sums - (torch.zeros_like(sums) if ref_log_probs is None else summed(ref_log_probs))
    c, r = ratios.chunk(2)
    if TABLE[loss_type].margin is not Margin.PER_TOKEN:
        return sums, c, r, c - r
    chosen_lengths, rejected_lengths = mask.sum(-1).clamp(min=1).to(dtype).chunk(2)
    return sums, c, r, c / chosen_lengths - r / rejected_lengths


class _PairwiseLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(log_probs, ref_log_probs, mask, loss_type, options):
        numbers = (options.beta, options.label_smoothing, options.discopop_tau)
        return forward_op(log_probs, ref_log_probs, mask, loss_type, *numbers)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], inputs[2], output[4])

    @staticmethod
    def backward(ctx, grad, *_constants):
        log_probs, mask, slopes = ctx.saved_tensors
        return sum_gradient(log_probs, grad.repeat(2) * slopes, mask, None, None), None, None, None, None


def _forward_cpu(log_probs, ref_log_probs, mask, loss_type, beta, label_smoothing, discopop_tau):
    options = Options(beta, label_smoothing, discopop_tau)
    sums, c, r, _ = _log_ratios(log_probs, ref_log_probs, mask, loss_type)
    lengths = (mask != 0).sum(-1).clamp(min=1).to(c.dtype).chunk(2)
    scales = lengths if TABLE[loss_type].margin is Margin.PER_TOKEN else (1.0, 1.0)

    def loss(c, r):
        losses = TABLE[loss_type].formula(c, r, c / scales[0] - r / scales[1], options)
        return losses.sum(), losses

    slopes, losses = torch.func.grad(loss, (0, 1), has_aux=True)(c, r)
    return losses, beta * c, beta * r, sums, torch.cat(slopes)


# losses (B,), chosen rewards (B,), rejected rewards (B,), sums (2B,), d loss / d sum (2B,)
forward_op: Op = define(
    "pairwise_loss_forward(Tensor log_probs, Tensor? ref_log_probs, Tensor mask, str loss_type, float beta, "
    "float label_smoothing, float discopop_tau) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_cpu,
    lambda log_probs, ref_log_probs, *_: empty.pairwise_loss(log_probs, ref_log_probs),
    triton="preference.forward",
    vmap_in_turn=True,
)
