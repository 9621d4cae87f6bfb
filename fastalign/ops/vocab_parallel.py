"""Vocabulary-parallel log-probabilities: each process holds a slice of the vocabulary, and none holds a whole row.

The ops of `token_logprobs` and `linear_token_logprobs` run on the slice. Their results are combined by the chain rule
of probability, log p(label) = log p(label | its slice) + log p(its slice), with two small reductions: the maximum, then
one packed sum. The backward ops take the whole row's maximum and sum instead of the slice's, so a slice of the weight
gets its gradient without communication; only the gradient of `hidden`, to which all slices contribute, is summed over
processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, overload

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign import backend, reference
from fastalign._base.dtypes import compute_dtype
from fastalign._base.errors import UserError
from fastalign.empty import ALL
from fastalign.ops import checks, head
from fastalign.ops.head import HeadOptions, LinearOptions
from fastalign.ops.head import backward_op as head_backward
from fastalign.ops.head import forward_op as head_forward
from fastalign.ops.once import once
from fastalign.ops.token_logprobs import OUTPUTS, LogProbs, More, Options, RowOptions, TokenLogprobs, statistics_for
from fastalign.ops.token_logprobs import backward_op as rows_backward
from fastalign.ops.token_logprobs import forward_op as rows_forward

if TYPE_CHECKING:
    from typing_extensions import Unpack

NEG_INF = float("-inf")
IGNORED, ELSEWHERE = -1, -2  # labels within a slice: skipped by the ops; scored, but no entry of this slice


class Split(TypedDict, total=False):
    """The process group and the split."""

    group: dist.ProcessGroup | None
    sizes: Sequence[int] | None


class SplitOptions(Options, Split, total=False):
    """Options of `vocab_parallel_token_logprobs`, besides `outputs`."""


class SplitLinearOptions(LinearOptions, Split, total=False):
    """Options of `vocab_parallel_linear_token_logprobs`, besides `outputs`."""


@overload
def vocab_parallel_token_logprobs(
    logits_shard: Tensor, labels: Tensor, *, outputs: LogProbs = ("log_probs",), **options: Unpack[SplitOptions]
) -> Tensor: ...
@overload
def vocab_parallel_token_logprobs(
    logits_shard: Tensor, labels: Tensor, *, outputs: More, **options: Unpack[SplitOptions]
) -> TokenLogprobs: ...
@overload
def vocab_parallel_token_logprobs(
    logits_shard: Tensor, labels: Tensor, *, outputs: tuple[str, ...], **options: Unpack[SplitOptions]
) -> Tensor | TokenLogprobs: ...
def vocab_parallel_token_logprobs(
    logits_shard: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("log_probs",),
) -> Tensor | TokenLogprobs:
    """`token_logprobs` of logits whose vocabulary is split over the processes of `group`, in the order of their ranks.

    Every process calls it with the same labels and options and gets the same results. The loss computed from them must
    also be the same everywhere, because each process gets only the gradient of its own slice.

    Args:
        logits_shard: (..., V_r), this process's slice; slices may differ in size and may be empty.
        labels: (...) int64 in [0, Σ V_r), or `ignore_index`; indices into the whole vocabulary.
        group: the processes; None for all of them.
        sizes: the V_r of all ranks, if known; otherwise they are gathered, which synchronises the device. The shapes
            are then compared too, and if one process rejects its arguments, all of them raise.
        temperature, softcap, ignore_index, outputs: as in `token_logprobs`.

    Returns:
        As `token_logprobs`. A label out of range raises on the CPU and gives NaN elsewhere.

    Raises:
        UserError, TypeError: torch.distributed is not initialised, or an argument breaks these rules.
    """

    def check():
        checks.logits("logits_shard", _nonempty(logits_shard), last="V_r")
        checks.labels("logits_shard", logits_shard, labels)
        checks.positive("temperature", temperature)
        if softcap is not None:
            checks.positive("softcap", softcap)
        checks.integer("ignore_index", ignore_index)
        checks.outputs(outputs, OUTPUTS)
        return {"size": logits_shard.shape[-1], "labels.numel()": labels.numel()}

    part = _agree(check, logits_shard, group, sizes)
    if backend.choose(logits_shard.device) == "reference":
        checks.labels_in_range(labels, part.vocab, ignore_index)
        fields = reference.token_logprobs(_whole(logits_shard, part, -1), labels, temperature, softcap, ignore_index)
    else:
        options = RowOptions(
            float(temperature), float(softcap or 0.0), ignore_index, statistics=statistics_for(outputs)
        )
        fields = _named(*_VocabParallelTokens.apply(logits_shard, labels, options, part))
    return _selected(fields, outputs)


@overload
def vocab_parallel_linear_token_logprobs(
    hidden: Tensor,
    weight_shard: Tensor,
    labels: Tensor,
    *,
    outputs: LogProbs = ("log_probs",),
    **options: Unpack[SplitLinearOptions],
) -> Tensor: ...
@overload
def vocab_parallel_linear_token_logprobs(
    hidden: Tensor, weight_shard: Tensor, labels: Tensor, *, outputs: More, **options: Unpack[SplitLinearOptions]
) -> TokenLogprobs: ...
@overload
def vocab_parallel_linear_token_logprobs(
    hidden: Tensor,
    weight_shard: Tensor,
    labels: Tensor,
    *,
    outputs: tuple[str, ...],
    **options: Unpack[SplitLinearOptions],
) -> Tensor | TokenLogprobs: ...
def vocab_parallel_linear_token_logprobs(
    hidden: Tensor,
    weight_shard: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("log_probs",),
    grad_filter: float | None = None,
    adapter: head.Adapter | None = None,
    memory_budget: int | None = None,
) -> Tensor | TokenLogprobs:
    """`linear_token_logprobs` with a head whose rows are split over the processes of `group`, as in tensor parallelism.

    Every process calls it with the same hidden, labels and options and gets the same results. The loss computed from
    them must also be the same everywhere. `hidden.grad` is then the full gradient, summed over the processes, and each
    slice of the head has its own gradient. Do not use this function if the processes hold different rows of hidden
    (data parallelism): then each needs the whole head.

    Args:
        hidden: (..., H), the same on every process.
        weight_shard: (V_r, H), this process's slice; slices may differ in size and may be empty.
        labels: (...) int64 in [0, Σ V_r), or `ignore_index`; indices into the whole vocabulary.
        group, sizes: as in `vocab_parallel_token_logprobs`.
        bias: (V_r,), or None.
        adapter: (A (r, H), the same on every process; B (V_r, r); scale): a LoRA on the head.
        temperature, softcap, logit_scale, ignore_index, outputs, grad_filter, memory_budget: as in
            `linear_token_logprobs`. A frozen head has no special case: three products, not two.

    Returns:
        As `linear_token_logprobs`. A label out of range raises on the CPU and gives NaN elsewhere.

    Raises:
        UserError, TypeError: torch.distributed is not initialised, or an argument breaks these rules.
    """

    def check():
        lora = tuple(_nonempty(x, 0) for x in adapter) if isinstance(adapter, tuple | list) else adapter
        head.check(
            hidden,
            _nonempty(weight_shard, 0),
            labels,
            _nonempty(bias, 0),
            temperature,
            softcap,
            logit_scale,
            grad_filter,
            lora,
            memory_budget,
        )
        for name, x in (("bias", bias), ("adapter's B", adapter and adapter[1])):
            if x is not None and len(x) != len(weight_shard):
                raise UserError(f"{name} must have weight_shard's rows, got {len(x)} and {len(weight_shard)}")
        checks.integer("ignore_index", ignore_index)
        checks.outputs(outputs, OUTPUTS)
        return {"size": len(weight_shard), "labels.numel()": labels.numel(), "hidden.shape[-1]": hidden.shape[-1]}

    part = _agree(check, hidden, group, sizes)
    chosen = backend.choose(hidden.device)
    a, b, adapter_scale = (None, None, 1.0) if adapter is None else adapter
    if chosen == "reference":
        checks.labels_in_range(labels, part.vocab, ignore_index)
        with torch.autocast(hidden.device.type, enabled=False):
            whole_b = None if b is None else _whole(b, part, 0)
            fields = reference.linear_token_logprobs(
                hidden,
                _whole(weight_shard, part, 0),
                labels,
                None if bias is None else _whole(bias, part, 0),
                temperature,
                softcap,
                logit_scale,
                ignore_index,
                None if a is None or whole_b is None else (a, whole_b, adapter_scale),
            )
    else:
        hidden, weight_shard, bias, a, b = head.as_autocast(hidden.device, hidden, weight_shard, bias, a, b)
        learns = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (weight_shard, bias, a, b)]
        options = HeadOptions(
            float(adapter_scale),
            float(temperature),
            float(softcap or 0.0),
            float(logit_scale),
            ignore_index,
            statistics=statistics_for(outputs),
            unit=False,
            memory_budget=head.budget(memory_budget, weight_shard, learns[0], chosen, grad_filter)
            if any(learns)
            else 0,
            grad_filter=float(grad_filter or 0.0),
        )
        *fields, _ = _VocabParallelLinear.apply(hidden, weight_shard, bias, a, b, labels, options, part)
        fields = _named(*fields)
    return _selected(fields, outputs)


class _Part(NamedTuple):
    """This process's slice of the vocabulary."""

    group: Any
    rank: int
    sizes: list[int]  # of every rank

    @property
    def size(self) -> int:
        return self.sizes[self.rank]

    @property
    def first(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def vocab(self) -> int:
        return sum(self.sizes)

    def within(self, labels: Tensor, ignore_index: int, elsewhere: int) -> tuple[Tensor, Tensor]:
        """labels relative to the slice, and whether they are in it."""
        ignored = labels == ignore_index
        inside = (labels >= self.first) & (labels < self.first + self.size) & ~ignored
        return (labels - self.first).masked_fill(~inside, elsewhere).masked_fill(ignored, IGNORED), inside


def _agree(check: Callable[[], dict[str, int]], x: Tensor, group: Any, sizes: Sequence[int] | None) -> _Part:
    """Run `check`, which describes this process's arguments, and gather the others' descriptions.

    If one process raised alone, the others would wait forever, so errors are shared.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise UserError("vocabulary-parallel ops need torch.distributed.init_process_group() first")
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise UserError("this process must belong to group, and does not")
    if sizes is not None:
        size = check()["size"]
        if len(sizes) != world or sizes[rank] != size:
            raise UserError(f"sizes must hold the slice of each of {world} ranks, here {size}, got {list(sizes)}")
        return _Part(group, rank, list(sizes))
    brings, refused = {}, None
    try:
        brings = check()
    except (UserError, TypeError) as error:
        refused = error
    mine = torch.tensor(list(brings.values()) + [-1] * (3 - len(brings)), device=getattr(x, "device", "cpu"))
    gathered = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(gathered, mine, group=group)
    everyones = torch.stack(gathered).tolist()
    if refused is not None:
        raise refused
    for other, theirs in enumerate(everyones):
        if theirs[0] < 0:
            raise UserError(f"the arguments on rank {other} are invalid")
    for (name, _), *each in list(zip(brings.items(), *everyones, strict=False))[1:]:
        if len(set(each)) > 1:
            raise UserError(f"{name} must be the same on every rank, got {each}")
    return _Part(group, rank, [theirs[0] for theirs in everyones])


def _nonempty(x: Any, dim: int = -1) -> Any:
    """x, or one entry if it is empty, for checks that reject size 0."""
    if not isinstance(x, Tensor) or x.ndim == 0 or x.shape[dim]:
        return x
    shape = list(x.shape)
    shape[dim] = 1
    return x.new_empty(shape)


def _combine(own: Sequence[Tensor] | None, labels: Tensor, ignore_index: int, part: _Part, dtype, statistics):
    """Combines each slice's results into those of the whole row; in float64, because there are few rows."""
    if labels.device.type == "cpu":  # on other devices it would force a synchronisation
        checks.labels_in_range(labels, part.vocab, ignore_index)
    ignored, (_, inside) = labels == ignore_index, part.within(labels, ignore_index, ELSEWHERE)
    if own is None:
        nothing = torch.zeros(labels.shape, dtype=dtype, device=labels.device)
        own = (nothing, nothing + NEG_INF, *[nothing] * 4, inside)
    log_probs, row_max, row_sum, entropy, mean_logits, log_sum_sq_probs, is_top1 = own
    top = row_max.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=part.group)
    shift = top.double().masked_fill(top == NEG_INF, 0)
    log_mass = (row_max.double() - shift) + row_sum.double().log()  # of the slice, up to the row's sum
    mass = log_mass.exp()
    terms = [mass, (log_probs.double() + log_mass).masked_fill(~inside, 0)]
    if statistics:
        terms.append((mass * (entropy.double() - log_mass)).masked_fill(mass == 0, 0))
    if statistics == ALL:
        first = inside & is_top1 & (row_max >= top)
        before = (labels >= part.first + part.size) & (row_max >= top)  # of several largest, the first counts
        terms += [
            mean_logits.double() * part.size,
            (2 * log_mass + log_sum_sq_probs.double()).exp(),
            (before | (inside & ~first)).double(),
        ]
    terms = torch.stack(terms)
    dist.all_reduce(terms, group=part.group)
    row_sum, label_logit, *rest = terms.unbind()
    log_sum = row_sum.log()
    skip = ignored | (row_sum == 0)
    nowhere = ((labels < 0) | (labels >= part.vocab)) & ~ignored
    out = [(label_logit - log_sum).masked_fill(nowhere, float("nan")).masked_fill(skip, 0), top, row_sum]
    if statistics:
        out.append((log_sum + rest[0] / row_sum).masked_fill(skip, 0))
    if statistics != ALL:
        nothing = out[0].new_empty(*labels.shape, 0)
        out += [nothing.clone() for _ in range(6 - len(out))]
        return *(x.to(dtype) for x in out), nothing.bool()
    _, total, squares, beaten = rest
    out += [
        (total / part.vocab).masked_fill(ignored, 0),
        (squares.log() - 2 * log_sum).masked_fill(skip, 0),
    ]
    return *(x.to(dtype) for x in out), (beaten == 0) & ~skip & ~nowhere & ~row_sum.isnan()


