"""The fused head's kernels: tiles of logits, made by the tensor cores and used up in registers.

`forward_tiles` reads a block of rows and, one after the other, the vocabulary blocks of its split: of each tile of
logits only the softmax's state goes to memory, three numbers a row and split (seven with the statistics).
`merge_tiles` joins the splits and writes what the op returns. `gradient_tiles` makes each tile again and stores its
gradient, `unit_rows` ends the frozen head's gradient.

A row is a scored position: `position[i]` is the i-th of them, `place[i]` where its hidden state lies, and `count`, in
memory, says how many there are, so that the host need not wait to know; blocks past it return at once. Programs run
in groups of row blocks whose hidden states stay in the second-level cache, and within a group the row blocks go
fastest: those that run at the same time read the same block of the weight.
"""

import triton
import triton.language as tl
from fastalign.kernels._elementary import exp
from fastalign.kernels._softmax import (
    ALL,
    add_logits,
    add_statistics,
    entropy_of,
    log_prob,
    log_sum_sq_probs_of,
    logit_gradient,
    lowest,
    not_too_low,
    transform,
)

KINDS = 3  # of a partial state: largest, total, label's logit
KINDS_ENTROPY = 4  # and weighted
KINDS_ALL = 7  # and squares, plain, largest before the label


@triton.jit
def in_groups(program, row_blocks, others, group):
    """Which row block and which of the others a program takes: row blocks fastest, `group` of them before the next."""
    first = program // (group * others) * group
    size = tl.minimum(row_blocks - first, group)
    inside = program % (group * others)
    return (first + inside % size).to(tl.int64), (inside // size).to(tl.int64)


@triton.jit
def within(label, start, end):
    """Where the label lies in a block [start, end), in 32 bits; before it -1, and behind it what no column is."""
    return tl.where(label < end, tl.maximum(label - start, -1), 1 << 30).to(tl.int32)


@triton.jit
def add_product(
    acc,
    a,
    b,
    width,
    a_step,
    b_step,
    DOT: tl.constexpr,
    COMPUTE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc (M, N) + Σ over `width` of the rows that start at a (M,) times the rows that start at b (N,)."""
    for start in range(0, width, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        if EVEN:
            x = tl.load(a[:, None] + (k * a_step)[None, :])
            y = tl.load(b[None, :] + (k * b_step)[:, None])
        else:
            x = tl.load(a[:, None] + (k * a_step)[None, :], mask=k[None, :] < width, other=0)
            y = tl.load(b[None, :] + (k * b_step)[:, None], mask=k[:, None] < width, other=0)
        acc = tl.dot(x.to(DOT), y.to(DOT), acc, out_dtype=COMPUTE)
    return acc


@triton.jit
def logits_tile(
    at,
    place,
    v,
    hidden,
    weight,
    bias,
    low,
    b,
    width,
    rank,
    hidden_row,
    hidden_step,
    weight_row,
    weight_step,
    b_row,
    b_step,
    DOT: tl.constexpr,
    COMPUTE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """hidden Wᵀ + low Bᵀ + bias for the rows (at, place) and the vocabulary entries v; before scale and softcap."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
    acc = add_product(
        acc,
        hidden + place * hidden_row,
        weight + v * weight_row,
        width,
        hidden_step,
        weight_step,
        DOT,
        COMPUTE,
        EVEN,
        BLOCK_K,
    )
    if low is not None:
        acc = add_product(acc, low + at * rank, b + v * b_row, rank, 1, b_step, DOT, COMPUTE, False, BLOCK_R)
    if bias is not None:
        acc += tl.load(bias + v).to(COMPUTE)[None, :]
    return acc


@triton.jit
def add_tile(
    largest,
    total,
    label_z,
    weighted,
    squares,
    plain,
    before,
    z,
    label,
    inside,
    STATISTICS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The rows' state after a tile of logits: whose columns are `inside`, and where the label is among them."""
    if tl.max(((label >= 0) & (label < BLOCK_N)).to(tl.int32), 0) > 0:  # seldom: a row's label lies in one block of all
        c = tl.arange(0, BLOCK_N)[None, :]
        label_z += tl.sum(tl.where(c == label[:, None], z, 0), 1)
        if STATISTICS == ALL:
            before = tl.maximum(before, tl.max(tl.where(c < label[:, None], z, float("-inf")), 1))
    if STATISTICS == ALL:
        before = tl.where(label >= BLOCK_N, tl.maximum(before, tl.max(z, 1)), before)
    if STATISTICS:
        largest, total, weighted, squares, plain = add_statistics(
            largest, total, weighted, squares, plain, z, inside, STATISTICS == ALL, 1
        )
    else:
        largest, total = add_logits(largest, total, z, 1)
    return largest, total, label_z, weighted, squares, plain, before


@triton.jit(do_not_specialize=["rows", "slots", "slot", "first", "last", "blocks", "splits", "row_blocks", "group"])
def forward_tiles(
    partial, exps, hidden, weight, bias, low, b, labels, position, place, count,
    rows, slots, slot, first, last, blocks, splits, row_blocks, group, width, rank,
    hidden_row, hidden_step, weight_row, weight_step, b_row, b_step, exps_row,
    to_cap: tl.float64, to_z: tl.float64, exps_scale: tl.float64,
    STATISTICS: tl.constexpr, SOFTCAP: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The state of each row over each split of the vocabulary [first, last), into partial (kind, slot + split, row).

    exps, if given (then a split is one block), takes exp(z - the block's largest) dz/dx, to be multiplied by W; it has
    room for whole tiles.
    """
    row_block, split = in_groups(tl.program_id(0), row_blocks, splits, group)
    scored = tl.load(count)
    if row_block * BLOCK_M >= scored:
        return
    r = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = r < scored
    at, where = tl.load(position + r, mask=valid, other=0), tl.load(place + r, mask=valid, other=0)
    label = tl.load(labels + at, mask=valid, other=-1)
    cap, scale = tl.full((), to_cap, COMPUTE), tl.full((), to_z, COMPUTE)
    largest = tl.zeros((BLOCK_M,), COMPUTE) + lowest(COMPUTE)
    total = tl.zeros((BLOCK_M,), COMPUTE)
    label_z, weighted, squares, plain, before = total, total, total, total, total + float("-inf")
    begin = first + split * blocks * BLOCK_N
    end = tl.minimum(begin + blocks * BLOCK_N, last)
    c = tl.arange(0, BLOCK_N)  # in 32 bits, from the block's start: a thread holds many columns
    if exps is None:
        for start in range(begin, end, BLOCK_N):
            x = logits_tile(
                at, where, tl.minimum(start + c, end - 1), hidden, weight, bias, low, b, width, rank,
                hidden_row, hidden_step, weight_row, weight_step, b_row, b_step,
                DOT, COMPUTE, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip
            inside = (c < (end - start).to(tl.int32))[None, :]
            largest, total, label_z, weighted, squares, plain, before = add_tile(
                largest,
                total,
                label_z,
                weighted,
                squares,
                plain,
                before,
                tl.where(inside, transform(x, cap, scale, SOFTCAP), float("-inf")),
                within(label, start, end),
                inside,
                STATISTICS,
                BLOCK_N,
            )
    else:
        x = logits_tile(
            at, where, tl.minimum(begin + c, end - 1), hidden, weight, bias, low, b, width, rank,
            hidden_row, hidden_step, weight_row, weight_step, b_row, b_step,
            DOT, COMPUTE, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        inside = (c < (end - begin).to(tl.int32))[None, :]
        z = tl.where(inside, transform(x, cap, scale, SOFTCAP), float("-inf"))
        largest, total, label_z, weighted, squares, plain, before = add_tile(
            largest, total, label_z, weighted, squares, plain, before, z, within(label, begin, end), inside,
            STATISTICS, BLOCK_N,
        )  # fmt: skip
        e = exp(z - largest[:, None]) * tl.full((), exps_scale, COMPUTE)
        if SOFTCAP:
            y = z / scale
            e *= tl.where(inside, 1 - y * y, 0)
        to = (exps + r * exps_row + (begin - first))[:, None] + c[None, :]
        tl.store(to, e.to(exps.dtype.element_ty))
    store_state(
        partial + (slot + split) * rows + r, slots.to(tl.int64) * rows, valid,
        largest, total, label_z, weighted, squares, plain, before, STATISTICS,
    )  # fmt: skip


@triton.jit
def store_state(
    to, kind, valid, largest, total, label_z, weighted, squares, plain, before, STATISTICS: tl.constexpr
):  # fmt: skip
    """The rows' state, its kinds so far apart."""
    tl.store(to, largest, mask=valid)
    tl.store(to + kind, total, mask=valid)
    tl.store(to + 2 * kind, label_z, mask=valid)
    if STATISTICS:
        tl.store(to + 3 * kind, weighted, mask=valid)
    if STATISTICS == ALL:
        tl.store(to + 4 * kind, squares, mask=valid)
        tl.store(to + 5 * kind, plain, mask=valid)
        tl.store(to + 6 * kind, before, mask=valid)


@triton.jit(do_not_specialize=["rows"])
def join_exps(exps, tops, top, count, rows, exps_row, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Makes exps (row, column) of each block, relative to its `tops` (block, row), relative to `top` (row,)."""
    if tl.program_id(0) * BLOCK_M >= tl.load(count):
        return
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r_read = tl.minimum(r, rows - 1)
    block = tl.program_id(1).to(tl.int64)
    drop = exp(tl.load(tops + block * rows + r_read) - tl.load(top + r_read))
    at = (exps + r * exps_row + block * BLOCK_N)[:, None] + tl.arange(0, BLOCK_N)[None, :]
    keep = (r < rows)[:, None]
    e = tl.load(at, mask=keep, other=0)
    tl.store(at, (e.to(drop.dtype) * drop[:, None]).to(e.dtype), mask=keep)


@triton.jit(do_not_specialize=["rows", "slots", "used", "vocab"])
def merge_tiles(
    log_probs,
    row_max,
    row_sum,
    entropy,
    mean_logits,
    log_sum_sq_probs,
    is_top1,
    rescale,
    partial,
    labels,
    position,
    count,
    rows,
    slots,
    used,
    vocab,
    STATISTICS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One state of the first `used` slots of partial (kind, slot, row), and from it the op's results, 0 where ignored.

    With `rescale` instead: the state goes to slot 0, and exp(largest there before - largest now) to `rescale`.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    scored = r < tl.load(count)
    kind = slots.to(tl.int64) * rows
    largest = tl.zeros((BLOCK_M,), COMPUTE) + lowest(COMPUTE)
    total = tl.zeros((BLOCK_M,), COMPUTE)
    weighted, squares, plain, label_z, before = total, total, total, total, total + float("-inf")
    carried = total
    for start in range(0, used, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        here = (s[:, None] < used) & scored[None, :]
        of = partial + s.to(tl.int64)[:, None] * rows + r[None, :]
        tops = tl.load(of, mask=here, other=float("-inf"))
        totals = tl.load(of + kind, mask=here, other=0)
        label_z += tl.sum(tl.load(of + 2 * kind, mask=here, other=0), 0)
        carried += tl.sum(tl.where(s[:, None] == 0, tops, 0), 0)
        top = tl.maximum(largest, tl.max(tops, 0))
        drop, drops = largest - top, tops - top[None, :]
        scale, scales = exp(drop), exp(drops)
        if STATISTICS:
            weights = tl.load(of + 3 * kind, mask=here, other=0) + not_too_low(drops) * totals
            weighted = scale * (weighted + not_too_low(drop) * total) + tl.sum(scales * weights, 0)
        if STATISTICS == ALL:
            more = tl.load(of + 4 * kind, mask=here, other=0)
            squares = scale * scale * squares + tl.sum(scales * scales * more, 0)
            plain += tl.sum(tl.load(of + 5 * kind, mask=here, other=0), 0)
            befores = tl.load(of + 6 * kind, mask=here, other=float("-inf"))
            before = tl.maximum(before, tl.max(befores, 0))
        total = scale * total + tl.sum(scales * totals, 0)
        largest = top
    if rescale is not None:
        to = partial + r
        tl.store(rescale + r, exp(carried - largest), mask=scored)
        tl.store(to, largest, mask=scored)
        tl.store(to + kind, total, mask=scored)
        tl.store(to + 2 * kind, label_z, mask=scored)
        if STATISTICS:
            tl.store(to + 3 * kind, weighted, mask=scored)
        if STATISTICS == ALL:
            tl.store(to + 4 * kind, squares, mask=scored)
            tl.store(to + 5 * kind, plain, mask=scored)
            tl.store(to + 6 * kind, before, mask=scored)
    else:
        known = r < rows
        at = tl.load(position + r, mask=known, other=0)
        label = tl.load(labels + at, mask=scored, other=0)
        total = tl.where((label < 0) | (label >= vocab), float("nan"), total)
        tl.store(log_probs + at, tl.where(scored, log_prob(label_z, largest, total), 0), mask=known)
        tl.store(row_max + at, tl.where(scored, largest, 0), mask=known)
        tl.store(row_sum + at, tl.where(scored, total, 0), mask=known)
        if STATISTICS:
            tl.store(entropy + at, tl.where(scored, entropy_of(total, weighted), 0), mask=known)
        if STATISTICS == ALL:
            mean = plain / vocab.to(COMPUTE) + (total - total)  # NaN where the row is
            tl.store(mean_logits + at, tl.where(scored, mean, 0), mask=known)
            tl.store(log_sum_sq_probs + at, tl.where(scored, log_sum_sq_probs_of(total, squares), 0), mask=known)
            tl.store(is_top1 + at, scored & (total > 0) & (label_z >= largest) & (label_z > before), mask=known)


@triton.jit(do_not_specialize=["rows", "first", "last", "blocks", "row_blocks", "group"])
def gradient_tiles(
    tile, alive, given, hidden, weight, bias, low, b, labels, position, place, count,
    rows, first, last, blocks, row_blocks, group, width, rank,
    hidden_row, hidden_step, weight_row, weight_step, b_row, b_step, tile_row,
    to_cap: tl.float64, to_z: tl.float64, slope: tl.float64, grad_filter: tl.float64,
    ENTROPY: tl.constexpr, FILTER: tl.constexpr, SOFTCAP: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits of vocabulary [first, last), into tile (row, entry - first), which holds whole tiles.

    given (5, rows): the incoming gradients of log_probs and entropy, then largest, total and entropy, by position.
    alive (row block, block), if given, says where a tile holds anything but 0.
    """
    row_block, block = in_groups(tl.program_id(0), row_blocks, blocks, group)
    scored = tl.load(count)
    if row_block * BLOCK_M >= scored:
        return
    r = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = r < scored
    at, where = tl.load(position + r, mask=valid, other=0), tl.load(place + r, mask=valid, other=0)
    c = tl.arange(0, BLOCK_N)
    start = first + block * BLOCK_N
    v = tl.minimum(start + c, last - 1)
    x = logits_tile(
        at, where, v, hidden, weight, bias, low, b, width, rank,
        hidden_row, hidden_step, weight_row, weight_step, b_row, b_step,
        DOT, COMPUTE, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    label = tl.load(labels + at, mask=valid, other=-1)
    hit = c[None, :] == within(label, start, last)[:, None]
    stride = rows.to(tl.int64)
    grad = tl.load(given + at, mask=valid, other=0)[:, None]
    grad_entropy = tl.load(given + stride + at, mask=valid, other=0)[:, None]
    largest = tl.load(given + 2 * stride + at, mask=valid, other=0)[:, None]
    total = tl.load(given + 3 * stride + at, mask=valid, other=0)[:, None]
    entropy = tl.load(given + 4 * stride + at, mask=valid, other=0)[:, None]
    cap, scale = tl.full((), to_cap, COMPUTE), tl.full((), to_z, COMPUTE)
    found = logit_gradient(
        x, hit, grad, grad_entropy, largest, total, entropy, cap, scale, tl.full((), slope, COMPUTE), SOFTCAP, ENTROPY
    )
    if FILTER:
        e = exp(transform(x, cap, scale, SOFTCAP) - largest)
        found = tl.where((e < tl.full((), grad_filter, COMPUTE) * total) & (hit == 0), 0, found)
    inside = c < (last - start).to(tl.int32)
    found = tl.where(valid[:, None] & inside[None, :], found, 0)  # the products read whole tiles
    to = (tile + r * tile_row + block * BLOCK_N)[:, None] + c[None, :]
    tl.store(to, found.to(tile.dtype.element_ty))
    if alive is not None:
        any_left = tl.max((found != 0).to(tl.int32))
        tl.store(alive + row_block * blocks + block, any_left)


@triton.jit(do_not_specialize=["rows", "vocab"])
def unit_rows(
    unit,
    acc,
    weight,
    labels,
    position,
    count,
    largest,
    total,
    label_z,
    rows,
    vocab,
    width,
    weight_row,
    weight_step,
    exps_scale: tl.float64,
    to_cap: tl.float64,
    to_z: tl.float64,
    slope: tl.float64,
    SOFTCAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """unit[position] = d log p(label) / d hidden, of acc = Σ_v exp(z_v - largest) dz_v/dx W_v; 0 where ignored."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    known, scored = r < rows, r < tl.load(count)
    at = tl.load(position + r, mask=known, other=0)
    label = tl.load(labels + at, mask=scored, other=0)
    sums = tl.load(total + r, mask=scored, other=0)
    some = scored & (sums != 0)
    keep = some[:, None] & (h < width)[None, :]
    legal = (label >= 0) & (label < vocab)
    of = weight + label[:, None] * weight_row + h.to(tl.int64)[None, :] * weight_step
    w = tl.load(of, mask=keep & legal[:, None], other=float("nan")).to(COMPUTE)
    if SOFTCAP:
        y = tl.load(label_z + r, mask=scored, other=0) / tl.full((), to_z, COMPUTE)
        w *= (1 - y * y)[:, None]
    width64 = tl.zeros((), tl.int64) + width
    mean = tl.load(acc + r[:, None] * width64 + h[None, :], mask=keep, other=0) / tl.where(some, sums, 1)[:, None]
    found = (w - mean / tl.full((), exps_scale, COMPUTE)) * tl.full((), slope, COMPUTE)
    to = unit + at[:, None] * width64 + h[None, :]
    tl.store(to, tl.where(keep, found, 0), mask=known[:, None] & (h < width)[None, :])
