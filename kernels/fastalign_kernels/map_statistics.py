"""map_statistics: sums of 1, x and x xᵀ under the tilted weights of K values of λ, from one read of the rewards.

A program takes a stretch of rows and up to LAMBDAS values of λ. Its lanes are pairs (row of a tile, λ); each keeps the
sums of the rows that pass it in float64, about its own running maximum, so that the loop holds no exchange between
lanes, and they are merged at the end. Without groups every program leaves its sums and `_merge` makes moments of them.
With groups, rows are put in order of their group first (on the device, without asking how many groups there are); a
program takes every PROGRAMS-th group, sums it about its own first row as the CPU does, and adds up the moments.
Of more than 64 values the second moments are cut into blocks of rows, each in a program of its own.

Bytes: the rewards once per LAMBDAS values of λ; of some values and λ, the sums of ROWS rows are little beside them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from fastalign.kernels._elementary import exp
from fastalign.kernels._softmax import lowest
from torch import Tensor

from fastalign import empty

LAMBDAS = 16
MOST_SUMS = 4096  # float64 second moments of a program,
SUMS = 2048  # and, where there is a choice, so many: 16 for each of its threads, so that three programs fit on a core
MOST_LANES = 128
WARPS = 4
PROGRAMS = 512
ROWS = 2048  # that a program reads at least: of few values and λ, what it leaves is then little beside them
SCALARS = 6  # of a program and λ: shift, largest score, Σ e, Σ e², and shift and Σ of the weights alone


@triton.jit
def _sum_rows(
    rewards,
    order,
    log_weights,
    lam,
    center,
    own_center,
    begin,
    end,
    row_stride,
    column_stride,
    m,
    first_own,
    LANES: tl.constexpr,
    LAMBDAS: tl.constexpr,
    OWN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sums over the rows [begin, end): of each λ (LAMBDAS,), (LAMBDAS, WIDTH) and (LAMBDAS, OWN, WIDTH).

    lam (LANES, WIDTH): lane l holds λ number l % LAMBDAS. Of the second moments, OWN rows from first_own on.
    """
    ROWS: tl.constexpr = LANES // LAMBDAS
    slot = tl.arange(0, LANES) // LAMBDAS
    column, own = tl.arange(0, WIDTH).to(tl.int64), (first_own + tl.arange(0, OWN)).to(tl.int64)
    total = tl.zeros((LANES,), tl.float64)
    shift = total + lowest(tl.float64)
    top, weight_shift = total + float("-inf"), shift
    squares, weight_total = total, total
    first = tl.zeros((LANES, WIDTH), tl.float64)
    second = tl.zeros((LANES, OWN, WIDTH), tl.float64)
    for start in tl.range(begin, end, ROWS):
        row = (start + slot).to(tl.int64)
        inside = row < end
        if order is not None:
            row = tl.load(order + row, mask=inside, other=0)
        at = rewards + row[:, None] * row_stride
        valid = inside[:, None] & (column < m)[None, :]
        x = tl.load(at + column[None, :] * column_stride, mask=valid, other=0.0).to(tl.float64)
        x = tl.where(valid, x - center[None, :], 0.0)
        if OWN == WIDTH:
            own_x = x
        else:
            valid = inside[:, None] & (own < m)[None, :]
            own_x = tl.load(at + own[None, :] * column_stride, mask=valid, other=0.0).to(tl.float64)
            own_x = tl.where(valid, own_x - own_center[None, :], 0.0)
        score = tl.where(inside, tl.sum(lam * x, 1), float("-inf"))
        if log_weights is not None:
            w = tl.load(log_weights + row, mask=inside, other=float("-inf")).to(tl.float64)
            score = tl.where(w > float("-inf"), score, float("-inf"))
            raised = tl.maximum(weight_shift, w)
            weight_total = weight_total * exp(weight_shift - raised) + exp(w - raised)
            weight_shift = raised
        top = tl.maximum(top, score)
        if log_weights is not None:
            score = tl.where(w > float("-inf"), score + w, float("-inf"))
        raised = tl.maximum(shift, score)
        scale, e = exp(shift - raised), exp(score - raised)
        shift = raised
        total = total * scale + e
        squares = squares * scale * scale + e * e
        first = first * scale[:, None] + e[:, None] * x
        second = second * scale[:, None, None] + (e[:, None] * own_x)[:, :, None] * x[:, None, :]

    # The lanes of each λ become one.
    lanes = tl.reshape(shift, (ROWS, LAMBDAS))
    shift = tl.max(lanes, 0)
    scale = exp(lanes - shift[None, :])
    total = tl.sum(tl.reshape(total, (ROWS, LAMBDAS)) * scale, 0)
    squares = tl.sum(tl.reshape(squares, (ROWS, LAMBDAS)) * scale * scale, 0)
    top = tl.max(tl.reshape(top, (ROWS, LAMBDAS)), 0)
    scale = tl.reshape(scale, (LANES,))
    first = tl.sum(tl.reshape(first * scale[:, None], (ROWS, LAMBDAS, WIDTH)), 0)
    second = tl.sum(tl.reshape(second * scale[:, None, None], (ROWS, LAMBDAS, OWN, WIDTH)), 0)
    lanes = tl.reshape(weight_shift, (ROWS, LAMBDAS))
    weight_shift = tl.max(lanes, 0)
    weight_total = tl.sum(tl.reshape(weight_total, (ROWS, LAMBDAS)) * exp(lanes - weight_shift[None, :]), 0)
    return shift, top, total, squares, weight_shift, weight_total, first, second