class _VocabParallelTokens(torch.autograd.Function):
    @staticmethod
    def forward(logits, labels, options, part):
        ignore_index, own = options.ignore_index, None
        if part.size:
            local, _ = part.within(labels, ignore_index, elsewhere=0)  # any entry will do: what it gives is not read
            own = rows_forward(logits, local, *options._replace(ignore_index=IGNORED))
        return _combine(own, labels, ignore_index, part, compute_dtype(logits.dtype), options.statistics)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, labels, ctx.options, ctx.part = inputs
        _, row_max, row_sum, entropy, mean_logits, log_sum_sq_probs, is_top1 = output
        ctx.mark_non_differentiable(row_max, row_sum, mean_logits, log_sum_sq_probs, is_top1)
        ctx.save_for_backward(logits, labels, row_max, row_sum, entropy)

    @staticmethod
    def backward(ctx, grad_log_probs, _max, _sum, grad_entropy, *_rest):
        logits, labels, row_max, row_sum, entropy = ctx.saved_tensors
        if not ctx.part.size:
            return once(_no_gradient, logits, grad_log_probs), None, None, None
        local, _ = ctx.part.within(labels, ctx.options.ignore_index, ELSEWHERE)
        grad_entropy = grad_entropy if ctx.options.statistics else torch.zeros_like(grad_log_probs)
        grad = once(
            rows_backward,
            grad_log_probs,
            grad_entropy,
            row_max,
            row_sum,
            entropy,
            logits,
            local,
            *ctx.options._replace(ignore_index=IGNORED),
        )
        return grad, None, None, None


