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
    every dtype and under autocast; bfloat16 and float16 weights are widened a tile at a time. On a GPU, where hidden
    and weight are of one narrow dtype, so are a tile's gradients and an adapter's low-rank activations, once each.

    Args:
        hidden: (..., H) float32, bfloat16, float16 or float64, any strides.
        weight: (V, H), of these dtypes; float64 goes with float64 only.
        labels: (...) int64 in [0, V), or `ignore_index`. Out of range it raises; on a GPU, where that would mean to
            wait, its row is NaN.
        bias: (V,), or None. -inf masks a vocabulary entry.
        temperature, softcap, ignore_index, outputs: as in `token_logprobs`.
        logit_scale: multiplies the logits before the softcap; positive.
        grad_filter: entries of the softmax below it count as 0 in the gradient (the label's excepted), and vocabulary
            entries that so fall out for 1,024 tokens in turn are left out of the two backward products. Not exact.
            Measured on 800 tokens that SmolLM2-135M sampled: 2^-12 drops 4 % of the probability and changes the
            gradient of hidden by 5 % and of weight by 0.9 % (relative norm); 2^-16 by 1.4 % and 0.16 %; 2^-20 by
            0.3 % and 0.02 %. None for the exact gradient, as a frozen head's always is.
        adapter: (A (r, H), B (V, r), scale): a LoRA on the head. Its logits are those of W + scale · B A, which is
            not formed; A and B get gradients.
        memory_budget: bytes for tiles of logits that the backward pass then need not make again; each spares one
            product of four, and results are the same. Without effect where weight, bias, A and B need no gradient.
            None: the size of the weight's gradient, as the tiles are given up while it is made, and 40 MB (float64:
            0). Set 0 where several calls wait for their backward pass and memory is short.

    DTensors: a plain hidden is taken for this process's own rows, as under FSDP. A weight (bias, adapter) that is a
    DTensor is then gathered, and its gradient averaged over the mesh, as FSDP averages those of all other weights;
    that is right also where all processes have the same rows. A hidden that is a DTensor, Replicate() on its mesh,
    says that they do: a weight that is Shard(0) over one dimension of the mesh then stays where it is, and
    `vocab_parallel_linear_token_logprobs` runs. Results are plain tensors either way. (Within the forward pass of a
    module that owns the weight, FSDP2 itself hands out a plain one.)

    Returns:
        log_probs (...) float32 (float64 for float64) where only that is asked for, else a `TokenLogprobs`. Memory
        beyond the gradients: at most 64 MB and, where hidden is narrow or partly ignored, its scored rows in float32.
        On a GPU: hidden in float32, hidden again, and as much as hidden in float32, at least 64 MB, for tiles.

    Raises:
        UserError, TypeError: a shape, dtype, device, label or option that breaks these rules.
    """
    run = dtensor.linear_token_logprobs if dtensor.among(hidden, weight, bias, adapter) else head.token_logprobs
    return run(
        hidden, weight, labels, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        ignore_index=ignore_index, outputs=outputs, grad_filter=grad_filter, adapter=adapter,
        memory_budget=memory_budget,
    )  # fmt: skip
