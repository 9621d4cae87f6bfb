"""resample: candidates drawn from log-weights, a row spread over as many programs as it has tiles.

With replacement, in float64 as on the CPU: `_sum_blocks` reads the row once and sums exp(x - top of its tile) by
blocks of 64; `_cumulate`, one program a row, makes cumulative sums of these; `_draw` searches them, then the 64
weights of the block found, which it reads again. "residual" sums copies and remainders by a second read, and one
search serves both. Without replacement: `_winners` keeps the k best of every tile, in index order and each with its
key, again over what is left until one tile is; torch sorts those few. A k near the tile's size would not thin them
out, and then all are sorted.

Bytes: the log-weights once, 1/32 of float32's again for sums; residual twice, and 64 weights for each draw.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastalign.kernels._elementary import exp
from fastalign.kernels._philox import philox_uniform
from torch import Tensor

from fastalign import empty
from fastalign.reference import RESAMPLE_METHODS

BLOCK = 64  # weights under one cumulative sum
TILE = 2048  # elements of a program that streams a row
WIDTH = 1024  # sums that the program which cumulates them reads at once
DRAWS = 32  # of one program

# Sets these draws apart from those of sample_tokens, whose offsets are below 2^63: one seed serves both.
DOMAIN = tl.constexpr(-(2**63))
BELOW_ONE = tl.constexpr(1 - 2.0**-53)
# A share that is whole but for rounding is whole; the same number as in the reference.
SHARE_SLACK = tl.constexpr(1 + 1e-12)


@triton.jit
def _load(log_weights, mask, row, at, valid, row_stride, stride, mask_row_stride, mask_stride, MASKED: tl.constexpr):
    """Log-weights as float64, -inf where masked or not valid."""
    at, row = at.to(tl.int64), row.to(tl.int64)
    if MASKED:
        valid = valid & tl.load(mask + row * mask_row_stride + at * mask_stride, mask=valid, other=0).to(tl.int1)
    return tl.load(log_weights + row * row_stride + at * stride, mask=valid, other=float("-inf")).to(tl.float64)


@triton.jit
def _sum_blocks(
    sums,
    tile_tops,
    log_weights,
    mask,
    n,
    tiles,
    row_stride,
    stride,
    mask_row_stride,
    mask_stride,
    MASKED: tl.constexpr,
    SUMS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest of a tile, NaN if one is, and the sums of exp(x - largest) of its blocks."""
    program = tl.program_id(0).to(tl.int64)
    row, tile = program // tiles, program % tiles
    block = tl.arange(0, TILE // BLOCK)
    at = tile * TILE + block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = _load(log_weights, mask, row, at, at < n, row_stride, stride, mask_row_stride, mask_stride, MASKED)
    top = tl.where(tl.max((x != x).to(tl.int32)) > 0, float("nan"), tl.max(x))
    tl.store(tile_tops + program, top)
    if SUMS:
        weights = exp(x - tl.where(top == float("-inf"), 0, top))
        tl.store(sums + program * (TILE // BLOCK) + block, tl.sum(weights, 1))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _cumulate(
    sums,
    tile_tops,
    tops,
    blocks,
    tiles,
    FIRST: tl.constexpr,
    SUMS: tl.constexpr,
    PER_TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Cumulative sums in the place of a row's sums. FIRST: each is about its tile's largest, and the row's is found.

    They never fall, and rise only where there is weight, whatever rounding does: so no search ends at a block of zeros.
    """
    program = tl.program_id(0).to(tl.int64)
    step = tl.arange(0, WIDTH)
    if FIRST:
        largest = tl.full((WIDTH,), float("-inf"), tl.float64)
        nan = tl.zeros((WIDTH,), tl.int32)
        for start in tl.range(0, tiles, WIDTH):
            x = tl.load(tile_tops + program * tiles + start + step, mask=start + step < tiles, other=float("-inf"))
            nan = nan | (x != x).to(tl.int32)
            largest = tl.maximum(largest, x)
        top = tl.max(largest)
        lost = (tl.max(nan) > 0) | (top == float("-inf")) | (top == float("inf"))
        top = tl.where(lost, float("nan"), top)
        tl.store(tops + program, top)
    if SUMS:
        sums += program * blocks
        before = tl.full((), 0, tl.float64)
        for start in tl.range(0, blocks, WIDTH):
            block = start + step
            valid = block < blocks
            x = tl.load(sums + block, mask=valid, other=0)
            if FIRST:
                about = tl.load(tile_tops + program * tiles + block // PER_TILE, mask=valid, other=float("-inf"))
                x *= exp(about - top)
            cumulative = tl.where(x > 0, before + tl.cumsum(x, 0), before)
            cumulative = tl.associative_scan(cumulative, 0, _larger)
            tl.store(sums + block, cumulative, mask=valid)
            before = tl.max(cumulative)


@triton.jit
def _split(weights, per_weight):
    """Shares of the k draws as whole copies and a remainder."""
    share = weights * per_weight
    copies = tl.floor(share * SHARE_SLACK)
    return copies, tl.maximum(share - copies, 0)


@triton.jit
def _sum_shares(
    sums,
    cumulative,
    tops,
    log_weights,
    mask,
    n,
    k,
    tiles,
    row_stride,
    stride,
    mask_row_stride,
    mask_stride,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For "residual": the sums of copies, and those of remainders, by blocks."""
    program = tl.program_id(0).to(tl.int64)
    row, tile = program // tiles, program % tiles
    blocks = tiles * (TILE // BLOCK)
    block = tile * (TILE // BLOCK) + tl.arange(0, TILE // BLOCK)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = _load(log_weights, mask, row, at, at < n, row_stride, stride, mask_row_stride, mask_stride, MASKED)
    weights = exp(x - tl.load(tops + row))
    copies, rest = _split(weights, k / tl.load(cumulative + row * blocks + blocks - 1))
    tl.store(sums + row * 2 * blocks + block, tl.sum(copies, 1))
    tl.store(sums + (row * 2 + 1) * blocks + block, tl.sum(rest, 1))


@triton.jit
def _find_block(cumulative, target, blocks):
    """The first block whose cumulative sum exceeds the target or is the last one's, in each of a vector of searches."""
    low = tl.zeros_like(target).to(tl.int32)
    high = low + blocks - 1
    total = tl.load(cumulative + high)
    width = blocks
    while width > 1:
        middle = (low + high) // 2
        found = tl.load(cumulative + middle)
        beyond = (found > target) | (found >= total)
        high = tl.where(beyond, middle, high)
        low = tl.where(beyond, low, tl.minimum(middle + 1, high))
        width = (width + 1) // 2
    return low


@triton.jit(do_not_specialize=["seed"])
def _draw(
    ids,
    cumulative,
    shares,
    tops,
    log_weights,
    mask,
    n,
    k,
    programs,
    blocks,
    row_stride,
    stride,
    mask_row_stride,
    mask_stride,
    seed: tl.int64,
    METHOD: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    DRAWS: tl.constexpr,
):
    """DRAWS of a row's k draws. shares: what `_sum_shares` made, cumulated, for "residual"."""
    program = tl.program_id(0).to(tl.int64)
    row = program // programs
    draw = program % programs * DRAWS + tl.arange(0, DRAWS)
    cumulative += row * blocks
    total = tl.load(cumulative + blocks - 1)
    number = draw
    if METHOD == "residual":
        shares += row * 2 * blocks
        used = tl.load(shares + blocks - 1).to(tl.int64)
        whole = draw < used
        number = tl.maximum(draw - used, 0)
    if METHOD == "systematic":
        share = philox_uniform(seed, row, number * 0 + DOMAIN)
    else:
        share = philox_uniform(seed, row, number + DOMAIN)
    if METHOD == "systematic" or METHOD == "stratified":
        share = (draw.to(tl.float64) + share) / k
    share = tl.minimum(share, BELOW_ONE)
    if METHOD == "residual":
        target = tl.where(whole, draw.to(tl.float64), share * tl.load(shares + 2 * blocks - 1))
        source = shares + tl.where(whole, 0, blocks)
    else:
        target = share * total
        source = cumulative + draw * 0

    block = _find_block(source, target, blocks)
    before = tl.load(source + block - 1, mask=block > 0, other=0)
    lane = tl.arange(0, BLOCK)[None, :]
    at = block[:, None] * BLOCK + lane
    x = _load(log_weights, mask, row, at, at < n, row_stride, stride, mask_row_stride, mask_stride, MASKED)
    top = tl.load(tops + row)
    weights = exp(x - top)
    if METHOD == "residual":
        copies, rest = _split(weights, k / total)
        weights = tl.where(whole[:, None], copies, rest)
    beyond = (weights > 0) & (before[:, None] + tl.cumsum(weights, 1) > target[:, None])
    first = tl.min(tl.where(beyond, lane, BLOCK), 1)
    last = tl.max(tl.where(weights > 0, lane, 0), 1)  # with any weight, should rounding let none exceed the target
    found = block * BLOCK + tl.minimum(first, last)
    tl.store(ids + row * k + draw, tl.where(top == top, found, -1).to(tl.int64), mask=draw < k)


@triton.jit(do_not_specialize=["seed"])
def _winners(
    best,
    best_ids,
    keys,
    ids,
    tops,
    log_weights,
    mask,
    n,
    keep,
    tiles,
    row_stride,
    stride,
    mask_row_stride,
    mask_stride,
    seed: tl.int64,
    FIRST: tl.constexpr,
    PERTURBED: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
):
    """The `keep` largest keys of a tile in index order, the lower index among ties; -inf and id -1 in places left over.

    FIRST: the keys are the row's own log-weights below their largest, PERTURBED by Gumbel noise.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    lane = tl.arange(0, TILE)
    at = program % tiles * TILE + lane
    if FIRST:
        x = _load(log_weights, mask, row, at, at < n, row_stride, stride, mask_row_stride, mask_stride, MASKED)
        key = x - tl.load(tops + row)
        id = at
        if PERTURBED:
            key = key - tl.log(-tl.log(philox_uniform(seed, row, at + DOMAIN)))
    else:
        key = tl.load(keys + row * n + at, mask=at < n, other=float("-inf"))
        id = tl.load(ids + row * n + at, mask=at < n, other=-1)

    # Bits that sort as the keys do; then, bit by bit, the largest number that `keep` of them reach, or enough of it.
    bits = tl.where(key == 0, 0.0, key).to(tl.int64, bitcast=True)
    bits = tl.where(bits < 0, ~bits, bits ^ DOMAIN).to(tl.uint64, bitcast=True)
    bits = tl.where(key > float("-inf"), bits, 0)  # so are 0 those of NaN, as all are in a row without a largest
    border, bit = tl.full((), 0, tl.uint64), tl.full((), 1 << 63, tl.uint64)
    reached = tl.sum((bits > 0).to(tl.int32))
    while (bit > 0) & (reached > keep):
        count = tl.sum((bits >= (border | bit)).to(tl.int32))
        border |= tl.where(count >= keep, bit, 0)
        reached = tl.where(count >= keep, count, reached)
        bit >>= 1
    above = bits > border
    tie = (bits == border) & (bits > 0)
    room = keep - tl.sum(above.to(tl.int32))
    won = above | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= room))
    until = tl.cumsum(won.to(tl.int32), 0)
    place = tl.where(won, until - 1, tl.sum(won.to(tl.int32)) + lane - until)
    to = program * keep + place
    tl.store(best + to, tl.where(won, key, float("-inf")), mask=place < keep)
    tl.store(best_ids + to, tl.where(won, id, -1), mask=place < keep)


def resample(log_weights: Tensor, k: int, method: int, mask: Tensor | None, seed: int) -> Tensor:
    ids = empty.resample(log_weights, k)
    prompts, n = log_weights.shape
    if prompts == 0:
        return ids
    name = RESAMPLE_METHODS[method]
    draws = name not in ("gumbel_top_k", "best")
    tile = max(min(TILE, triton.next_power_of_2(n)), BLOCK)
    warps = max(tile // 512, 1)
    tiles, blocks = triton.cdiv(n, tile), triton.cdiv(n, tile) * (tile // BLOCK)
    like = {"dtype": torch.float64, "device": log_weights.device}
    tops, tile_tops = torch.empty(prompts, **like), torch.empty(prompts, tiles, **like)
    sums = torch.empty(prompts, blocks if draws else 0, **like)
    source = (log_weights, log_weights if mask is None else mask, n)
    strides = (*log_weights.stride(), *((0, 0) if mask is None else mask.stride()))
    masked = mask is not None

    _sum_blocks[(prompts * tiles,)](
        sums,
        tile_tops,
        *source,
        tiles,
        *strides,
        MASKED=masked,
        SUMS=draws,
        TILE=tile,
        BLOCK=BLOCK,
        enable_fp_fusion=True,
        num_warps=warps,
    )
    width = min(WIDTH, triton.next_power_of_2(blocks))
    _cumulate[(prompts,)](
        sums,
        tile_tops,
        tops,
        blocks,
        tiles,
        FIRST=True,
        SUMS=draws,
        PER_TILE=tile // BLOCK,
        WIDTH=width,
        enable_fp_fusion=True,
        num_warps=max(width // 256, 1),
    )
    if not draws:
        return _largest(ids, tops, source, tiles, strides, seed, name == "gumbel_top_k", masked, tile, warps)
    shares = sums
    if name == "residual":
        shares = torch.empty(prompts, 2, blocks, **like)
        _sum_shares[(prompts * tiles,)](
            shares,
            sums,
            tops,
            *source,
            k,
            tiles,
            *strides,
            MASKED=masked,
            TILE=tile,
            BLOCK=BLOCK,
            enable_fp_fusion=True,
            num_warps=warps,
        )
        _cumulate[(prompts * 2,)](
            shares,
            tile_tops,
            tops,
            blocks,
            tiles,
            FIRST=False,
            SUMS=True,
            PER_TILE=1,
            WIDTH=width,
            enable_fp_fusion=True,
            num_warps=max(width // 256, 1),
        )
    several = min(DRAWS, triton.next_power_of_2(k))
    programs = triton.cdiv(k, several)
    _draw[(prompts * programs,)](
        ids, sums, shares, tops, *source, k, programs, blocks, *strides, seed,
        METHOD=name, MASKED=masked, BLOCK=BLOCK, DRAWS=several,
        enable_fp_fusion=True, num_warps=max(several * BLOCK // 512, 1),
    )  # fmt: skip
    return ids


def _largest(ids, tops, source, tiles, strides, seed, perturbed, masked, tile, warps) -> Tensor:
    """ids <- the k largest keys of each row, largest first."""
    log_weights, mask, n = source
    prompts, k = ids.shape
    keys, found = tops, ids  # not read the first time
    first = True
    while first or (n > k and (tiles == 1 or tiles * min(k, tile) <= n // 2)):
        keep = min(k, tile)
        best = tops.new_empty(prompts, tiles * keep)
        best_ids = ids.new_empty(prompts, tiles * keep)
        _winners[(prompts * tiles,)](
            best, best_ids, keys, found, tops, log_weights, mask, n, keep, tiles, *strides, seed,
            FIRST=first, PERTURBED=perturbed, MASKED=masked, TILE=tile, enable_fp_fusion=True, num_warps=2 * warps,
        )  # fmt: skip
        keys, found, first = best, best_ids, False
        n = tiles * keep
        tiles = triton.cdiv(n, tile)
    if n > 1:
        found = found.gather(1, keys.sort(dim=-1, descending=True, stable=True).indices)
    ids[:, :n] = found[:, :k]
    ids[:, n:] = -1
    return ids
