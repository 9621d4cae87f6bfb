"""token_logprobs: one program a row, forward in one read of it; backward in one read and one write, by blocks of rows.

Forward, a tile is TILES stretches of the row, each as wide as the program's threads load at once. Every lane keeps the
softmax of what passes it, its largest logit and its sums, so that the loop holds no exchange between threads and takes
1 + 1 / TILES exp per element; the lanes are merged at the end of the row. What is left of the row after whole tiles
is read stretch by stretch, so that only there each place asks whether it is inside. A row that is ignored is not read.
Backward, the gradient is made of the maximum and total that forward kept; a row without gradient is not read.

Bytes: forward the logits, backward the logits and their gradient; all else is a few numbers a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastalign.kernels import _softmax as softmax
from fastalign.kernels._rows import lanes_and_options, row_start, rows_of
from fastalign.kernels._softmax import ALL
from torch import Tensor

from fastalign import empty

TILES = 4  # loads of a thread in flight: with two programs of 256 threads on each of an H100's cores, 32 KB


@triton.jit
def _add_tile(
    largest,
    total,
    weighted,
    squares,
    plain,
    before,
    logits,
    start,
    vocab,
    column_stride,
    label,
    to_cap,
    to_z,
    SOFTCAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The state of each lane after the tile that begins at `start`, and the largest logit before the label."""
    column = start + tl.arange(0, TILES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    at = logits + column.to(tl.int64) * column_stride
    if MASKED:
        valid = column < vocab
        z = softmax.transform(tl.load(at, mask=valid, other=0.0).to(COMPUTE), to_cap, to_z, SOFTCAP)
        z = tl.where(valid, z, float("-inf"))
    else:
        valid = True
        z = softmax.transform(tl.load(at).to(COMPUTE), to_cap, to_z, SOFTCAP)
    if STATISTICS == ALL:
        if (start <= label) & (label < start + TILES * LANES):
            here = tl.max(tl.max(tl.where(column < label, z, float("-inf")), 0), 0)
            before = tl.maximum(here, tl.max(tl.where(total == 0, float("-inf"), largest), 0))
    if STATISTICS:
        largest, total, weighted, squares, plain = softmax.add_statistics(
            largest, total, weighted, squares, plain, z, valid, STATISTICS == ALL, 0
        )
    else:
        largest, total = softmax.add_logits(largest, total, z, 0)
    return largest, total, weighted, squares, plain, before


@triton.jit
def row_state(
    logits,
    label,
    ignored,
    vocab,
    column_stride,
    to_cap,
    to_z,
    SOFTCAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
):
    """The label's logit and the softmax's state of the row at `logits`, and the largest logit before the label."""
    known = (label >= 0) & (label < vocab)
    label_x = tl.load(logits + label * column_stride, mask=known & ~ignored, other=0.0).to(COMPUTE)
    label_z = softmax.transform(label_x, to_cap, to_z, SOFTCAP)
    zeros = tl.zeros((LANES,), COMPUTE)
    # An unknown label makes the row NaN: to raise, the host would have to wait.
    total = zeros + tl.where(known | ignored, 0.0, float("nan"))
    largest = zeros + softmax.lowest(COMPUTE)
    weighted, squares, plain, before = zeros, zeros, zeros, tl.full((), float("-inf"), COMPUTE)
    end = tl.where(ignored, 0, vocab)
    whole = end - end % (TILES * LANES)
    for start in tl.range(0, whole, TILES * LANES):
        largest, total, weighted, squares, plain, before = _add_tile(
            largest, total, weighted, squares, plain, before, logits, start, vocab, column_stride, label, to_cap, to_z,
            SOFTCAP, STATISTICS, COMPUTE, TILES, LANES, False,
        )  # fmt: skip
    for start in tl.range(whole, end, LANES):
        largest, total, weighted, squares, plain, before = _add_tile(
            largest, total, weighted, squares, plain, before, logits, start, vocab, column_stride, label, to_cap, to_z,
            SOFTCAP, STATISTICS, COMPUTE, 1, LANES, True,
        )  # fmt: skip
    if STATISTICS:
        largest, total, weighted, squares, plain = softmax.merge_statistics(
            largest, total, weighted, squares, plain, STATISTICS == ALL, 0
        )
    else:
        largest, total = softmax.merge(largest, total, 0)
    return label_z, largest, total, weighted, squares, plain, before


@triton.jit
def store_state(maxima, totals, row, largest, total, ignored):
    """Leave for the backward pass what it needs of the row: -inf and 0 where all is -inf, 0 and 0 where ignored."""
    tl.store(maxima + row, tl.where(total == 0, tl.where(ignored, 0.0, float("-inf")), largest))
    tl.store(totals + row, total)


@triton.jit
def _forward(
    logits,
    labels,
    log_probs,
    maxima,
    totals,
    entropies,
    means,
    log_squares,
    top1,
    vocab,
    inner,
    outer_stride,
    inner_stride,
    column_stride,
    ignore_index,
    to_cap: tl.float64,
    to_z: tl.float64,
    SOFTCAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0)
    to_cap, to_z = tl.full((), to_cap, COMPUTE), tl.full((), to_z, COMPUTE)
    label = tl.load(labels + row)
    ignored = label == ignore_index
    label_z, largest, total, weighted, squares, plain, before = row_state(
        logits + row_start(row, inner, outer_stride, inner_stride), label, ignored, vocab, column_stride, to_cap, to_z,
        SOFTCAP, STATISTICS, COMPUTE, TILES, LANES,
    )  # fmt: skip
    tl.store(log_probs + row, softmax.log_prob(label_z, largest, total))
    store_state(maxima, totals, row, largest, total, ignored)
    if STATISTICS:
        tl.store(entropies + row, softmax.entropy_of(total, weighted))
    if STATISTICS == ALL:
        tl.store(means + row, plain / vocab)
        tl.store(log_squares + row, softmax.log_sum_sq_probs_of(total, squares))
        tl.store(top1 + row, (total > 0) & (label_z >= largest) & (label_z > before))


@triton.jit
def _backward(
    grads, grad_log_probs, grad_entropies, maxima, totals, entropies, logits, labels,
    vocab, blocks, inner, outer_stride, inner_stride, column_stride,
    grad_inner, grad_outer_stride, grad_inner_stride, grad_column_stride,
    ignore_index, to_cap: tl.float64, to_z: tl.float64, slope: tl.float64,
    SOFTCAP: tl.constexpr, STATISTICS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // blocks
    to_cap, to_z, slope = tl.full((), to_cap, COMPUTE), tl.full((), to_z, COMPUTE), tl.full((), slope, COMPUTE)
    logits += row_start(row, inner, outer_stride, inner_stride)
    grads += row_start(row, grad_inner, grad_outer_stride, grad_inner_stride)
    label = tl.load(labels + row)
    grad = tl.load(grad_log_probs + row).to(COMPUTE)
    largest, total = tl.load(maxima + row), tl.load(totals + row)
    alive = (label != ignore_index) & (total != 0)
    if STATISTICS:
        grad_entropy, entropy = tl.load(grad_entropies + row).to(COMPUTE), tl.load(entropies + row)
        alive = alive & ((grad != 0) | (grad_entropy != 0))
    else:
        grad_entropy, entropy = 0.0, 0.0
        alive = alive & (grad != 0)

    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    read = column < tl.where(alive, vocab, 0)
    x = tl.load(logits + column.to(tl.int64) * column_stride, mask=read, other=0.0).to(COMPUTE)
    found = softmax.logit_gradient(
        x, column == label, grad, grad_entropy, largest, total, entropy, to_cap, to_z, slope, SOFTCAP, STATISTICS
    )
    found = tl.where(read, found, 0).to(grads.dtype.element_ty)
    tl.store(grads + column.to(tl.int64) * grad_column_stride, found, mask=column < vocab)


def forward(
    logits: Tensor, labels: Tensor, temperature: float, softcap: float, ignore_index: int, statistics: int
) -> tuple[Tensor, ...]:
    vocab = logits.shape[-1]
    out = empty.token_logprobs(logits, labels, statistics=statistics)
    logits, rows = rows_of(logits)
    lanes, options = lanes_and_options(vocab, logits.dtype, logits.device)
    # Three more sums a lane, of eight lanes a thread, leave registers for half as many loads.
    tiles = TILES // 2 if statistics == empty.ALL and logits.dtype.itemsize == 2 else TILES
    to_cap, to_z, _ = softmax.transform_factors(temperature, softcap)
    _forward[(labels.numel(),)](
        logits, labels.contiguous(), *out, vocab, *rows, ignore_index, to_cap, to_z,
        SOFTCAP=softcap != 0, STATISTICS=statistics, COMPUTE=softmax.compute_type(logits.dtype),
        TILES=tiles, LANES=lanes, **options,
    )  # fmt: skip
    return out


def backward(
    grad_log_probs: Tensor,
    grad_entropy: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    entropy: Tensor,
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    statistics: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """out: where the gradient goes, of the logits' shape and dtype; the logits themselves where nobody needs them
    again, which saves as much memory as they take."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    vocab = logits.shape[-1]
    logits, rows = rows_of(logits)
    to, grad_rows = rows_of(grad)
    lanes, options = lanes_and_options(vocab, logits.dtype, logits.device)
    block = min(TILES * lanes, triton.next_power_of_2(vocab))
    blocks = triton.cdiv(vocab, block)
    small = (x.contiguous() for x in (grad_log_probs, grad_entropy, row_max, row_sum, entropy))
    to_cap, to_z, slope = softmax.transform_factors(temperature, softcap)
    _backward[(labels.numel() * blocks,)](
        to, *small, logits, labels.contiguous(), vocab, blocks, *rows, *grad_rows, ignore_index, to_cap, to_z, slope,
        SOFTCAP=softcap != 0, STATISTICS=statistics > 0, COMPUTE=softmax.compute_type(logits.dtype),
        BLOCK=block, **options,
    )  # fmt: skip
    return grad if to is grad else grad.copy_(to)
