"""linear_token_logprobs on the GPU: launchers. The kernels are in _head.py and _products.py.

Forward: one product. Tiles of logits live in registers and shared memory; each row block reads the weight once, and
three numbers a row and split of the vocabulary are written.

With a budget tiles are kept (_kept.py): the library makes their logits, and the backward pass only reads them.

Backward: three products, a part of the vocabulary at a time. A kernel makes the part's logits again and writes their
gradient into a workspace, of the narrow type where hidden and weight both are narrow, else float32; the vendor's
library multiplies it with the weight, into a float32 gradient of hidden, and with hidden, into the part's rows of the
weight's gradient, which are then complete. With `grad_filter` our own products take the library's place: they leave
out each block of the gradient (rows × vocabulary, of the tile's size) that holds only zeros.

Frozen head: two products in all, both going forward. The first writes exp(z - m), m the block's largest logit, into the
workspace; the second multiplies it with the weight and joins the blocks by their m, as an online softmax joins them.
An entropy gradient, if one comes, takes two more, over the rows that have one.

All sums are in a fixed order. Nothing waits for the device: which rows count is known there alone.
"""

from __future__ import annotations

import torch
import triton
from fastalign.kernels import _head, _kept
from fastalign.kernels._head_layout import TALL_GRADIENT, Head, adapter_fits, entropy_fits, parts, plain
from fastalign.kernels._kept import Kept, kept_in, kept_size
from fastalign.kernels._products import alive_lists, library_add, library_product, product
from fastalign.kernels._softmax import compute_type
from torch import Tensor

from fastalign import empty
from fastalign._base.dtypes import compute_dtype

SPLIT = 16  # vocabulary blocks of one program, at most: long enough to hide its start, short enough to end together
PROGRAMS = 1024  # that many at least, as far as there are blocks
FP16_EXPONENT = 10  # gradients in float16 are scaled so that the largest lies below 2^10: an entropy's may be 2^5 more


@plain
def forward(
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
    statistics,
    unit,
    memory_budget,
):
    """The op's forward pass. A label out of range gives NaN."""
    size = kept_size(hidden, weight, labels, softcap, memory_budget)
    found = empty.linear_token_logprobs(hidden, labels, statistics=statistics, unit=unit, kept=size)
    if labels.numel() == 0:
        return found
    head = Head(
        hidden, weight, bias, a, b, labels, adapter_scale, labels != ignore_index, temperature, softcap, logit_scale
    )
    if (statistics and (unit or not entropy_fits(hidden.device))) or (
        a is not None and not adapter_fits(hidden.device)
    ):
        head.use_narrow()
    elif not statistics and not unit:
        head.use_tall()
    results = (*found[:3], *(found[3:7] if statistics else [None] * 4))
    if unit:
        partial = _unit_gradient(head, found[8], statistics)  # a frozen head is given no budget
    else:
        partial = _states(head, kept_in(found[7], head.dot, head.rows), statistics)
    _merge(head, results, None, partial, 1 if unit else partial.shape[1], statistics)
    return found


