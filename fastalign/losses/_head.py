"""Stand-in for `ops.linear_token_logprobs`: the same contract through plain logits, until the fused head lands."""

from __future__ import annotations

import torch.nn.functional as F

from fastalign import ops


def linear_token_logprobs(
    hidden,
    weight,
    labels,
    *,
    bias=None,
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
    ignore_index=-100,
    outputs=("log_probs",),
    grad_filter=None,
    adapter=None,
):
    logits = F.linear(hidden, weight, bias)
    if adapter is not None:
        a, b, scale = adapter
        logits = logits + scale * F.linear(F.linear(hidden, a), b)
    options = {"temperature": temperature, "softcap": softcap, "ignore_index": ignore_index, "outputs": outputs}
    return ops.token_logprobs(logits * logit_scale, labels, **options)


linear_token_logprobs = getattr(ops, "linear_token_logprobs", linear_token_logprobs)
