"""sample_tokens: the inverse of the cumulative sum in index order; filters by search for their border, without a sort.

`_summarize` streams the logits, a program a tile: the tile's largest and its mass about that. Without filters
`_draw`, one program a row, picks a tile by the masses, reads that tile again and picks the token. With filters
`_summarize` also writes the largest of every group of 64 logits. If a set of group maxima already holds k logits, or
the mass top_p asks for, all that is kept lies at or above the least of the set: so `_draw_filtered` first finds that
bound among the maxima, lists the groups that reach it, and then reads nothing but these, for top_k some k of them. A
border, the largest logit such that those from it upwards reach a count or a mass, is found over the bits of the
logits, three a pass, in as many passes as it takes to tell them apart. A flat row has all its groups listed.

Bytes: the logits once, a tile of 2,048 again; with filters 1/64 for maxima, written and read, and the listed groups.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from fastalign.kernels._elementary import exp
from fastalign.kernels._first_beyond import first_beyond
from fastalign.kernels._philox import row_uniform
from fastalign.kernels._softmax import compute_type, lowest
from torch import Tensor

from fastalign import empty
from fastalign.reference import slack

TILE = 2048  # logits that one program of `_summarize` reads, and that a draw without filters reads again
GROUP = 64
BLOCK = 2048  # logits that `_draw_filtered` reads at once; half as many in float64
DIGITS = 8  # candidates for a border that one pass tries, counting the one it starts from

# The low bits of a narrow logit, made float32, say nothing.
EMPTY_BITS = {torch.bfloat16: 16, torch.float16: 13}


@triton.jit
def _summarize(
    tops,
    masses,
    group_tops,
    logits,
    vocab,
    tiles,
    row_stride,
    stride,
    scale: tl.float64,
    SUMS: tl.constexpr,
    GROUPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, tile = program // tiles, program % tiles
    group = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits + row * row_stride + at * stride, mask=at < vocab, other=float("-inf"))
    if GROUPS:
        here = group_tops + row * tl.cdiv(vocab, GROUP) + group
        tl.store(here, tl.max(x, 1), mask=group * GROUP < vocab)
    x = x.to(COMPUTE)
    top = tl.max(x)
    top = tl.where(tl.max((x != x).to(tl.int32)) > 0, float("nan"), top)
    tl.store(tops + program, top)
    if SUMS:
        mass = tl.sum(exp((x - tl.where(top == float("-inf"), 0, top)) * tl.full((), scale, COMPUTE)))
        tl.store(masses + program, mass)


@triton.jit
def _row_top(tops, row, tiles, TILES: tl.constexpr):
    """The largest of each tile, that of the row, and whether it is finite and no logit NaN."""
    tile = tl.arange(0, TILES)
    each = tl.load(tops + row * tiles + tile, mask=tile < tiles, other=float("-inf"))
    top = tl.max(each)
    sound = (tl.max((each != each).to(tl.int32)) == 0) & (top > float("-inf")) & (top < float("inf"))
    return each, tl.where(sound, top, 0), sound


@triton.jit
def _row_masses(masses, each, top, scale, row, tiles, TILES: tl.constexpr):
    """The masses of the tiles about the row's largest logit, float64."""
    tile = tl.arange(0, TILES)
    mass = tl.load(masses + row * tiles + tile, mask=(tile < tiles) & (each > float("-inf")), other=0)
    return mass.to(tl.float64) * exp((each - top) * scale).to(tl.float64)


