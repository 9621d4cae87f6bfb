"""Tiles that the fused head keeps from its forward pass, so that the backward pass makes no logits: three products
instead of four, all of them the library's.

Kept is exp(z - m) in the products' type, m the largest logit of the row's block: at most 1, so that its rounding is
relative, like that of the gradient made of it. With m beside it for every row and block, softmax probabilities are
exp(m - largest) / total away, once the whole row is known. A probability above one half is the row's largest, and
therefore 1 / total exactly: rounded, 1 - p would have no digits where p is near 1.

The tiles are only read: a second backward pass finds them as they were.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastalign.kernels._elementary import exp
from fastalign.kernels._head import add_tile, store_state, within
from fastalign.kernels._head_layout import Head, dot_type, parts
from fastalign.kernels._products import library_add, library_wide
from fastalign.kernels._softmax import compute_type, lowest, probability_gradient
from torch import Tensor

from fastalign._base.dtypes import compute_dtype

STEP = 512  # columns of a block
ROWS = 16  # of a program
SCALE = {torch.float16: 2.0**15}  # what is at most 1, up to float16's largest


class Kept(NamedTuple):
    """exps (rows, columns), rows in the forward pass's order; tops (columns / STEP, rows), the m of each block."""

    exps: Tensor
    tops: Tensor

    @property
    def columns(self) -> int:
        return self.exps.shape[1]

    @property
    def scale(self) -> float:
        return SCALE.get(self.exps.dtype, 1.0)