def _states(head: Head, kept: Kept | None, statistics: int) -> Tensor:
    """The state of each row over each split of the vocabulary; fills `kept`, of which each block is one."""
    first, end = (0, 0) if kept is None else (len(kept.tops), min(kept.columns, head.vocab))
    blocks = triton.cdiv(head.vocab - end, head.blocks.columns)
    each = min(max(blocks * head.row_blocks // PROGRAMS, 1), SPLIT)
    splits = triton.cdiv(blocks, each)
    partial = head.weight.new_empty((_kinds(statistics), first + splits, head.rows), dtype=head.compute)
    if kept is not None:
        _kept.keep(kept, head, partial, statistics)
    if splits:
        _head.forward_tiles[(head.row_blocks * splits,)](
            partial, None, slots=first + splits, slot=first, first=end, last=head.vocab, blocks=each, splits=splits,
            exps_row=0, exps_scale=1.0, STATISTICS=statistics, **head.arguments(),
        )  # fmt: skip
    return partial


def _kinds(statistics: int) -> int:
    return {0: _head.KINDS, empty.ENTROPY: _head.KINDS_ENTROPY, empty.ALL: _head.KINDS_ALL}[statistics]


def _merge(head, results, rescale, partial, used, statistics) -> None:
    block_m = 16
    _head.merge_tiles[(triton.cdiv(head.rows, block_m),)](
        *results, rescale, partial, head.labels, head.position, head.count, head.rows, partial.shape[1], used,
        head.vocab, STATISTICS=statistics, COMPUTE=compute_type(head.compute), BLOCK_M=block_m,
        BLOCK_S=min(64, triton.next_power_of_2(used)), enable_fp_fusion=True, num_warps=4,
    )  # fmt: skip


def _unit_gradient(head: Head, unit: Tensor, statistics: int) -> Tensor:
    """Fills `unit`; returns the state of each row, in slot 0 of what it returns."""
    new, part = head.weight.new_empty, head.part(head.blocks.columns, head.dot)
    slots = 1 + part // head.blocks.columns
    partial = new((_kinds(statistics), slots, head.rows), dtype=head.compute)
    partial[:, 0] = 0
    partial[0, 0] = torch.finfo(head.compute).min
    if statistics == empty.ALL:
        partial[-1, 0] = float("-inf")
    exps, rescale = head.workspace(part), new(head.rows, dtype=head.compute)
    scale = _kept.SCALE.get(head.dot, 1.0)
    total = new((head.rows, head.width), dtype=head.compute)
    low = None if head.b is None else new((head.rows, head.b.shape[1]), dtype=head.compute)
    starts = torch.arange(0, head.row_blocks * head.blocks.rows, head.blocks.rows, device=unit.device)
    every = torch.arange(slots - 1, device=unit.device, dtype=torch.int32).expand(head.row_blocks, -1)
    for first, last in parts(0, head.vocab, part):
        blocks = triton.cdiv(last - first, head.blocks.columns)
        _head.forward_tiles[(head.row_blocks * blocks,)](
            partial, exps, slots=slots, slot=1, first=first, last=last, blocks=1, splits=blocks, exps_row=part,
            exps_scale=scale, STATISTICS=statistics, **head.arguments(),
        )  # fmt: skip
        _merge(head, [None] * 7, rescale, partial, 1 + blocks, statistics)
        _head.join_exps[(triton.cdiv(head.rows, 32), blocks)](
            exps, partial[0, 1:], partial[0, 0], head.count, head.rows, part,
            BLOCK_M=32, BLOCK_N=head.blocks.columns, enable_fp_fusion=True, num_warps=4,
        )  # fmt: skip
        for out, of in ((total, head.weight), (low, head.b)):
            if out is not None:
                product(
                    out,
                    exps,
                    of[first:last],
                    (every, (starts < head.count).int() * blocks),
                    (head.rows, last - first, of.shape[1]),
                    add=first > 0,
                    dot=head.dot,
                    blocks=head.blocks,
                    sizes=head.blocks[:2],
                    rescale=rescale,
                )
    largest, sums, label_z = partial[:3, 0]
    if low is not None:  # the adapter's share of both terms goes into `total`
        labels = head.labels[head.position].clamp(0, head.vocab - 1)
        slope = 1 - (label_z / head.to_z).square() if head.softcap else torch.ones_like(label_z)
        low -= (scale * sums * slope)[:, None] * head.b.index_select(0, labels).to(low.dtype)
        total.addmm_(low, head.a.to(low.dtype), alpha=head.adapter_scale)
    block_n = min(512, triton.next_power_of_2(head.width))
    _head.unit_rows[(triton.cdiv(head.rows, 8), triton.cdiv(head.width, block_n))](
        unit, total, head.weight, head.labels, head.position, head.count, largest, sums, label_z, head.rows, head.vocab,
        head.width, *head.weight.stride(), scale, head.to_cap, head.to_z, head.slope,
        SOFTCAP=head.softcap, COMPUTE=compute_type(head.compute), BLOCK_M=8, BLOCK_N=block_n,
        enable_fp_fusion=True, num_warps=4,
    )  # fmt: skip
    return partial


@plain
def backward(
    grad_log_probs, grad_entropy, row_max, row_sum, entropy, kept, unit, hidden, weight, bias, a, b, labels,
    adapter_scale, temperature, softcap, logit_scale, ignore_index, grad_filter, needs,
):  # fmt: skip
    """The op's backward pass."""
    inputs = (hidden, weight, bias, a, b)
    dtype = compute_dtype(hidden.dtype)
    if labels.numel() == 0:
        return tuple(
            hidden.new_zeros(x.shape if need else 0, dtype=x.dtype) if x is not None else hidden.new_empty(0)
            for x, need in zip(inputs, needs, strict=True)
        )
    frozen = unit.numel() > 0 and not any(needs[1:])
    has_entropy = entropy.shape == labels.shape
    by_unit = None
    if frozen:
        g = grad_log_probs.to(dtype).unsqueeze(-1)
        by_unit = (g * unit).masked_fill_(g == 0, 0)
        grad_log_probs = torch.zeros_like(grad_log_probs)
    if frozen and not has_entropy:
        return by_unit.to(hidden.dtype), *(hidden.new_empty(0) for _ in range(4))
    if not has_entropy:
        entropy = grad_entropy = torch.zeros_like(row_max)
    given = torch.stack([x.reshape(-1).to(dtype) for x in (grad_log_probs, grad_entropy, row_max, row_sum, entropy)])
    counts = (labels.reshape(-1) != ignore_index) & ((given[0] != 0) | (given[1] != 0))
    given[:2].masked_fill_(~counts, 0)
    head = Head(hidden, weight, bias, a, b, labels, adapter_scale, counts, temperature, softcap, logit_scale)
    # ROCm's library does not sum narrow numbers in float32.
    own = frozen or grad_filter > 0 or torch.version.hip is not None
    if (has_entropy or grad_filter > 0) and not entropy_fits(hidden.device):
        head.use_narrow()
    elif not has_entropy and not own:
        head.use_tall(TALL_GRADIENT)
    tiles = kept_in(kept, head.dot, head.rows)
    before = (labels.reshape(-1) != ignore_index).cumsum(0) - 1  # in the forward pass's order
    grads = _Gradients(head, given, has_entropy, 0.0 if frozen else grad_filter, own, tiles, before).make(needs)
    if needs[0]:
        by_label = torch.empty_like(grads[0]).index_copy_(0, head.position, grads[0]).view(hidden.shape)
        grads[0] = by_label if by_unit is None else by_label.add_(by_unit)
    pairs = zip(grads, inputs, strict=True)
    return tuple(hidden.new_empty(0) if grad is None else grad.to(x.dtype) for grad, x in pairs)


class _Gradients:
    """Of the scored rows of hidden, in order of `position`, and of weight, bias, A and B."""

    def __init__(self, head, given, has_entropy: bool, grad_filter: float, own: bool, kept: Kept | None, kept_row):
        self.head, self.given, self.has_entropy, self.grad_filter = head, given, has_entropy, grad_filter
        self.own, self.kept = own, kept
        self.kept_row = None if kept is None else kept_row[head.position]
        self.unscale = None
        if head.dot == torch.float16:
            largest = given[:2].abs().sum(0).amax().nan_to_num() * head.slope
            exponent = FP16_EXPONENT - torch.frexp(largest)[1].clamp(-100, 100).to(head.compute)
            given[:2] *= exponent.exp2()
            self.unscale = (-exponent).exp2()

    def make(self, needs) -> list[Tensor | None]:
        head, (to_hidden, to_weight, to_bias, to_a, to_b) = self.head, needs
        new, rank = head.weight.new_empty, 0 if head.b is None else head.b.shape[1]
        by_low = head.low is not None and (to_hidden or to_a)
        hidden = new((head.rows, head.width), dtype=head.compute).zero_() if to_hidden else None
        low = new((head.rows, rank), dtype=head.compute).zero_() if by_low else None
        weight = new(head.weight.shape) if to_weight else None
        bias = new(head.vocab, dtype=head.compute) if to_bias else None
        b = new((head.vocab, rank), dtype=head.compute) if to_b else None
        rows = head.scored_rows() if to_a or (to_weight and not self.own) else None
        low_rows = head.past_zero(head.low.index_select(0, head.position)) if to_b else None
        kept, end, width = self.kept, 0, head.part(head.blocks.columns, head.dot)
        if kept is not None:
            end, width = min(kept.columns, head.vocab), head.part(_kept.STEP, head.dot)
        tile = head.workspace(width).zero_()
        for first, last in (*parts(0, end, width), *parts(end, head.vocab, width)):
            if kept is not None and first < end:
                alive = None
                _kept.gradient(kept, head, tile, self.given, self.kept_row, first, last, self.has_entropy)
            else:
                alive = self._tiles(tile, first, last)
            part = tile[: head.rows, : last - first]
            for total, of in ((hidden, head.weight), (low, head.b)):
                if total is not None:
                    self._add(total, part, of, first, last, alive)
            if to_weight:
                self._complete(weight, part, rows, first, last, alive)
            if to_b:
                library_product(b[first:last], part.t(), low_rows, self.unscale)
            if to_bias:
                torch.sum(part, 0, dtype=head.compute, out=bias[first:last])
        if self.unscale is not None:
            for total in (hidden, low, bias):
                if total is not None:
                    total *= self.unscale
        if low is not None:
            low *= head.adapter_scale
            if to_hidden:
                hidden.addmm_(low, head.a.to(low.dtype))
        a = low.t() @ rows.to(low.dtype) if to_a else None
        return [hidden, weight, bias, a, b]

    def _tiles(self, tile: Tensor, first: int, last: int) -> Tensor | None:
        """Fills the workspace; marks (row block, block) what holds anything, for our own products."""
        head = self.head
        blocks = triton.cdiv(last - first, head.blocks.columns)
        alive = tile.new_zeros((head.row_blocks, blocks), dtype=torch.int32) if self.own else None
        _head.gradient_tiles[(head.row_blocks * blocks,)](
            tile, alive, self.given, first=first, last=last, blocks=blocks, tile_row=tile.stride(0),
            slope=head.slope, grad_filter=self.grad_filter, ENTROPY=self.has_entropy, FILTER=self.grad_filter > 0,
            **head.arguments(),
        )  # fmt: skip
        return alive

    def _add(self, total: Tensor, part: Tensor, of: Tensor, first: int, last: int, alive: Tensor | None) -> None:
        """total (rows, ..) += part @ of, the vocabulary's rows of it."""
        head = self.head
        if not self.own:
            library_add(total, part, of[first:last].to(head.dot))
            return
        product(
            total,
            part,
            of[first:last],
            alive_lists(alive),
            (head.rows, last - first, of.shape[1]),
            add=True,
            dot=head.dot,
            blocks=head.blocks,
            sizes=head.blocks[:2],
        )

    def _complete(self, weight: Tensor, part: Tensor, rows, first: int, last: int, alive: Tensor | None) -> None:
        """The part's rows of the weight's gradient: part^T @ hidden."""
        head = self.head
        if not self.own:
            library_product(weight[first:last], part.t(), rows, self.unscale)
            return
        product(
            weight[first:last],
            part.t(),
            head.all_rows(),
            alive_lists(alive.t()),
            (last - first, head.rows, head.width),
            add=False,
            dot=head.dot,
            blocks=head.blocks,
            sizes=head.blocks[1::-1],
            b_index=head.place,
            limit=head.count,
            unscale=self.unscale,
        )
