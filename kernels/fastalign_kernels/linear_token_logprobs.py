"""linear_token_logprobs on the GPU: launchers. The kernels are in _head.py and _products.py.

Forward: one product. Tiles of logits live in registers and shared memory; each row block reads the weight once, and
three numbers a row and split of the vocabulary are written.

Backward: three products, a part of the vocabulary at a time. A kernel makes the part's logits again and writes their
gradient into a workspace, of the narrow type where hidden and weight both are narrow, else float32; the vendor's library
multiplies it with the weight, into a float32 gradient of hidden, and with hidden, into the part's rows of the weight's
gradient, which are then complete. With `grad_filter` our own products take the library's place: they leave out each
block of the gradient (rows × vocabulary, of the tile's size) that holds only zeros.

Frozen head: two products in all, both going forward. The first writes exp(z - m), m the block's largest logit, into the
workspace; the second multiplies it with the weight and joins the blocks by their m, as an online softmax joins them.
An entropy gradient, if one comes, takes two more, over the rows that have one.

All sums are in a fixed order. Nothing waits for the device: which rows count is known there alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from fastalign.kernels import _head
from fastalign.kernels._products import TYPES, alive_lists, library_add, library_product, product
from fastalign.kernels._softmax import compute_type, transform_factors
from torch import Tensor
from triton.runtime import driver

from fastalign.ops import _checks
from fastalign.ops._rows import compute_dtype
from fastalign.ops.linear_token_logprobs import _forward_fake


class Blocks(NamedTuple):
    """Of one product: a tile's rows and columns, the width of one step of its sum; warps and pipeline stages."""

    rows: int
    columns: int
    width: int
    warps: int
    stages: int


# 128 × 128 in 8 warps: 64 accumulators a thread, so that two blocks fit a processor and one computes its softmax while
# the other multiplies. Exact float32 and float64 products are fused multiply-adds of each thread: smaller tiles.
BLOCKS = {
    torch.bfloat16: Blocks(128, 128, 64, 8, 3),
    torch.float16: Blocks(128, 128, 64, 8, 3),
    torch.float32: Blocks(64, 64, 32, 8, 2),
    torch.float64: Blocks(32, 32, 32, 8, 2),
}
SPLIT = 16  # vocabulary blocks of one program, at most: long enough to hide its start, short enough to end together
PROGRAMS = 1024  # that many at least, as far as there are blocks
GROUP_BYTES = 16 << 20  # of hidden states that stay in the second-level cache
WORKSPACE = 64 << 20  # bytes of gradients of logits, or the size of hidden in float32 if that is more
FP16_EXPONENT = 10  # gradients in float16 are scaled so that the largest lies below 2^10: an entropy's may be 2^5 more
EXPS_SCALE = {torch.float16: 2.0**15}  # exp(z - m) is at most 1: up to float16's largest