def kept_size(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float, memory_budget: int) -> int:
    """How many elements of the compute type the op's store has: whole blocks of columns, as many as the budget holds.

    None with a softcap, whose slope at a label needs the logit with more digits; nor on AMD's GPUs, whose library does
    not sum narrow numbers in float32.
    """
    if softcap or torch.version.hip is not None:
        return 0
    size = compute_dtype(hidden.dtype).itemsize
    of_block = labels.numel() * (STEP * dot_type(hidden, weight).itemsize // size + 1)
    return min(memory_budget // (max(of_block, 1) * size), -(-weight.shape[0] // STEP)) * of_block


def kept_in(store: Tensor, dot: torch.dtype, rows: int) -> Kept | None:
    """The views of a store."""
    if not store.numel():
        return None
    in_exps = STEP * dot.itemsize // store.dtype.itemsize
    blocks = store.numel() // (rows * (in_exps + 1))
    exps, tops = store.split([rows * blocks * in_exps, rows * blocks])
    return Kept(exps.view(dot).view(rows, blocks * STEP), tops.view(blocks, rows))


def keep(kept: Kept, head: Head, partial: Tensor, statistics: int) -> None:
    """Fill `kept`, and of partial (kind, slot, row) a slot for each of its blocks: from the library's logits, a part at
    a time."""
    rows = head.scored_rows()
    low = None if head.low is None else head.low.index_select(0, head.position)
    end = min(kept.columns, head.vocab)
    for first, last in parts(0, end, head.part(STEP, head.compute)):
        logits = library_wide(rows, head.weight[first:last].to(head.dot).T)
        if low is not None:
            library_add(logits, low, head.b[first:last].to(head.dot).T)
        keep_part[(triton.cdiv(head.rows, ROWS), triton.cdiv(last - first, STEP))](
            partial, kept.exps, logits, head.bias, head.labels, head.position, head.count, head.rows, partial.shape[1],
            first // STEP, head.vocab, logits.stride(0), kept.exps.stride(0), head.to_z, kept.scale,
            STATISTICS=statistics, COMPUTE=compute_type(head.compute), BLOCK_M=ROWS, BLOCK_N=STEP,
            enable_fp_fusion=True, num_warps=8,
        )  # fmt: skip
        del logits  # before the next is made
    kept.tops.copy_(partial[0, : len(kept.tops)])


@triton.jit(do_not_specialize=["rows", "slots", "first", "vocab"])
def keep_part(
    partial, exps, logits, bias, labels, position, count, rows, slots, first, vocab, logits_row, exps_row,
    to_z: tl.float64, exps_scale: tl.float64,
    STATISTICS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The state of each row over each block, and its exps, from the logits (row, column) of blocks `first` and on."""
    scored = tl.load(count)
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) * BLOCK_M >= scored:
        return
    valid = r < scored
    at = tl.load(position + r, mask=valid, other=0)
    label = tl.load(labels + at, mask=valid, other=-1)
    here = tl.program_id(1).to(tl.int64)
    start = (first + here) * BLOCK_N
    c = tl.arange(0, BLOCK_N)
    inside = (start + c < vocab)[None, :]
    x = tl.load((logits + r * logits_row + here * BLOCK_N)[:, None] + c[None, :], mask=valid[:, None] & inside, other=0)
    if bias is not None:
        x += tl.load(bias + start + c, mask=start + c < vocab, other=0).to(COMPUTE)[None, :]
    z = tl.where(inside, x * tl.full((), to_z, COMPUTE), float("-inf"))
    nothing = tl.zeros((BLOCK_M,), COMPUTE)
    largest, total, label_z, weighted, squares, plain, before = add_tile(
        nothing + lowest(COMPUTE), nothing, nothing, nothing, nothing, nothing, nothing + float("-inf"), z,
        within(label, start, start + BLOCK_N), inside, STATISTICS, BLOCK_N,
    )  # fmt: skip
    e = exp(z - largest[:, None]) * tl.full((), exps_scale, COMPUTE)
    to = (exps + r * exps_row + start)[:, None] + c[None, :]
    tl.store(to, e.to(exps.dtype.element_ty), mask=valid[:, None])
    store_state(
        partial + (first + here) * rows + r, slots.to(tl.int64) * rows, valid,
        largest, total, label_z, weighted, squares, plain, before, STATISTICS,
    )  # fmt: skip


def gradient(
    kept: Kept, head: Head, tile: Tensor, given: Tensor, kept_row: Tensor, first: int, last: int, has_entropy: bool
) -> None:
    """The gradient of the logits of vocabulary [first, last), which begins with a block, into tile (row, column)."""
    gradient_of_kept[(triton.cdiv(head.rows, ROWS), triton.cdiv(last - first, STEP))](
        tile, given, kept.exps, kept.tops, kept_row, head.labels, head.position, head.count, head.rows, first // STEP,
        kept.exps.stride(0), tile.stride(0), kept.scale, head.slope,
        ENTROPY=has_entropy, COMPUTE=compute_type(head.compute), BLOCK_M=ROWS, BLOCK_N=STEP,
        enable_fp_fusion=True, num_warps=8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "first"])
def gradient_of_kept(
    tile, given, exps, tops, kept_row, labels, position, count, rows, first, exps_row, tile_row,
    exps_scale: tl.float64, slope: tl.float64,
    ENTROPY: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits of blocks `first` and on, into tile (row, column), which holds whole blocks.

    given: as in gradient_tiles. kept_row: where each of the rows, in this pass's order, lies in exps.
    """
    scored = tl.load(count)
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) * BLOCK_M >= scored:
        return
    valid = r < scored
    at, of = tl.load(position + r, mask=valid, other=0), tl.load(kept_row + r, mask=valid, other=0)
    here = tl.program_id(1).to(tl.int64)
    start = (first + here) * BLOCK_N
    c = tl.arange(0, BLOCK_N)
    e = tl.load((exps + of * exps_row + start)[:, None] + c[None, :], mask=valid[:, None], other=0).to(COMPUTE)
    stride = rows.to(tl.int64)
    top = tl.load(tops + (first + here) * stride + of, mask=valid, other=0)
    label = tl.load(labels + at, mask=valid, other=-1)
    grad = tl.load(given + at, mask=valid, other=0)
    grad_entropy = tl.load(given + stride + at, mask=valid, other=0)
    largest = tl.load(given + 2 * stride + at, mask=valid, other=0)
    total = tl.load(given + 3 * stride + at, mask=valid, other=0)
    entropy = tl.load(given + 4 * stride + at, mask=valid, other=0)
    scale = tl.full((), exps_scale, COMPUTE)
    p = e * (exp(top - largest) / (total * scale))[:, None]
    highest = p > 0.52
    p = tl.where(highest, (1 / total)[:, None], p)
    d = p
    if ENTROPY:
        d = tl.where(highest, 0, tl.log(e / scale) + (top - largest)[:, None])
    found = probability_gradient(
        p, d, c[None, :] == within(label, start, start + BLOCK_N)[:, None], grad[:, None], grad_entropy[:, None],
        total[:, None], entropy[:, None], ENTROPY,
    )  # fmt: skip
    found = tl.where(valid[:, None] & (total != 0)[:, None], found * tl.full((), slope, COMPUTE), 0)
    tl.store((tile + r * tile_row + here * BLOCK_N)[:, None] + c[None, :], found.to(tile.dtype.element_ty))
