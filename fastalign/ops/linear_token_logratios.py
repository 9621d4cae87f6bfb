"""linear_token_logratios: log p / p0 of each label from the hidden states and heads of a policy and its reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign.ops import checks
from fastalign.ops.linear_token_logprobs import linear_token_logprobs


def linear_token_logratios(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    grad_filter: float | None = None,
    adapter: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """log p(label) - log p0(label) per token, without holding either model's logits.

    The implicit reward of DPO before beta (arXiv 2305.18290, eq. 5) and the log-ratio of a KL penalty. Gradients flow
    only to the policy; the reference is a constant.

    Args:
        hidden, weight, bias, adapter: the policy's, as in `linear_token_logprobs`: (..., H), (V, H), (V,).
        ref_hidden, ref_weight, ref_bias: the reference's: (..., H'), (V, H'), (V,); H' and the dtype may differ from
            the policy's.
        labels: (...) int64 in [0, V), or `ignore_index`; ignored positions are not projected and give 0.
        temperature, softcap, logit_scale, ignore_index: of both sides, as in `linear_token_logprobs`.
        grad_filter: as in `linear_token_logprobs`.

    Returns:
        (...) float32, float64 where either side is float64.

    Raises:
        UserError, TypeError: a shape, dtype, device, label or option that breaks these rules.
    """
    checks.tensors(hidden=hidden, weight=weight, ref_hidden=ref_hidden, ref_weight=ref_weight)
    if ref_bias is not None:
        checks.tensor("ref_bias", ref_bias)
    if weight.ndim != 2:
        raise UserError(f"weight must have shape (V, H), got {tuple(weight.shape)}")
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise UserError(
            "ref_hidden.shape[:-1] must equal hidden.shape[:-1], "
            f"got {tuple(ref_hidden.shape[:-1])} and {tuple(hidden.shape[:-1])}"
        )
    if ref_hidden.shape[-1:] != ref_weight.shape[1:]:
        raise UserError(
            "ref_hidden.shape[-1] must equal ref_weight.shape[1], "
            f"got shapes {tuple(ref_hidden.shape)} and {tuple(ref_weight.shape)}"
        )
    if ref_weight.shape[0] != weight.shape[0]:
        raise UserError(
            f"ref_weight.shape[0] must equal weight.shape[0], got {ref_weight.shape[0]} and {weight.shape[0]}"
        )
    head: dict[str, Any] = {
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "ignore_index": ignore_index,
    }
    policy = linear_token_logprobs(hidden, weight, labels, bias=bias, grad_filter=grad_filter, adapter=adapter, **head)
    with torch.no_grad():
        ref = linear_token_logprobs(
            ref_hidden.detach(),
            ref_weight.detach(),
            labels,
            bias=None if ref_bias is None else ref_bias.detach(),
            **head,
        )
    return policy - ref
