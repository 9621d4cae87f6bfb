"""token_logratios: log p / p0 of each label from the logits of a policy and of its reference."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign import backend, empty, reference
from fastalign._base.errors import UserError
from fastalign.backend import threads
from fastalign.ops import checks
from fastalign.ops.buffers import buffer, rows
from fastalign.ops.library import Op, define
from fastalign.ops.once import once
from fastalign.ops.token_logprobs import RowOptions
from fastalign.ops.token_logprobs import backward_op as token_logprobs_backward


def token_logratios(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, *, temperature: float = 1.0, ignore_index: int = -100
) -> Tensor:
    """log softmax(policy / T)[label] - log softmax(ref / T)[label] per token, both read once.

    The implicit reward of DPO before beta (arXiv 2305.18290, eq. 5) and the log-ratio of PPO.

    Args:
        policy_logits, ref_logits: (..., V), the same shape, dtype and device; float32, float64, bfloat16 or float16.
            Gradients flow to whichever requires them.
        labels: (...) int64 in [0, V), or `ignore_index`. On a GPU any other label gives NaN in its row.
        temperature: divides both; positive.
        ignore_index: positions with this label give 0 and no gradient.

    Returns:
        (...) float32, float64 for float64 logits.

    Raises:
        UserError, TypeError: a shape, dtype, device, label or option that breaks these rules.

    >>> import torch
    >>> from fastalign import ops
    >>> ops.token_logratios(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([0])).round(decimals=4)
    tensor([0.3799])
    """
    checks.logits("policy_logits", policy_logits)
    checks.logits("ref_logits", ref_logits)
    for what in ("shape", "dtype", "device"):
        policy, ref = getattr(policy_logits, what), getattr(ref_logits, what)
        if policy != ref:
            policy, ref = (tuple(policy), tuple(ref)) if what == "shape" else (policy, ref)
            raise UserError(f"ref_logits.{what} must equal policy_logits.{what}, got {ref} and {policy}")
    checks.labels("policy_logits", policy_logits, labels)
    checks.positive("temperature", temperature)
    checks.integer("ignore_index", ignore_index)
    if backend.choose(policy_logits.device) == "reference":
        checks.labels_in_range(labels, policy_logits.shape[-1], ignore_index)
        return reference.token_logratios(policy_logits, ref_logits, labels, temperature, ignore_index)
    options = RowOptions(float(temperature), 0.0, ignore_index, statistics=0)
    return _TokenLogratios.apply(policy_logits, ref_logits, labels, options)[0]


class _TokenLogratios(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(policy_logits, ref_logits, labels, options):
        return forward_op(policy_logits, ref_logits, labels, options.temperature, options.ignore_index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        policy_logits, ref_logits, labels, ctx.options = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(policy_logits, ref_logits, labels, *output[1:])

    @staticmethod
    def backward(ctx, grad, *_stats):
        policy_logits, ref_logits, labels, policy_max, policy_sum, ref_max, ref_sum = ctx.saved_tensors

        def side(grad, logits, row_max, row_sum):
            none = torch.zeros_like(grad)
            return once(token_logprobs_backward, grad, none, row_max, row_sum, none, logits, labels, *ctx.options)

        policy_grad = side(grad, policy_logits, policy_max, policy_sum) if ctx.needs_input_grad[0] else None
        ref_grad = side(-grad, ref_logits, ref_max, ref_sum) if ctx.needs_input_grad[1] else None
        return policy_grad, ref_grad, None, None


def _forward_cpu(policy_logits, ref_logits, labels, temperature, ignore_index):
    policy, policy_kept = rows(policy_logits)
    ref, ref_kept = rows(ref_logits)
    labels = labels.contiguous()
    out = empty.token_logratios(policy_logits, labels)
    backend.native.token_logratios_forward(
        *map(buffer, out), policy, ref, buffer(labels), ignore_index, temperature, threads()
    )
    del policy_kept, ref_kept
    return out


forward_op: Op = define(
    "token_logratios_forward(Tensor policy_logits, Tensor ref_logits, Tensor labels, float temperature, "
    "int ignore_index) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_cpu,
    lambda policy_logits, _ref, labels, *_: empty.token_logratios(policy_logits, labels),
    triton="token_logratios.forward",
    check=lambda policy_logits, _ref, labels, _temperature, ignore_index: checks.labels_in_range(
        labels, policy_logits.shape[-1], ignore_index
    ),
    leading_dims=True,
)