class _VocabParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(hidden, weight, bias, a, b, labels, options, part):
        dtype, ignore_index = compute_dtype(hidden.dtype), options.ignore_index
        own, kept = None, hidden.new_empty(0, dtype=dtype)
        if part.size:
            local, _ = part.within(labels, ignore_index, elsewhere=0)  # any entry will do: what it gives is not read
            given = options._replace(ignore_index=IGNORED).of_forward()
            *own, kept, _ = head_forward(hidden, weight, bias, a, b, local, *given)
        return *_combine(own, labels, ignore_index, part, dtype, options.statistics), kept

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)  # otherwise autograd allocates zeros for the kept tiles too
        *tensors, ctx.options, ctx.part = inputs
        _, row_max, row_sum, entropy, mean_logits, log_sum_sq_probs, is_top1, kept = output
        ctx.mark_non_differentiable(row_max, row_sum, mean_logits, log_sum_sq_probs, is_top1, kept)
        ctx.save_for_backward(row_max, row_sum, entropy, kept, *tensors)

    @staticmethod
    def backward(ctx, grad_log_probs, _max, _sum, grad_entropy, *_rest):
        if grad_log_probs is None and grad_entropy is None:
            return (None,) * 8
        row_max, row_sum, entropy, kept, *inputs, labels = ctx.saved_tensors
        grad_log_probs = torch.zeros_like(row_max) if grad_log_probs is None else grad_log_probs
        grad_entropy = torch.zeros_like(row_max) if grad_entropy is None or not ctx.options.statistics else grad_entropy
        needs = list(ctx.needs_input_grad[:5])
        if ctx.part.size:
            local, _ = ctx.part.within(labels, ctx.options.ignore_index, ELSEWHERE)
            given = ctx.options._replace(ignore_index=IGNORED).of_backward()
            grads = once(
                head_backward, grad_log_probs, grad_entropy, row_max, row_sum, entropy, kept, row_max.new_empty(0),
                *inputs, local, *given, needs,
            )  # fmt: skip
        else:
            grads = [once(_no_gradient, x, *inputs) if need else None for x, need in zip(inputs, needs, strict=True)]
        grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        for i in (0, 3):  # hidden and A, whose gradients are summed over the slices
            if needs[i]:
                grads[i] = once(_summed, grads[i], ctx.part)
        return *grads, None, None, None


