"""The head's ops on plain tensors, used by `linear_token_logprobs`, its vocabulary-parallel form and
`linear_sample_tokens`.

Tiles of logits (tokens × part of the vocabulary) are computed by torch's matrix product, read once by the kernel, and
overwritten by the next tile. The backward pass computes each tile again, replaces it with its gradient in place, and
adds the two products with it: four products in total. Tiles kept from the forward pass save one product; they use the
memory of the weight's gradient and are released as it is filled, so the peak does not grow. A frozen head takes two
products: the hidden gradient is linear in the gradient of each log-probability, so it is computed in the forward pass
and only scaled later.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastalign import backend, empty, reference
from fastalign._base.dtypes import DTYPES, compute_dtype
from fastalign._base.errors import UserError
from fastalign.ops import checks, linear_cpu
from fastalign.ops.library import Op, define
from fastalign.ops.linear_cpu import kept_size
from fastalign.ops.once import once
from fastalign.ops.token_logprobs import OUTPUTS, Options, TokenLogprobs, statistics_for

Adapter: TypeAlias = "tuple[Tensor, Tensor, float]"  # A (r, H), B (V, r), scale
KEPT_BYTES = 40 << 20  # of tiles, beyond the size of the weight's gradient


class LinearOptions(Options, total=False):
    """Options of `linear_token_logprobs`, besides `outputs`."""

    bias: Tensor | None
    logit_scale: float
    grad_filter: float | None
    adapter: Adapter | None
    memory_budget: int | None


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    outputs: tuple[str, ...],
    grad_filter: float | None,
    adapter: Adapter | None,
    memory_budget: int | None,
) -> Tensor | TokenLogprobs:
    """See `ops.linear_token_logprobs`."""
    check(hidden, weight, labels, bias, temperature, softcap, logit_scale, grad_filter, adapter, memory_budget)
    checks.integer("ignore_index", ignore_index)
    checks.outputs(outputs, OUTPUTS)
    chosen = backend.choose(hidden.device)
    if chosen == "reference":
        checks.labels_in_range(labels, weight.shape[0], ignore_index)
        with torch.autocast(hidden.device.type, enabled=False):
            fields = reference.linear_token_logprobs(
                hidden, weight, labels, bias, temperature, softcap, logit_scale, ignore_index, adapter
            )
    else:
        a, b, adapter_scale = (None, None, 1.0) if adapter is None else adapter
        inputs = as_autocast(hidden.device, hidden, weight, bias, a, b)
        learns = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
        head_learns = learns[1] or learns[2] or learns[3] or learns[4]
        options = HeadOptions(
            float(adapter_scale),
            float(temperature),
            float(softcap or 0.0),
            float(logit_scale),
            ignore_index,
            statistics=statistics_for(outputs),
            unit=learns[0] and not head_learns,
            memory_budget=budget(memory_budget, weight, learns[1], chosen, grad_filter) if head_learns else 0,
            grad_filter=float(grad_filter or 0.0),
        )
        log_probs, _, _, entropy, mean_logits, log_sum_sq_probs, is_top1, _, _ = _LinearTokenLogprobs.apply(
            *inputs, labels, options
        )
        fields = dict(zip(OUTPUTS, (log_probs, entropy, mean_logits, log_sum_sq_probs, is_top1), strict=True))
    if tuple(outputs) == ("log_probs",):
        return fields["log_probs"]
    return TokenLogprobs(**{name: fields[name] for name in outputs})


def as_autocast(device: torch.device, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Float32 tensors in autocast's type where it is on for a GPU, as F.linear takes them: in float32 the tensor cores
    would stand still. On a CPU tensors stay as they are."""
    return tuple(x if x is None else x.to(autocast_type(device, x.dtype)) for x in tensors)


