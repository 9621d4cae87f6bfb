"""linear_token_logprobs: log-probabilities of labels from hidden states and the head's weight, without the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

from torch import Tensor

from fastalign.ops import dtensor, head
from fastalign.ops.head import Adapter, LinearOptions
from fastalign.ops.token_logprobs import LogProbs, More, TokenLogprobs

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    outputs: LogProbs = ("log_probs",),
    **options: Unpack[LinearOptions],
) -> Tensor: ...
@overload
def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, outputs: More, **options: Unpack[LinearOptions]
) -> TokenLogprobs: ...
@overload
def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, outputs: tuple[str, ...], **options: Unpack[LinearOptions]
) -> Tensor | TokenLogprobs: ...
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("log_probs",),
    grad_filter: float | None = None,
    adapter: Adapter | None = None,
    memory_budget: int | None = None,
) -> Tensor | TokenLogprobs:
    """`token_logprobs` of logit_scale · (hidden Wᵀ + bias), a language model's head, without holding the logits.

    Only positions whose label is not ignored are projected. Products and sums are float32 (float64 for float64) in
    every dtype; bfloat16 and float16 weights are widened a tile at a time. On a GPU, where hidden and weight are of one
    narrow dtype, so are a tile's gradients and an adapter's low-rank activations, once each; autocast makes float32
    tensors its own type there, as for a linear layer, and changes nothing on the CPU.

    Args:
        hidden: (..., H) float32, bfloat16, float16 or float64, any strides.
        weight: (V, H), of these dtypes; float64 goes with float64 only.
        labels: (...) int64 in [0, V), or `ignore_index`. A label out of range raises on the CPU; on a GPU, where
            raising would force a synchronisation, its row is NaN.
        bias: (V,), or None. -inf masks a vocabulary entry.
        temperature, softcap, ignore_index, outputs: as in `token_logprobs`.
        logit_scale: multiplies the logits before the softcap; positive.
        grad_filter: softmax entries below it count as 0 in the gradient (except the label's), and vocabulary entries
            that are dropped for 1,024 consecutive tokens are left out of the two backward products. Not exact. Measured
            on 800 tokens that SmolLM2-135M sampled: 2^-12 drops 4 % of the probability and changes the gradient of
            hidden by 5 % and of weight by 0.9 % (relative norm); 2^-16 by 1.4 % and 0.16 %; 2^-20 by 0.3 % and 0.02 %.
            None: the exact gradient, as always for a frozen head.
        adapter: (A (r, H), B (V, r), scale): a LoRA on the head. The logits are those of W + scale · B A, which is
            never formed; A and B get gradients.
        memory_budget: bytes for tiles of logits kept for the backward pass; each saves one product of four, with the
            same results. No effect if weight, bias, A and B need no gradient. None: the size of the weight's gradient
            (the tiles are released as it is filled) plus 40 MB (float64: 0). Set 0 if several calls wait for their
            backward pass and memory is short. On a GPU, None is 0: nothing is released there before the end. All tiles
            take N · V numbers of hidden's dtype; in a narrow one they bring the gradient one more rounding of each
            probability. There is no effect with softcap or grad_filter, nor on AMD's GPUs.

    DTensors: a plain hidden contains this process's own rows, as under FSDP. A DTensor weight (bias, adapter) is then
    gathered, and its gradient averaged over the mesh, as FSDP does for all other weights; this is also correct if all
    processes have the same rows. A hidden that is a DTensor, Replicate() on its mesh, declares that they do: a weight
    that is Shard(0) over one dimension of the mesh then stays sharded, and `vocab_parallel_linear_token_logprobs` runs.
    Results are plain tensors in both cases. (In the forward pass of a module that owns the weight, FSDP2 itself passes
    a plain one.)

    Returns:
        log_probs (...) float32 (float64 for float64) if nothing else is requested, else a `TokenLogprobs`. Memory
        beyond the gradients: at most 64 MB and, if hidden is narrow or partly ignored, its scored rows in float32. On a
        GPU: hidden in float32, a copy of hidden, and for tiles 16 KB a row or as much as hidden in float32, at least 64
        MB.

    Raises:
        UserError, TypeError: a shape, dtype, device, label or option that breaks these rules.
    """
    run = dtensor.linear_token_logprobs if dtensor.among(hidden, weight, bias, adapter) else head.token_logprobs
    return run(
        hidden, weight, labels, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        ignore_index=ignore_index, outputs=outputs, grad_filter=grad_filter, adapter=adapter,
        memory_budget=memory_budget,
    )  # fmt: skip