def _no_gradient(x: Tensor, *_others) -> Tensor:
    return torch.zeros_like(x)


def _summed(grad: Tensor, part: _Part) -> Tensor:
    total = grad.to(compute_dtype(grad.dtype)).contiguous()
    dist.all_reduce(total, group=part.group)
    return total.to(grad.dtype)


def _whole(x: Tensor, part: _Part, dim: int) -> Tensor:
    """All slices concatenated, for the reference: this process's slice carries its gradient, the others are
    constants."""
    mine = x.detach().movedim(dim, 0)
    padded = torch.cat([mine, mine.new_zeros(max(part.sizes) - part.size, *mine.shape[1:])])
    everyones = [torch.empty_like(padded) for _ in part.sizes]
    dist.all_gather(everyones, padded, group=part.group)
    slices = [each[:size].movedim(0, dim) for each, size in zip(everyones, part.sizes, strict=True)]
    slices[part.rank] = x
    return torch.cat(slices, dim)


def _named(log_probs, _row_max, _row_sum, entropy, mean_logits, log_sum_sq_probs, is_top1) -> dict[str, Tensor]:
    return dict(zip(OUTPUTS, (log_probs, entropy, mean_logits, log_sum_sq_probs, is_top1), strict=True))


def _selected(fields: dict[str, Tensor], outputs: tuple[str, ...]) -> Tensor | TokenLogprobs:
    if tuple(outputs) == ("log_probs",):
        return fields["log_probs"]
    return TokenLogprobs(**{name: fields[name] for name in outputs})