def autocast_type(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    if dtype != torch.float32 or device.type in ("cpu", "meta") or not torch.is_autocast_enabled(device.type):
        return dtype
    return torch.get_autocast_dtype(device.type)


def check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    grad_filter: float | None,
    adapter: Adapter | None,
    memory_budget: int | None,
) -> None:
    checks.logits("hidden", hidden, last="H")
    checks.labels("hidden", hidden, labels)
    _head("weight", weight, hidden, 2, "(V, H)")
    if weight.shape[1] != hidden.shape[-1]:
        raise UserError(f"hidden.shape[-1] must equal weight.shape[1], got {hidden.shape[-1]} and {weight.shape[1]}")
    if bias is not None:
        _head("bias", bias, hidden, 1, "(V,)")
        if bias.shape[0] != weight.shape[0]:
            raise UserError(f"bias.shape[0] must equal weight.shape[0], got {bias.shape[0]} and {weight.shape[0]}")
    if adapter is not None:
        if not (isinstance(adapter, tuple | list) and len(adapter) == 3 and isinstance(adapter[2], int | float)):
            raise checks.WrongType(f"adapter must be (A, B, scale) with a number as scale, got {checks.shown(adapter)}")
        a, b, _ = adapter
        _head("adapter's A", a, hidden, 2, "(r, H)")
        _head("adapter's B", b, hidden, 2, "(V, r)")
        if (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
            raise UserError(
                f"adapter's A (r, H) and B (V, r) must fit weight (V, H), "
                f"got {tuple(a.shape)}, {tuple(b.shape)} and {tuple(weight.shape)}"
            )
    checks.positive("temperature", temperature)
    checks.positive("logit_scale", logit_scale)
    if softcap is not None:
        checks.positive("softcap", softcap)
    if grad_filter is not None and not (isinstance(grad_filter, int | float) and 0 < grad_filter < 1):
        raise UserError(f"grad_filter must be a number between 0 and 1, or None, got {checks.shown(grad_filter)}")
    if memory_budget is not None and not (isinstance(memory_budget, int) and memory_budget >= 0):
        raise UserError(
            f"memory_budget must be a number of bytes, at least 0, or None, got {checks.shown(memory_budget)}"
        )


def _head(name: str, x: Tensor, hidden: Tensor, ndim: int, rule: str) -> None:
    checks.tensor(name, x)
    if x.dtype not in DTYPES or compute_dtype(x.dtype) != compute_dtype(hidden.dtype):
        kinds = "float64" if hidden.dtype == torch.float64 else "float32, bfloat16 or float16"
        raise checks.WrongType(f"{name} must be {kinds} if hidden is {hidden.dtype}, got {x.dtype}")
    if x.device != hidden.device:
        raise UserError(f"{name} must be on hidden's device, got {x.device} and {hidden.device}")
    if x.ndim != ndim or 0 in x.shape:
        raise UserError(f"{name} must have shape {rule} with no size 0, got {tuple(x.shape)}")


def budget(memory_budget: int | None, weight: Tensor, learns: bool, chosen: str, grad_filter: float | None) -> int:
    """Bytes for tiles. On a GPU none are released as the weight's gradient is filled, so that they are kept on request
    alone; and a filter there saves more."""
    if chosen != "cpu":
        return 0 if memory_budget is None or grad_filter else memory_budget
    if memory_budget is not None:
        return memory_budget
    if weight.dtype == torch.float64:  # for gradcheck: a second backward pass must give the same bits
        return 0
    return KEPT_BYTES + (weight.numel() * weight.dtype.itemsize if learns else 0)


class HeadOptions(NamedTuple):
    """What the head's two ops take besides tensors: see `ops.linear_token_logprobs`."""

    adapter_scale: float
    temperature: float
    softcap: float
    logit_scale: float
    ignore_index: int
    statistics: int  # which to compute: 0, empty.ENTROPY, empty.ALL
    unit: bool  # whether to compute hidden's gradient in the forward pass
    memory_budget: int  # bytes for tiles
    grad_filter: float

    def of_forward(self) -> tuple[float | int | bool, ...]:
        """In the forward op's order."""
        return self[:8]

    def of_backward(self) -> tuple[float | int, ...]:
        """In the backward op's order."""
        return (*self[:5], self.grad_filter)


class _LinearTokenLogprobs(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(hidden, weight, bias, a, b, labels, options):
        return forward_op(hidden, weight, bias, a, b, labels, *options.of_forward())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)  # otherwise autograd allocates zeros for the kept tiles too
        *tensors, ctx.options = inputs
        _, row_max, row_sum, entropy, mean_logits, log_sum_sq_probs, is_top1, kept, unit = output
        ctx.mark_non_differentiable(row_max, row_sum, mean_logits, log_sum_sq_probs, is_top1, kept, unit)
        ctx.save_for_backward(row_max, row_sum, entropy, kept, unit, *tensors)

    @staticmethod
    def backward(ctx, grad_log_probs, _max, _sum, grad_entropy, *_rest):
        if grad_log_probs is None and grad_entropy is None:
            return (None,) * 7
        saved, options = ctx.saved_tensors, ctx.options
        grad_log_probs = torch.zeros_like(saved[0]) if grad_log_probs is None else grad_log_probs
        grad_entropy = torch.zeros_like(saved[0]) if grad_entropy is None or not options.statistics else grad_entropy
        needs = list(ctx.needs_input_grad[:5])
        grads = once(backward_op, grad_log_probs, grad_entropy, *saved, *options.of_backward(), needs)
        return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None)


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    labels: Tensor,
    adapter_scale: float,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    statistics: int,
    unit: bool,
    memory_budget: int,
) -> tuple[Tensor, ...]:
    if memory_budget and backend.choose(hidden.device) == "triton":
        from fastalign import kernels

        kept = kernels.launcher("linear_token_logprobs.kept_size")(hidden, weight, labels, softcap, memory_budget)
    else:
        kept = kept_size(weight, labels, memory_budget, compute_dtype(hidden.dtype))
    return empty.linear_token_logprobs(hidden, labels, statistics=statistics, unit=unit, kept=kept)


def _backward_fake(
    grad_log_probs,
    grad_entropy,
    row_max,
    row_sum,
    entropy,
    kept,
    unit,
    hidden,
    weight,
    bias,
    a,
    b,
    labels,
    adapter_scale,
    temperature,
    softcap,
    logit_scale,
    ignore_index,
    grad_filter,
    needs,
):
    pairs = zip((hidden, weight, bias, a, b), needs, strict=True)
    return tuple(x.new_empty(x.shape) if need else hidden.new_empty(0) for x, need in pairs)


def _check_labels(
    _hidden, weight, _bias, _a, _b, labels, _scale, _temperature, _softcap, _logit_scale, ignore_index, *_
):
    checks.labels_in_range(labels, weight.shape[0], ignore_index)


_TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? a, Tensor? b, Tensor labels"
_OPTIONS = "float adapter_scale, float temperature, float softcap, float logit_scale, int ignore_index"

forward_op: Op = define(
    f"linear_token_logprobs_forward({_TENSORS}, {_OPTIONS}, int statistics, bool unit, int memory_budget) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    linear_cpu.forward,
    _forward_fake,
    triton="linear_token_logprobs.forward",
    check=_check_labels,
    vmap_in_turn=True,
)
backward_op: Op = define(
    "linear_token_logprobs_backward(Tensor grad_log_probs, Tensor grad_entropy, Tensor row_max, Tensor row_sum, "
    f"Tensor entropy, Tensor kept, Tensor unit, {_TENSORS}, {_OPTIONS}, float grad_filter, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    linear_cpu.backward,
    _backward_fake,
    triton="linear_token_logprobs.backward",
    vmap_in_turn=True,
)
