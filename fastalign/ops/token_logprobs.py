"""token_logprobs: the log-probability of each label, and statistics of the softmax it came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, TypedDict, overload

import torch
from torch import Tensor

from fastalign import backend, empty, reference
from fastalign._base.dtypes import compute_dtype
from fastalign.backend import threads
from fastalign.ops import checks
from fastalign.ops.buffers import buffer, rows
from fastalign.ops.library import Op, define
from fastalign.ops.once import once

if TYPE_CHECKING:
    from typing_extensions import Unpack

OUTPUTS = ("log_probs", "entropy", "mean_logits", "log_sum_sq_probs", "is_top1")


class TokenLogprobs(NamedTuple):
    """What `token_logprobs` returns if more than `log_probs` is requested; None for outputs that are not."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    is_top1: Tensor | None = None


# `outputs` of one name gives a tensor; of several, or of another one, a TokenLogprobs.
LogProbs: TypeAlias = "tuple[Literal['log_probs']]"
More: TypeAlias = (
    "tuple[str, str, Unpack[tuple[str, ...]]] | tuple[Literal['entropy', 'mean_logits', 'log_sum_sq_probs', 'is_top1']]"
)


class Options(TypedDict, total=False):
    """Options of `token_logprobs`, besides `outputs`."""

    temperature: float
    softcap: float | None
    ignore_index: int


@overload
def token_logprobs(
    logits: Tensor, labels: Tensor, *, outputs: LogProbs = ("log_probs",), **options: Unpack[Options]
) -> Tensor: ...
@overload
def token_logprobs(logits: Tensor, labels: Tensor, *, outputs: More, **options: Unpack[Options]) -> TokenLogprobs: ...
@overload
def token_logprobs(
    logits: Tensor, labels: Tensor, *, outputs: tuple[str, ...], **options: Unpack[Options]
) -> Tensor | TokenLogprobs: ...
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("log_probs",),
) -> Tensor | TokenLogprobs:
    """log softmax(z)[label] with z = softcap · tanh(logits / softcap) / temperature, in one read of the logits.

    Equals `logits.div(temperature).log_softmax(-1).gather(-1, labels[..., None])` without its (..., V) temporaries.

    Args:
        logits: (..., V) float32, float64, bfloat16 or float16, any strides (a slice such as `logits[:, :-1]` is
            read in place). -inf masks a vocabulary entry; a row that is all -inf gives 0 and no gradient.
        labels: (...) int64 in [0, V), or `ignore_index`. On a GPU any other label gives NaN in its row, because raising
            would force a synchronisation.
        temperature: divides the logits; positive.
        softcap: the logits' softcap, applied first (Gemma 2); None for none.
        ignore_index: positions with this label give 0 in every output and no gradient.
        outputs: any of "log_probs", "entropy" (nats), "mean_logits" (mean of z), "log_sum_sq_probs" (log Σ p²) and
            "is_top1" (bool: the label is the first maximum of the logits; always False in a row with NaN or +inf).
            log_probs and entropy carry gradients.

    Returns:
        log_probs (...) float32 (float64 for float64 logits) if nothing else is requested, else a `TokenLogprobs`.

    Raises:
        UserError, TypeError: a shape, dtype, device, label or option that breaks these rules.

    >>> import torch
    >>> from fastalign import ops
    >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]])
    >>> ops.token_logprobs(logits, torch.tensor([2, -100]))  # log ¼; ignored
    tensor([-1.3863,  0.0000])
    >>> ops.token_logprobs(logits, torch.tensor([2, 0]), outputs=("log_probs", "is_top1")).is_top1
    tensor([False,  True])
    """
    checks.logits("logits", logits)
    checks.labels("logits", logits, labels)
    checks.positive("temperature", temperature)
    if softcap is not None:
        checks.positive("softcap", softcap)
    checks.integer("ignore_index", ignore_index)
    checks.outputs(outputs, OUTPUTS)
    if backend.choose(logits.device) == "reference":
        checks.labels_in_range(labels, logits.shape[-1], ignore_index)
        fields = reference.token_logprobs(logits, labels, temperature, softcap, ignore_index)
    else:
        options = RowOptions(
            float(temperature), float(softcap or 0.0), ignore_index, statistics=statistics_for(outputs)
        )
        log_probs, _, _, entropy, mean_logits, log_sum_sq_probs, is_top1 = _TokenLogprobs.apply(logits, labels, options)
        fields = dict(zip(OUTPUTS, (log_probs, entropy, mean_logits, log_sum_sq_probs, is_top1), strict=True))
    if tuple(outputs) == ("log_probs",):
        return fields["log_probs"]
    return TokenLogprobs(**{name: fields[name] for name in outputs})