class Head:
    """What all kernels of the head are given: its tensors with their strides, and the rows that count."""

    def __init__(self, hidden, weight, bias, a, b, labels, adapter_scale, scored, temperature, softcap, logit_scale):
        self.compute = compute_dtype(hidden.dtype)
        self.dot = hidden.dtype if hidden.dtype == weight.dtype else self.compute
        if self.dot == torch.bfloat16 and hidden.device.type == "cpu":
            self.dot = torch.float32  # Triton's interpreter multiplies bfloat16 as integers, and truncates to it
        self.hidden, self.weight, self.a, self.b, self.adapter_scale = hidden, weight, a, b, adapter_scale
        self.rows, (self.vocab, self.width) = labels.numel(), weight.shape
        self.position = torch.argsort((~scored).reshape(-1).to(torch.uint8), stable=True)
        self.count = scored.sum()
        places, self.hidden_row = row_places(hidden)
        self.place = places[self.position]
        self.low = None
        if a is not None:
            scaled = (a.to(self.compute) * adapter_scale).to(self.dot)
            self.low = (hidden.to(self.dot) @ scaled.T).reshape(self.rows, len(a)).contiguous()
        self.labels, self.bias = labels.reshape(-1), None if bias is None else bias.contiguous()
        self.to_cap, self.to_z, self.slope = transform_factors(temperature, softcap, logit_scale)
        self.softcap = softcap != 0
        self.blocks = fitting_blocks(self.dot, self.rows, self.width)
        self.row_blocks = triton.cdiv(self.rows, self.blocks.rows)
        block_bytes = self.blocks.rows * self.width * hidden.dtype.itemsize
        self.group = max(1, GROUP_BYTES // block_bytes)

    def arguments(self) -> dict:
        """Of forward_tiles and gradient_tiles."""
        rank = 0 if self.b is None else self.b.shape[1]
        b_row, b_step = (0, 0) if self.b is None else self.b.stride()
        return {
            "hidden": self.hidden, "weight": self.weight, "bias": self.bias, "low": self.low, "b": self.b,
            "labels": self.labels, "position": self.position, "place": self.place, "count": self.count,
            "rows": self.rows, "row_blocks": self.row_blocks, "group": self.group, "width": self.width, "rank": rank,
            "hidden_row": self.hidden_row, "hidden_step": self.hidden.stride(-1),
            "weight_row": self.weight.stride(0), "weight_step": self.weight.stride(1), "b_row": b_row, "b_step": b_step,
            "to_cap": self.to_cap, "to_z": self.to_z, "SOFTCAP": self.softcap,
            "DOT": TYPES[self.dot], "COMPUTE": compute_type(self.compute), "EVEN": self.width % self.blocks.width == 0,
            "BLOCK_M": self.blocks.rows, "BLOCK_N": self.blocks.columns, "BLOCK_K": self.blocks.width,
            "BLOCK_R": min(self.blocks.width, max(16, triton.next_power_of_2(rank))),
            "num_warps": self.blocks.warps, "num_stages": self.blocks.stages,
        }  # fmt: skip

    def narrow(self) -> None:
        """Tiles of fewer columns: where more is kept of each logit."""
        self.blocks = self.blocks._replace(columns=min(self.blocks.columns, 64))

    def part(self) -> int:
        """How much of the vocabulary a workspace (rows, part) spans: a multiple of a tile's columns."""
        size = max(WORKSPACE, self.rows * self.width * self.compute.itemsize)
        columns = self.blocks.columns
        fits = max(1, size // (self.rows * self.dot.itemsize * columns))
        return min(fits, triton.cdiv(self.vocab, columns)) * columns

    def workspace(self) -> Tensor:
        """For whole tiles of one part."""
        return self.weight.new_empty((self.row_blocks * self.blocks.rows, self.part()), dtype=self.dot)

    def parts(self):
        """(first, last, blocks of columns) of each part of the vocabulary."""
        part = self.part()
        for first in range(0, self.vocab, part):
            last = min(first + part, self.vocab)
            yield first, last, triton.cdiv(last - first, self.blocks.columns)

    def all_rows(self) -> Tensor:
        """hidden as a view (places, H): `place` says which of its rows count."""
        last = sum((n - 1) * s for n, s in zip(self.hidden.shape[:-1], self.hidden.stride()[:-1], strict=True))
        shape, strides = (last // self.hidden_row + 1, self.width), (self.hidden_row, self.hidden.stride(-1))
        return self.hidden.as_strided(shape, strides)

    def scored_rows(self) -> Tensor:
        """The hidden states (rows, H) in order of `position`, in the products' type; 0 past the count."""
        return self.past_zero(self.all_rows().index_select(0, self.place).to(self.dot))

    def past_zero(self, x: Tensor) -> Tensor:
        """x (rows, ..) with 0 past the count, in place."""
        past = torch.arange(self.rows, device=x.device) >= self.count
        return x.masked_fill_(past[:, None], 0)


def fitting_blocks(dtype: torch.dtype, rows: int, width: int) -> Blocks:
    """Fewer rows where there are few, down to the least that the tensor cores take; shorter steps for an odd width."""
    blocks = BLOCKS[dtype]
    if width % blocks.width:  # loads of few bytes, each with its own address
        blocks = blocks._replace(width=min(blocks.width, 32))
    least = min(blocks.rows, max(16, triton.next_power_of_2(rows)))
    return blocks._replace(rows=least, warps=blocks.warps if least > 32 else min(blocks.warps, 4))


def entropy_fits(device: torch.device) -> bool:
    """Whether what an entropy and its gradient take fits the registers beside a tile of 128 columns."""
    if device.type == "cpu":
        return True
    target = driver.active.get_current_target()
    return target.backend == "cuda" and target.arch == 90


def row_places(x: Tensor) -> tuple[Tensor, int]:
    """Row i of x (..., H) begins `places[i] · stride` elements into it, whatever its strides."""
    dims = list(zip(x.shape[:-1], x.stride()[:-1], strict=True))
    stride = math.gcd(*(s for n, s in dims if n > 1)) or 1
    places = torch.zeros((), dtype=torch.int64, device=x.device)
    for n, s in dims:
        places = places.unsqueeze(-1) + torch.arange(n, device=x.device) * (s // stride if n > 1 else 0)
    return places.reshape(-1), stride


def _plain(launcher):
    """Without the caller's autocast, which would round the library's products, and without a tape."""

    def run(*args, **options):
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        with torch.no_grad(), torch.autocast("cpu" if device == "meta" else device, enabled=False):
            return launcher(*args, **options)

    return run


@_plain
def forward(
    hidden, weight, bias, a, b, labels, adapter_scale, temperature, softcap, logit_scale, ignore_index, statistics,
    unit, memory_budget,
):  # fmt: skip
    """The op's forward pass; keeps no tiles. A label out of range gives NaN (on CPU tensors it raises)."""
    if labels.device.type == "cpu":
        _checks.labels_in_range(labels, weight.shape[0], ignore_index)
    found = _forward_fake(
        hidden, weight, bias, a, b, labels, adapter_scale, temperature, softcap, logit_scale, ignore_index, statistics,
        unit, 0,
    )  # fmt: skip
    if labels.numel() == 0:
        return found
    head = Head(
        hidden, weight, bias, a, b, labels, adapter_scale, labels != ignore_index, temperature, softcap, logit_scale
    )
    if statistics and (unit or not entropy_fits(hidden.device)):
        head.narrow()
    results = (*found[:3], *(found[3:7] if statistics else [None] * 4))
    if unit:
        partial = _unit_gradient(head, found[8], statistics)
    else:
        blocks = triton.cdiv(head.vocab, head.blocks.columns)
        each = min(max(blocks * head.row_blocks // PROGRAMS, 1), SPLIT)
        splits = triton.cdiv(blocks, each)
        kinds = _head.KINDS_ALL if statistics else _head.KINDS
        partial = hidden.new_empty((kinds, splits, head.rows), dtype=head.compute)
        _head.forward_tiles[(head.row_blocks * splits,)](
            partial, None, slots=splits, slot=0, first=0, last=head.vocab, blocks=each, splits=splits, exps_row=0,
            exps_scale=1.0, STATISTICS=statistics, **head.arguments(),
        )  # fmt: skip
    _merge(head, results, None, partial, 1 if unit else partial.shape[1], statistics)
    return found


def _merge(head, results, rescale, partial, used, statistics) -> None:
    block_m = 16
    _head.merge_tiles[(triton.cdiv(head.rows, block_m),)](
        *results, rescale, partial, head.labels, head.position, head.count, head.rows, partial.shape[1], used, head.vocab,
        STATISTICS=statistics, COMPUTE=compute_type(head.compute), BLOCK_M=block_m,
        BLOCK_S=min(64, triton.next_power_of_2(used)), num_warps=4,
    )  # fmt: skip


def _unit_gradient(head: Head, unit: Tensor, statistics: bool) -> Tensor:
    """Fills `unit`; returns the state of each row, in slot 0 of what it returns."""
    new, part = head.weight.new_empty, head.part()
    slots = 1 + part // head.blocks.columns
    partial = new((_head.KINDS_ALL if statistics else _head.KINDS, slots, head.rows), dtype=head.compute)
    partial[:, 0] = 0
    partial[0, 0] = torch.finfo(head.compute).min
    if statistics:
        partial[-1, 0] = float("-inf")
    exps, rescale = head.workspace(), new(head.rows, dtype=head.compute)
    scale = EXPS_SCALE.get(head.dot, 1.0)
    total = new((head.rows, head.width), dtype=head.compute)
    low = None if head.b is None else new((head.rows, head.b.shape[1]), dtype=head.compute)
    starts = torch.arange(0, head.row_blocks * head.blocks.rows, head.blocks.rows, device=unit.device)
    every = torch.arange(slots - 1, device=unit.device, dtype=torch.int32).expand(head.row_blocks, -1)
    for first, last, blocks in head.parts():
        _head.forward_tiles[(head.row_blocks * blocks,)](
            partial, exps, slots=slots, slot=1, first=first, last=last, blocks=1, splits=blocks, exps_row=part,
            exps_scale=scale, STATISTICS=statistics, **head.arguments(),
        )  # fmt: skip
        _merge(head, [None] * 7, rescale, partial, 1 + blocks, statistics)
        for out, of in ((total, head.weight), (low, head.b)):
            if out is not None:
                product(
                    out, exps, of[first:last], (every, (starts < head.count).int() * blocks),
                    (head.rows, last - first, of.shape[1]), add=first > 0, dot=head.dot, blocks=head.blocks,
                    sizes=head.blocks[:2], states=(partial[0, 1:], partial[0, 0], rescale),
                )  # fmt: skip
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
        SOFTCAP=head.softcap, COMPUTE=compute_type(head.compute), BLOCK_M=8, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return partial


@_plain
def backward(
    grad_log_probs, grad_entropy, row_max, row_sum, entropy, kept, unit, hidden, weight, bias, a, b, labels,
    adapter_scale, temperature, softcap, logit_scale, ignore_index, grad_filter, needs, *, order=None,
):  # fmt: skip
    """The op's backward pass. order: (V,) a permutation to walk the vocabulary in, for `grad_filter` (see below)."""
    inputs = (hidden, weight, bias, a, b)
    dtype = compute_dtype(hidden.dtype)
    if labels.numel() == 0:
        return tuple(hidden.new_zeros(x.shape if need else 0, dtype=x.dtype) if x is not None else hidden.new_empty(0)
                     for x, need in zip(inputs, needs, strict=True))  # fmt: skip
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
    if has_entropy and not entropy_fits(hidden.device):
        head.narrow()
    own = frozen or grad_filter > 0 or order is not None
    grads = _Gradients(head, given, has_entropy, 0.0 if frozen else grad_filter, own, order).make(needs)
    if needs[0]:
        spread = torch.empty_like(grads[0]).index_copy_(0, head.position, grads[0]).view(hidden.shape)
        grads[0] = spread if by_unit is None else spread.add_(by_unit)
    pairs = zip(grads, inputs, strict=True)
    return tuple(hidden.new_empty(0) if grad is None else grad.to(x.dtype) for grad, x in pairs)


class _Gradients:
    """Of the scored rows of hidden, in order of `position`, and of weight, bias, A and B."""

    def __init__(
        self, head: Head, given: Tensor, has_entropy: bool, grad_filter: float, own: bool, order: Tensor | None
    ):
        self.head, self.given, self.has_entropy, self.grad_filter = head, given, has_entropy, grad_filter
        # ROCm's library does not sum narrow numbers in float32.
        self.own, self.order = own or torch.version.hip is not None, order
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
        tile = head.workspace().zero_()
        for first, last, blocks in head.parts():
            alive = self._tiles(tile, first, last, blocks)
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
        if self.order is not None:
            bias, b = (x if x is None else torch.empty_like(x).index_copy_(0, self.order, x) for x in (bias, b))
        if low is not None:
            low *= head.adapter_scale
            if to_hidden:
                hidden.addmm_(low, head.a.to(low.dtype))
        a = low.t() @ rows.to(low.dtype) if to_a else None
        return [hidden, weight, bias, a, b]

    def _tiles(self, tile: Tensor, first: int, last: int, blocks: int) -> Tensor | None:
        """Fills the workspace; marks (row block, block) what holds anything, for our own products."""
        head = self.head
        alive = tile.new_zeros((head.row_blocks, blocks), dtype=torch.int32) if self.own else None
        _head.gradient_tiles[(head.row_blocks * blocks,)](
            tile, alive, self.given, self.order, first=first, last=last, blocks=blocks, tile_row=tile.stride(0),
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
            total, part, of[first:last] if self.order is None else of, alive_lists(alive),
            (head.rows, last - first, of.shape[1]), add=True, dot=head.dot, blocks=head.blocks, sizes=head.blocks[:2],
            b_index=None if self.order is None else self.order[first:last],
        )  # fmt: skip

    def _complete(self, weight: Tensor, part: Tensor, rows, first: int, last: int, alive: Tensor | None) -> None:
        """The part's rows of the weight's gradient: part^T @ hidden."""
        head = self.head
        if not self.own:
            library_product(weight[first:last], part.t(), rows, self.unscale)
            return
        product(
            weight[first:last] if self.order is None else weight, part.t(), head.all_rows(), alive_lists(alive.t()),
            (last - first, head.rows, head.width), add=False, dot=head.dot, blocks=head.blocks,
            sizes=head.blocks[1::-1], out_index=None if self.order is None else self.order[first:last],
            b_index=head.place, limit=head.count, unscale=self.unscale,
        )  # fmt: skip


def mean_logit_order(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The vocabulary (V,) by falling mean logit, for `backward(..., order=)`: what `grad_filter` drops comes together.

    The mean logit is the logit of the mean hidden state, so that this takes one read of each. hidden: (..., H), without
    rows that are ignored.
    """
    wide = compute_dtype(hidden.dtype)
    mean = hidden.reshape(-1, hidden.shape[-1]).mean(0, dtype=wide)
    logits = (weight @ mean.to(weight.dtype)).to(wide)
    return (logits if bias is None else logits + bias).argsort(descending=True)