@triton.jit(do_not_specialize=["seed", "offset"])
def _draw(
    ids,
    log_probs,
    tops,
    masses,
    logits,
    rows,
    vocab,
    tiles,
    row_stride,
    stride,
    scale: tl.float64,
    seed: tl.int64,
    offset: tl.int64,
    GREEDY: tl.constexpr,
    ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.full((), scale, COMPUTE)
    each, top, sound = _row_top(tops, row, tiles, TILES)
    if GREEDY:
        tile = tl.min(tl.where(each == top, tl.arange(0, TILES), TILES - 1))
    else:
        mass = _row_masses(masses, each, top, scale, row, tiles, TILES)
        total = tl.sum(mass)
        target = row_uniform(seed, rows, row, offset, ROWS) * total
        tile, before = first_beyond(mass, target, TILES)
    place = tl.arange(0, TILE)
    at = tile.to(tl.int64) * TILE + place
    x = tl.load(logits + row * row_stride + at * stride, mask=at < vocab, other=float("-inf")).to(COMPUTE)
    if GREEDY:
        found = tl.min(tl.where(x == top, place, TILE - 1))
        log_prob = tl.zeros((), tl.float64)
    else:
        # exp about the same shift as when it was summed, so that what had mass has it again.
        about = tl.max(x)
        weights = exp((x - about) * scale).to(tl.float64)
        found, _ = first_beyond(weights, (target - before) / exp((about - top) * scale).to(tl.float64), TILE)
        drawn = tl.max(tl.where(place == found, x, float("-inf")))
        log_prob = ((drawn - top) * scale).to(tl.float64) - tl.log(total)
    tl.store(ids + row, tl.where(sound, tile.to(tl.int64) * TILE + found, -1))
    tl.store(log_probs + row, tl.where(sound, log_prob, float("nan")).to(COMPUTE))


# ---- filters ----


@triton.jit
def _keys(x, EMPTY: tl.constexpr):
    """Integers that sort as the numbers do, -0 and 0 as one."""
    x = tl.where(x == 0, 0.0, x)
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        found = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    else:
        bits = x.to(tl.int32, bitcast=True)
        found = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> EMPTY
    return found


@triton.jit
def _load(logits, listed, start, count, vocab, stride, COMPUTE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK of the logits in the listed groups, in index order, -inf past their `count`, and their indices.

    GROUP 1: of the first `count`, without a list.
    """
    place = start + tl.arange(0, BLOCK)
    at = place
    if GROUP > 1:
        at = tl.load(listed + place // GROUP, mask=place < count, other=0) * GROUP + place % GROUP
    valid = (place < count) & (at < vocab)
    return tl.load(logits + at.to(tl.int64) * stride, mask=valid, other=float("-inf")).to(COMPUTE), at


@triton.jit
def _border(
    logits,
    listed,
    count,
    vocab,
    stride,
    top,
    scale,
    low,
    target,
    MASS: tl.constexpr,
    EMPTY: tl.constexpr,
    COMPUTE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    DIGITS: tl.constexpr,
):
    """The largest key such that the logits from it upwards reach the target, in number or in mass; `low` if none is.

    Searched between low and the key of top. What it returns need not be a logit's key if it reaches the target exactly.
    """
    digit = tl.arange(0, DIGITS)
    highest = _keys(top, EMPTY)
    low = low.to(tl.uint64)  # modulo 2^64: the keys of float64 are further apart than an int64 can tell
    width = highest.to(tl.int64).to(tl.uint64) - low + 1
    reached = tl.full((), -1, tl.float64)
    while (width > 1) & (reached != target):
        width = width // DIGITS + 1
        tried = (low + width * digit.to(tl.uint64)).to(tl.int64).to(highest.dtype)
        tried = tl.broadcast_to(tried[None, :], (BLOCK, DIGITS))
        if MASS:
            sums = tl.zeros((BLOCK, DIGITS), COMPUTE)
        else:
            sums = tl.zeros((BLOCK, DIGITS), tl.int32)
        for start in tl.range(0, count, BLOCK):
            x, _ = _load(logits, listed, start, count, vocab, stride, COMPUTE, GROUP, BLOCK)
            from_it = _keys(x, EMPTY)[:, None] >= tried
            if MASS:
                sums += tl.where(from_it, exp((x - top) * scale)[:, None], 0)
            else:
                sums += from_it.to(tl.int32)
        total = tl.sum(sums.to(tl.float64), 0)
        chosen = tl.max(tl.where(total >= target, digit, 0))
        reached = tl.sum(tl.where(digit == chosen, total, 0))
        low += width * chosen.to(tl.uint64)
    return low.to(tl.int64)


@triton.jit
def _at_border(
    logits,
    listed,
    count,
    vocab,
    stride,
    top,
    scale,
    border,
    EMPTY: tl.constexpr,
    COMPUTE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mass above the border, how many logits equal it, and the mass of each."""
    above, tie = tl.zeros((BLOCK,), COMPUTE), tl.zeros((BLOCK,), COMPUTE)
    ties = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, count, BLOCK):
        x, _ = _load(logits, listed, start, count, vocab, stride, COMPUTE, GROUP, BLOCK)
        key, mass = _keys(x, EMPTY), exp((x - top) * scale)
        above += tl.where(key > border, mass, 0)
        tie = tl.where(key == border, mass, tie)
        ties += (key == border).to(tl.int32)
    return tl.sum(above.to(tl.float64)), tl.sum(ties), tl.max(tie).to(tl.float64)


@triton.jit
def _weights(x, at, top, scale, border, first_tie, least, TIES: tl.constexpr, EMPTY: tl.constexpr):
    """1 for a tie at the border, or the mass of a logit that is left: above it, or a tie from the first one kept on."""
    key = _keys(x, EMPTY)
    if TIES:
        found = tl.where(key == border, 1, 0).to(x.dtype)
    else:
        d = (x - top) * scale
        found = tl.where(((key > border) | ((key == border) & (at >= first_tie))) & (d >= least), exp(d), 0)
    return found


@triton.jit
def _pick(
    logits,
    listed,
    count,
    vocab,
    stride,
    top,
    scale,
    border,
    first_tie,
    least,
    target,
    TIES: tl.constexpr,
    EMPTY: tl.constexpr,
    COMPUTE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The first index whose cumulative weight exceeds target (a share, but for TIES), its logit, and the total."""
    slot, place = tl.arange(0, BLOCKS), tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCKS,), tl.float64)
    for start in tl.range(0, count, BLOCK):
        x, at = _load(logits, listed, start, count, vocab, stride, COMPUTE, GROUP, BLOCK)
        here = tl.sum(_weights(x, at, top, scale, border, first_tie, least, TIES, EMPTY))
        sums = tl.where(slot == start // BLOCK, here.to(tl.float64), sums)
    total = tl.sum(sums)
    if not TIES:
        target *= total
    block, before = first_beyond(sums, target, BLOCKS)
    x, at = _load(logits, listed, block * BLOCK, count, vocab, stride, COMPUTE, GROUP, BLOCK)
    weights = _weights(x, at, top, scale, border, first_tie, least, TIES, EMPTY).to(tl.float64)
    found, _ = first_beyond(weights, target - before, BLOCK)
    return tl.max(tl.where(place == found, at, 0)), tl.max(tl.where(place == found, x, float("-inf"))), total


@triton.jit(do_not_specialize=["seed", "offset", "k"])
def _draw_filtered(
    ids, log_probs, tops, masses, group_tops, listed, logits, rows, vocab, tiles, groups, row_stride, stride,
    scale: tl.float64, k, top_p: tl.float64, least: tl.float64, seed: tl.int64, offset: tl.int64,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, ROWS: tl.constexpr,
    EMPTY: tl.constexpr, COMPUTE: tl.constexpr, TILES: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, DIGITS: tl.constexpr,
):  # fmt: skip
    """top_p, least: the mass to reach and the least (x - top) * scale that min_p lets pass, less rounding."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    group_tops += row * groups
    listed += row * groups
    scale, least = tl.full((), scale, COMPUTE), tl.full((), least, COMPUTE)
    k, top_p = tl.full((), k, tl.float64), tl.full((), top_p, tl.float64)
    each, top, sound = _row_top(tops, row, tiles, TILES)
    if sound:
        border = _keys(lowest(COMPUTE), EMPTY).to(tl.int64)
        if TOP_K:
            if k <= groups:
                border = _border(
                    group_tops, listed, groups, groups, 1, top, scale, border, k,
                    False, EMPTY, COMPUTE, 1, BLOCK, DIGITS,
                )  # fmt: skip
        elif TOP_P:
            total = tl.sum(_row_masses(masses, each, top, scale, row, tiles, TILES))
            # Logits with less than a vocab-th of what top_p leaves are beyond it, however many; e spare for rounding.
            drop = (tl.log((1 - top_p) * total / vocab) - 1) / scale.to(tl.float64)
            border = tl.maximum(border, _keys((top + drop).to(COMPUTE), EMPTY).to(tl.int64))
            target = tl.maximum(top_p * total, 1e-300)  # so that no border is beyond top, even for top_p = 0
            border = _border(
                group_tops, listed, groups, groups, 1, top, scale, border, target,
                True, EMPTY, COMPUTE, 1, BLOCK, DIGITS,
            )  # fmt: skip

        count = tl.zeros((), tl.int32)
        for start in tl.range(0, groups, BLOCK):
            x, group = _load(group_tops, listed, start, groups, groups, 1, COMPUTE, 1, BLOCK)
            live = _keys(x, EMPTY) >= border
            if MIN_P and not TOP_P:
                live = live & ((x - top) * scale >= least)
            place = count + tl.cumsum(live.to(tl.int32), 0)
            tl.store(listed + place - 1, group, mask=live)
            count += tl.sum(live.to(tl.int32))
        count *= GROUP
        tl.debug_barrier()  # other threads read what one has listed

        if TOP_K:
            border = _border(
                logits, listed, count, vocab, stride, top, scale, border, k, False, EMPTY, COMPUTE, GROUP, BLOCK, DIGITS
            )
        first_tie = tl.zeros((), tl.int32)
        if TOP_P:
            if TOP_K:
                above, ties, tie = _at_border(
                    logits, listed, count, vocab, stride, top, scale, border, EMPTY, COMPUTE, GROUP, BLOCK
                )
                target = tl.maximum(top_p * (above + ties * tie), 1e-300)
            border = _border(
                logits, listed, count, vocab, stride, top, scale, border, target, True,
                EMPTY, COMPUTE, GROUP, BLOCK, DIGITS,
            )  # fmt: skip
            above, ties, tie = _at_border(
                logits, listed, count, vocab, stride, top, scale, border, EMPTY, COMPUTE, GROUP, BLOCK
            )
            kept = tl.where(tie > 0, tl.ceil((target - above) / tl.where(tie > 0, tie, 1)), ties)
            dropped = ties - tl.maximum(kept, 1)
            if dropped > 0:
                first_tie, _, _ = _pick(
                    logits, listed, count, vocab, stride, top, scale, border, first_tie, least, dropped, True,
                    EMPTY, COMPUTE, GROUP, BLOCK, BLOCKS,
                )  # fmt: skip
        share = row_uniform(seed, rows, row, offset, ROWS)
        id, x, total = _pick(
            logits, listed, count, vocab, stride, top, scale, border, first_tie, least, share, False,
            EMPTY, COMPUTE, GROUP, BLOCK, BLOCKS,
        )  # fmt: skip
        tl.store(ids + row, id.to(tl.int64))
        tl.store(log_probs + row, (((x - top) * scale).to(tl.float64) - tl.log(total)).to(COMPUTE))
    else:
        tl.store(ids + row, -1)
        tl.store(log_probs + row, float("nan"))


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    offset: int,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    ids, log_probs = empty.sample_tokens(logits)
    count, vocab = logits.shape
    if count == 0:
        return ids, log_probs
    greedy = temperature == 0
    top_k = top_k if top_k < vocab and not greedy else 0
    by_mass, by_least = top_p < 1 and not greedy, min_p > 0 and not greedy
    filtered = top_k > 0 or by_mass or by_least
    limits, near = torch.finfo(log_probs.dtype), slack(logits.dtype)
    scale = limits.max if greedy else min(max(1 / temperature, limits.tiny), limits.max)
    compute = compute_type(logits.dtype)
    tiles, groups = triton.cdiv(vocab, TILE), triton.cdiv(vocab, GROUP)

    tops, masses = log_probs.new_empty(2, count, tiles)
    group_tops = logits.new_empty(count, groups if filtered else 0)
    _summarize[(count * tiles,)](
        tops, masses, group_tops, logits, vocab, tiles, *logits.stride(), scale,
        SUMS=not greedy and not (top_k > 0) and (by_mass or not filtered), GROUPS=filtered, COMPUTE=compute,
        TILE=TILE, GROUP=GROUP, enable_fp_fusion=True, num_warps=4,
    )  # fmt: skip
    rows, streams = (ids, 0) if rows is None else (rows.contiguous(), rows.ndim)
    tiles_wide = triton.next_power_of_2(tiles)
    if not filtered:
        _draw[(count,)](
            ids, log_probs, tops, masses, logits, rows, vocab, tiles, *logits.stride(), scale, seed, offset,
            GREEDY=greedy, ROWS=streams, COMPUTE=compute, TILES=tiles_wide, TILE=TILE,
            enable_fp_fusion=True, num_warps=4,
        )  # fmt: skip
        return ids, log_probs
    block = BLOCK // 2 if compute == tl.float64 else BLOCK
    _draw_filtered[(count,)](
        ids, log_probs, tops, masses, group_tops, torch.empty_like(group_tops, dtype=torch.int32), logits, rows,
        vocab, tiles, groups, *logits.stride(), scale, top_k, top_p * (1 - near),
        math.log(min_p) - 2 * near if by_least else -math.inf,
        seed, offset, TOP_K=top_k > 0, TOP_P=by_mass, MIN_P=by_least, ROWS=streams,
        EMPTY=EMPTY_BITS.get(logits.dtype, 0), COMPUTE=compute, TILES=tiles_wide, GROUP=GROUP, BLOCK=block,
        BLOCKS=triton.next_power_of_2(triton.cdiv(groups * GROUP, block)), DIGITS=DIGITS,
        enable_fp_fusion=True, num_warps=16,
    )  # fmt: skip
    return ids, log_probs