def statistics_for(outputs: tuple[str, ...]) -> int:
    """Which statistics a pass that is to give `outputs` makes: 0, empty.ENTROPY or empty.ALL."""
    wanted = {*outputs} - {"log_probs"}
    return empty.ALL if wanted - {"entropy"} else empty.ENTROPY if wanted else 0


class RowOptions(NamedTuple):
    """What the two ops take besides tensors, in their order; softcap 0 for none."""

    temperature: float
    softcap: float
    ignore_index: int
    statistics: int  # 0: none; empty.ENTROPY, empty.ALL


class _TokenLogprobs(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits, labels, options):
        return forward_op(logits, labels, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, labels, ctx.options = inputs
        _, row_max, row_sum, entropy, mean_logits, log_sum_sq_probs, is_top1 = output
        ctx.mark_non_differentiable(row_max, row_sum, mean_logits, log_sum_sq_probs, is_top1)
        ctx.save_for_backward(logits, labels, row_max, row_sum, entropy)

    @staticmethod
    def backward(ctx, grad_log_probs, _max, _sum, grad_entropy, *_rest):
        logits, labels, row_max, row_sum, entropy = ctx.saved_tensors
        grad_entropy = grad_entropy if ctx.options.statistics else torch.zeros_like(grad_log_probs)
        saved = (row_max, row_sum, entropy, logits, labels)
        return once(backward_op, grad_log_probs, grad_entropy, *saved, *ctx.options), None, None


def _forward_cpu(logits, labels, temperature, softcap, ignore_index, statistics):
    described, kept = rows(logits)
    labels = labels.contiguous()
    out = empty.token_logprobs(logits, labels, statistics=statistics)
    whole = out  # the compiled pass makes all statistics or none
    if statistics == empty.ENTROPY:
        whole = (*out[:4], *empty.token_logprobs(logits, labels, statistics=empty.ALL)[4:])
    made = [buffer(x) if x.shape == labels.shape else None for x in whole]
    backend.native.token_logprobs_forward(
        *made, described, buffer(labels), ignore_index, temperature, softcap, threads()
    )
    del kept
    return out


def _backward_cpu(
    grad_log_probs,
    grad_entropy,
    row_max,
    row_sum,
    entropy,
    logits,
    labels,
    temperature,
    softcap,
    ignore_index,
    statistics,
):
    described, kept = rows(logits)
    grad = torch.empty(logits.shape, dtype=logits.dtype)
    small = [grad_log_probs, grad_entropy, row_max, row_sum, entropy]
    small = [x.to(compute_dtype(logits.dtype)).contiguous() for x in small]
    labels = labels.contiguous()
    if not statistics:
        small[1] = small[4] = None
    backend.native.token_logprobs_backward(
        buffer(grad), *map(buffer, small), described, buffer(labels), ignore_index, temperature, softcap, threads()
    )
    del kept
    return grad


def _backward_fake(
    grad_log_probs,
    grad_entropy,
    row_max,
    row_sum,
    entropy,
    logits,
    labels,
    temperature,
    softcap,
    ignore_index,
    statistics,
):
    return logits.new_empty(logits.shape)


forward_op: Op = define(
    "token_logprobs_forward(Tensor logits, Tensor labels, float temperature, float softcap, int ignore_index, "
    "int statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_cpu,
    lambda logits, labels, *options: empty.token_logprobs(logits, labels, statistics=options[-1]),
    triton="token_logprobs.forward",
    check=lambda logits, labels, _temperature, _softcap, ignore_index, *_: checks.labels_in_range(
        labels, logits.shape[-1], ignore_index
    ),
    leading_dims=True,
)
backward_op: Op = define(
    "token_logprobs_backward(Tensor grad_log_probs, Tensor grad_entropy, Tensor row_max, Tensor row_sum, "
    "Tensor entropy, Tensor logits, Tensor labels, float temperature, float softcap, int ignore_index, "
    "int statistics) -> Tensor",
    _backward_cpu,
    _backward_fake,
    triton="token_logprobs.backward",
    leading_dims=True,
)