@triton.jit
def _moments(shift, top, total, squares, first, second, log_norm, first_own, OWN: tl.constexpr, WIDTH: tl.constexpr):
    """log_z, ess, max_score (LAMBDAS,), mean (LAMBDAS, WIDTH) and OWN rows of cov (LAMBDAS, OWN, WIDTH)."""
    mean = first / total[:, None]
    if OWN == WIDTH:
        own_mean = mean
    else:
        same = (first_own + tl.arange(0, OWN))[:, None] == tl.arange(0, WIDTH)[None, :]
        own_mean = tl.sum(tl.where(same[None, :, :], mean[:, None, :], 0.0), 2)
    cov = second / total[:, None, None] - own_mean[:, :, None] * mean[:, None, :]
    return shift + tl.log(total) - log_norm, total * total / squares, tl.where(total == total, top, total), mean, cov


@triton.jit
def _first_own(axis: tl.constexpr, OWN: tl.constexpr, WIDTH: tl.constexpr):
    """The first of this program's rows of second moments; where it has all of them, a 0 that the compiler knows."""
    return tl.program_id(axis) * (OWN % WIDTH)


@triton.jit
def _matrix(first_own, row_size, OWN: tl.constexpr, WIDTH: tl.constexpr):
    """The offsets (1, OWN, WIDTH) of rows first_own .. of a matrix."""
    return ((first_own + tl.arange(0, OWN)) * row_size)[None, :, None] + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def _joint(
    partials,
    rewards,
    lam,
    center,
    log_weights,
    n,
    m,
    count,
    rows_each,
    row_stride,
    column_stride,
    SIZE: tl.constexpr,
    SCALARS: tl.constexpr,
    LANES: tl.constexpr,
    LAMBDAS: tl.constexpr,
    OWN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program, first_k, first_own = tl.program_id(0), tl.program_id(1) * LAMBDAS, _first_own(2, OWN, WIDTH)
    column, own = tl.arange(0, WIDTH), first_own + tl.arange(0, OWN)
    k = first_k + tl.arange(0, LANES) % LAMBDAS
    asked = (k < count)[:, None] & (column < m)[None, :]
    of_lanes = tl.load(lam + k[:, None] * m + column[None, :], mask=asked, other=0.0)
    middle, own_middle = tl.zeros((WIDTH,), tl.float64), tl.zeros((OWN,), tl.float64)
    if center is not None:
        middle += tl.load(center + column, mask=column < m, other=0.0)
        own_middle += tl.load(center + own, mask=own < m, other=0.0)
    begin = program * rows_each
    shift, top, total, squares, weight_shift, weight_total, first, second = _sum_rows(
        rewards, None, log_weights, of_lanes, middle, own_middle, begin, tl.minimum(begin + rows_each, n),
        row_stride, column_stride, m, first_own, LANES, LAMBDAS, OWN, WIDTH,
    )  # fmt: skip
    k = first_k + tl.arange(0, LAMBDAS)
    to = partials + (program.to(tl.int64) * count + k) * SIZE
    once = k < tl.where(first_own == 0, count, 0)  # the same in all blocks of second moments
    tl.store(to, shift, mask=once)
    tl.store(to + 1, top, mask=once)
    tl.store(to + 2, total, mask=once)
    tl.store(to + 3, squares, mask=once)
    tl.store(to + 4, weight_shift, mask=once)
    tl.store(to + 5, weight_total, mask=once)
    tl.store(to[:, None] + SCALARS + column[None, :], first, mask=once[:, None])
    matrix = to[:, None, None] + SCALARS + WIDTH + _matrix(first_own, WIDTH, OWN, WIDTH)
    tl.store(matrix, second, mask=(k < count)[:, None, None])


@triton.jit
def _merge(
    partials,
    log_z,
    mean,
    cov,
    ess,
    max_score,
    programs,
    m,
    count,
    log_n: tl.float64,
    WEIGHTED: tl.constexpr,
    SIZE: tl.constexpr,
    SCALARS: tl.constexpr,
    TILE: tl.constexpr,
    OWN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The moments of one λ from what the programs left; OWN rows of its covariance."""
    k, first_own = tl.program_id(0), _first_own(1, OWN, WIDTH)
    one = tl.arange(0, 1)[None, :]
    largest = tl.zeros((TILE, 1), tl.float64) + lowest(tl.float64)
    weight_largest = largest
    for start in tl.range(0, programs, TILE):
        p = start + tl.arange(0, TILE)[:, None] + one
        at = partials + (p.to(tl.int64) * count + k) * SIZE
        largest = tl.maximum(largest, tl.load(at, mask=p < programs, other=float("-inf")))
        if WEIGHTED:
            weight_largest = tl.maximum(weight_largest, tl.load(at + 4, mask=p < programs, other=float("-inf")))
    shift, weight_shift = tl.max(largest, 0), tl.max(weight_largest, 0)
    total = tl.zeros((TILE, 1), tl.float64)
    squares, weight_total, top = total, total, total + float("-inf")
    first, second = tl.zeros((TILE, WIDTH), tl.float64), tl.zeros((TILE, OWN, WIDTH), tl.float64)
    for start in tl.range(0, programs, TILE):
        p = start + tl.arange(0, TILE)[:, None] + one
        at = partials + (p.to(tl.int64) * count + k) * SIZE
        there = p < programs
        scale = exp(tl.load(at, mask=there, other=float("-inf")) - shift[None, :])
        top = tl.maximum(top, tl.load(at + 1, mask=there, other=float("-inf")))
        total += scale * tl.load(at + 2, mask=there, other=0.0)
        squares += scale * scale * tl.load(at + 3, mask=there, other=0.0)
        if WEIGHTED:
            drop = exp(tl.load(at + 4, mask=there, other=float("-inf")) - weight_shift[None, :])
            weight_total += drop * tl.load(at + 5, mask=there, other=0.0)
        first += scale * tl.load(at + SCALARS + tl.arange(0, WIDTH)[None, :], mask=there, other=0.0)
        matrix = tl.expand_dims(at, 2) + SCALARS + WIDTH + _matrix(first_own, WIDTH, OWN, WIDTH)
        second += tl.expand_dims(scale, 2) * tl.load(matrix, mask=tl.expand_dims(there, 2), other=0.0)
    if WEIGHTED:
        log_norm = weight_shift + tl.log(tl.sum(weight_total, 0))
    else:
        log_norm = tl.full((1,), log_n, tl.float64)
    found_log_z, found_ess, found_top, found_mean, found_cov = _moments(
        shift,
        tl.max(top, 0),
        tl.sum(total, 0),
        tl.sum(squares, 0),
        tl.expand_dims(tl.sum(first, 0), 0),
        tl.expand_dims(tl.sum(second, 0), 0),
        log_norm,
        first_own,
        OWN,
        WIDTH,
    )
    k = k + tl.arange(0, 1)
    tl.store(log_z + k, found_log_z)
    tl.store(ess + k, found_ess)
    tl.store(max_score + k, found_top)
    column, own = tl.arange(0, WIDTH), first_own + tl.arange(0, OWN)
    tl.store(mean + k[:, None] * m + column[None, :], found_mean, mask=(column < m)[None, :])
    at = cov + k[:, None, None] * m * m + _matrix(first_own, m, OWN, WIDTH)
    tl.store(at, found_cov, mask=(own < m)[None, :, None] & (column < m)[None, None, :])


@triton.jit
def _by_group(
    partials,
    rewards,
    order,
    offsets,
    groups,
    lam,
    center,
    log_weights,
    m,
    count,
    programs,
    row_stride,
    column_stride,
    LANES: tl.constexpr,
    LAMBDAS: tl.constexpr,
    OWN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The sums over this program's groups of each group's moments: log_z, ess, max_score, mean (m), cov (m, m)."""
    program, first_k, first_own = tl.program_id(0), tl.program_id(1) * LAMBDAS, _first_own(2, OWN, WIDTH)
    column, own = tl.arange(0, WIDTH), first_own + tl.arange(0, OWN)
    lane_k, k = first_k + tl.arange(0, LANES) % LAMBDAS, first_k + tl.arange(0, LAMBDAS)
    asked = (lane_k < count)[:, None] & (column < m)[None, :]
    of_lanes = tl.load(lam + lane_k[:, None] * m + column[None, :], mask=asked, other=0.0)
    asked = (k < count)[:, None] & (column < m)[None, :]
    of_each = tl.load(lam + k[:, None] * m + column[None, :], mask=asked, other=0.0)
    sum_log_z = tl.zeros((LAMBDAS,), tl.float64)
    sum_ess, sum_top = sum_log_z, sum_log_z
    sum_mean, sum_cov = tl.zeros((LAMBDAS, WIDTH), tl.float64), tl.zeros((LAMBDAS, OWN, WIDTH), tl.float64)
    for group in tl.range(program, tl.load(groups).to(tl.int32), programs):
        begin, end = tl.load(offsets + group).to(tl.int32), tl.load(offsets + group + 1).to(tl.int32)
        # About its own first row: within a prompt rewards may differ by far less than between prompts.
        at = rewards + tl.load(order + begin) * row_stride
        middle = tl.load(at + column.to(tl.int64) * column_stride, mask=column < m, other=0.0).to(tl.float64)
        own_middle = tl.load(at + own.to(tl.int64) * column_stride, mask=own < m, other=0.0).to(tl.float64)
        shift, top, total, squares, weight_shift, weight_total, first, second = _sum_rows(
            rewards, order, log_weights, of_lanes, middle, own_middle, begin, end,
            row_stride, column_stride, m, first_own, LANES, LAMBDAS, OWN, WIDTH,
        )  # fmt: skip
        if log_weights is not None:
            log_norm = weight_shift + tl.log(weight_total)
        else:
            log_norm = tl.log((end - begin).to(tl.float64))
        log_z, ess, top, mean, cov = _moments(
            shift, top, total, squares, first, second, log_norm, first_own, OWN, WIDTH
        )
        if center is not None:
            middle -= tl.load(center + column, mask=column < m, other=0.0)
        moved = tl.sum(of_each * middle[None, :], 1)
        sum_log_z += log_z + moved
        sum_ess += ess
        sum_top += top + moved
        sum_mean += mean + middle[None, :]
        sum_cov += cov
    to = partials + (program.to(tl.int64) * count + k) * (3 + m + m * m)
    once = k < tl.where(first_own == 0, count, 0)  # the same in all blocks of second moments
    tl.store(to, sum_log_z, mask=once)
    tl.store(to + 1, sum_ess, mask=once)
    tl.store(to + 2, sum_top, mask=once)
    tl.store(to[:, None] + 3 + column[None, :], sum_mean, mask=once[:, None] & (column < m)[None, :])
    kept = (k < count)[:, None, None] & (own < m)[None, :, None] & (column < m)[None, None, :]
    tl.store(to[:, None, None] + 3 + m + _matrix(first_own, m, OWN, WIDTH), sum_cov, mask=kept)


def statistics(
    rewards: Tensor, lam: Tensor, center: Tensor | None, log_weights: Tensor | None, groups: Tensor | None
) -> tuple[Tensor, ...]:
    """A group whose rows all have weight 0 gives NaN: to raise, the host would have to wait."""
    n, m = rewards.shape
    out = empty.map_statistics(rewards, lam)
    lam = lam.double().reshape(-1, m).contiguous()
    center = None if center is None else center.double().contiguous()
    count, width = len(lam), triton.next_power_of_2(m)
    own = max(min(width, MOST_SUMS // width), 1)
    most = MOST_LANES if groups is None else MOST_LANES // 4  # groups' own sums and pointers want registers too
    lanes = max(min(most, SUMS // (own * width)), 1)
    lambdas = min(triton.next_power_of_2(count), LAMBDAS, lanes)
    blocks = (triton.cdiv(count, lambdas), width // own)
    log_weights = None if log_weights is None else log_weights.contiguous()
    shape = {"LANES": lanes, "LAMBDAS": lambdas, "OWN": own, "WIDTH": width}
    warps = WARPS * max(own * width // SUMS, 1)  # no thread has more than its 16 sums: older Tritons spill them
    if groups is not None:
        order, offsets, found = _in_order(groups)
        programs = min(PROGRAMS, triton.cdiv(n, 8))
        sums = rewards.new_empty(programs, count, 3 + m + m * m, dtype=torch.float64)
        _by_group[(programs, *blocks)](
            sums, rewards, order, offsets, found, lam, center, log_weights, m, count, programs, *rewards.stride(),
            **shape, enable_fp_fusion=True, num_warps=warps,
        )  # fmt: skip
        log_z, ess, top, mean, cov = (sums.sum(0) / found).split([1, 1, 1, m, m * m], 1)
        return tuple(x.reshape(to.shape).clone() for x, to in zip((log_z, mean, cov, ess, top), out, strict=True))
    each = max(triton.cdiv(n, PROGRAMS), ROWS)
    programs, size = triton.cdiv(n, each), SCALARS + width + width * width
    sums = rewards.new_empty(programs, count, size, dtype=torch.float64)
    _joint[(programs, *blocks)](
        sums, rewards, lam, center, log_weights, n, m, count, each, *rewards.stride(),
        SIZE=size, SCALARS=SCALARS, **shape, enable_fp_fusion=True, num_warps=warps,
    )  # fmt: skip
    _merge[(count, width // own)](
        sums, *out, programs, m, count, math.log(n),
        WEIGHTED=log_weights is not None, SIZE=size, SCALARS=SCALARS, TILE=lanes, OWN=own, WIDTH=width,
        enable_fp_fusion=True, num_warps=warps,
    )  # fmt: skip
    return out


def _in_order(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers by group, where each group begins in them (and the last ends), and how many there are (1,)."""
    n = len(groups)
    ordered, order = torch.sort(groups, stable=True)
    begins = torch.ones(n, dtype=torch.bool, device=groups.device)
    begins[1:] = ordered[1:] != ordered[:-1]
    number = begins.cumsum(0)
    place = torch.where(begins, number - 1, n + 1)  # n + 1: where all that begins no group may go
    offsets = torch.full((n + 2,), n, device=groups.device)
    offsets.scatter_(0, place, torch.arange(n, device=groups.device))
    return order, offsets, number[-1:]
