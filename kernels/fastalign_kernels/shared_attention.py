"""shared_attention: attention of one new token a row over its prompt's keys, stored once, and over the row's own.

Two launches, whatever the number of prompts. `_prompts`: a program takes a tile of the queries of a prompt's rows (all
rows × the heads that share a key head) and a share of the prompt's keys, which it thus reads once for all of them; it
leaves the tile's output over that share and the log of its weights' sum. `_rows`: a program takes a row and a key head,
goes over the row's own keys, and joins what the shares left. Softmax in base 2: log2(e) is a factor of the scores.

Bytes: the prompts' keys and values once per tile of queries, a row's own once, and a float32 output a share and query.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from fastalign.kernels._products import TYPES, options
from fastalign.kernels._rows import unit_stride
from fastalign.kernels._softmax import lowest, transform, transform_factors
from torch import Tensor

from fastalign import empty

QUERIES = 64  # of a tile, in 16 bits
KEYS = 64
WIDE = 256  # bytes of a head's key: beyond it tiles are smaller
LEAST = 16  # of any side of a product


@triton.jit
def _over_keys(
    x, keys, values, start, stop, earliest, to_cap, to_z,
    D: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The queries x (M, d) over the keys from `start` to `stop`, from `earliest` (M,) on each: (largest z (M,), the sum
    of exp2(z - largest) (M,), that of these times the values (M, dv))."""
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    top = tl.zeros((BLOCK_M,), tl.float32) + lowest(tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for at in range(start, stop, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        inside = n < stop
        k = tl.load(keys + n[None, :] * D + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0)
        v = tl.load(values + n[:, None] * DV + dv[None, :], mask=inside[:, None] & (dv < DV)[None, :], other=0)
        seen = inside[None, :]
        if WINDOW:
            seen = seen & (n[None, :] >= earliest[:, None])
        z = transform(tl.dot(x.to(DOT), k.to(DOT)), to_cap, to_z, SOFTCAP)
        z = tl.where(seen, z, float("-inf"))
        now = tl.maximum(top, tl.max(z, 1))
        p = tl.exp2(z - now[:, None])
        scale = tl.exp2(top - now)
        acc = tl.dot(p.to(DOT), v.to(DOT), acc * scale[:, None])
        top, total = now, total * scale + tl.sum(p, 1)
    return top, total, acc


@triton.jit(do_not_specialize=["rows", "heads", "tiles", "splits", "window", "tokens"])
def _prompts(
    parts, logs, q, keys, values, bounds, order, firsts, lengths,
    rows, heads, tiles, splits, window, q_row, q_head, tokens, to_cap, to_z,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    prompt, offset = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    head, split = tl.program_id(1), tl.program_id(2)
    first = tl.load(firsts + prompt)
    count = (tl.load(firsts + prompt + 1) - first).to(tl.int32) * GROUP
    if offset >= count:
        return
    begin = tl.load(bounds + prompt)
    size = (tl.load(bounds + prompt + 1) - begin).to(tl.int32)
    m = offset + tl.arange(0, BLOCK_M)
    live = m < count
    row = tl.load(order + first + m // GROUP, mask=live, other=0)
    of = head * GROUP + m % GROUP
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    x = tl.load(
        q + (row * q_row + of * q_head)[:, None] + d[None, :],
        mask=live[:, None] & (d < D)[None, :],
        other=0,
    )
    share = tl.cdiv(tl.cdiv(size, splits), BLOCK_N) * BLOCK_N
    start = split * share
    stop = tl.minimum(start + share, size)
    earliest = tl.zeros((BLOCK_M,), tl.int32)
    if WINDOW:  # the earliest key that a query sees
        length = tl.load(lengths + row, mask=live, other=0).to(tl.int32)
        earliest = tl.where(live, size + length - window + 1, size)
        start = tl.maximum(start, tl.min(earliest) // BLOCK_N * BLOCK_N)
    begin += head.to(tl.int64) * tokens
    keys += begin * D
    values += begin * DV
    top, total, acc = _over_keys(
        x, keys, values, start, stop, earliest, to_cap, to_z,
        D, DV, WINDOW, SOFTCAP, DOT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    to = (split.to(tl.int64) * rows + row) * heads + of
    unseen = total == 0
    total = tl.where(unseen, 1, total)
    tl.store(logs + to, tl.where(unseen, float("-inf"), top + tl.log2(total)), mask=live)
    acc /= total[:, None]
    tl.store(parts + to[:, None] * DV + dv[None, :], acc, mask=live[:, None] & (dv < DV)[None, :])


@triton.jit(do_not_specialize=["rows", "heads", "splits", "window", "room"])
def _rows(
    out, q, keys, values, lengths, parts, logs,
    rows, heads, splits, window, q_row, q_head, room, to_cap, to_z,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = m < GROUP
    of = head * GROUP + m
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    x = tl.load(q + row * q_row + of[:, None] * q_head + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0)
    stop = tl.load(lengths + row).to(tl.int32) + 1
    start = 0
    earliest = tl.zeros((BLOCK_M,), tl.int32)
    if WINDOW:
        earliest += stop - window
        start = tl.maximum(stop - window, 0) // BLOCK_N * BLOCK_N
    begin = (row * (heads // GROUP) + head) * room
    keys += begin * D
    values += begin * DV
    top, total, acc = _over_keys(
        x, keys, values, start, stop, earliest, to_cap, to_z,
        D, DV, WINDOW, SOFTCAP, DOT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    # ---- and over the prompt ----
    for split in range(0, splits):
        to = (split * rows.to(tl.int64) + row) * heads + of
        log = tl.load(logs + to, mask=live, other=float("-inf"))
        part = tl.load(parts + to[:, None] * DV + dv[None, :], mask=live[:, None] & (dv < DV)[None, :], other=0)
        now = tl.maximum(top, log)
        scale, weight = tl.exp2(top - now), tl.exp2(log - now)
        acc = acc * scale[:, None] + part * weight[:, None]
        total = total * scale + weight
        top = now
    acc /= total[:, None]
    to = row * heads + of
    tl.store(
        out + to[:, None] * DV + dv[None, :], acc.to(out.dtype.element_ty), mask=live[:, None] & (dv < DV)[None, :]
    )


def prompts(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    bounds: Tensor,
    order: Tensor,
    firsts: Tensor,
    lengths: Tensor,
    splits: int,
    most: int,
    scaling: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """The op's first half: outputs over each share of the prompts' keys, and the logs of their weights' sums."""
    parts, logs = empty.shared_attention_prompts(q, values, splits)
    q, heads, kv = unit_stride(q), q.shape[1], len(keys)
    wide = max(q.shape[-1], values.shape[-1]) * q.itemsize > WIDE
    block_m = LEAST if wide else min(2 * QUERIES // q.itemsize, _power(most * (heads // kv)))
    tiles = triton.cdiv(most * (heads // kv), block_m)
    _prompts[((len(bounds) - 1) * tiles, kv, splits)](
        parts, logs, q, keys.contiguous(), values.contiguous(), bounds, order, firsts, lengths,
        len(q), heads, tiles, splits, window, *q.stride()[:2], keys.shape[1],
        **_settings(q, keys, values, scaling, window, softcap, block_m),
    )  # fmt: skip
    return parts, logs


def rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    parts: Tensor,
    logs: Tensor,
    scaling: float,
    window: int,
    softcap: float,
) -> Tensor:
    """The second: over each row's own keys, and joined with the first."""
    out = empty.shared_attention(q, values)
    q, heads, kv = unit_stride(q), q.shape[1], keys.shape[1]
    block_m = min(QUERIES, _power(heads // kv))
    _rows[(len(q), kv, triton.cdiv(heads // kv, block_m))](
        out, q, keys.contiguous(), values.contiguous(), lengths, parts, logs,
        len(q), heads, len(parts), window, *q.stride()[:2], keys.shape[2],
        **_settings(q, keys[0], values[0], scaling, window, softcap, block_m),
    )  # fmt: skip
    return out


def _power(size: int) -> int:
    """The side of a block that holds it."""
    return max(LEAST, triton.next_power_of_2(size))


def _settings(
    q: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int, softcap: float, block_m: int
) -> dict:
    """What both kernels are given; keys (kv heads, tokens, d) and values."""
    d, dv = keys.shape[-1], values.shape[-1]
    to_cap, to_z, _ = transform_factors(math.log(2), softcap or None, scaling)
    block_d, block_dv = _power(d), _power(dv)
    size = max(block_d, block_dv) * q.itemsize
    full = q.itemsize == 4 and size == WIDE  # float32's products take each operand in three parts, in every warp
    return {
        "to_cap": to_cap,
        "to_z": to_z,
        "GROUP": q.shape[1] // len(keys),
        "D": d,
        "DV": dv,
        "WINDOW": window > 0,
        "SOFTCAP": softcap > 0,
        "DOT": tl.float32 if q.device.type == "cpu" else TYPES[q.dtype],  # the interpreter multiplies no bfloat16
        "BLOCK_M": block_m,
        "BLOCK_N": KEYS // 2 if full else KEYS if size <= WIDE else LEAST,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "num_warps": 8 if q.itemsize < 4 and (size > WIDE or block_m == QUERIES) else 4,
        "num_stages": 2,
        **options(q.dtype, q.device),
    }
