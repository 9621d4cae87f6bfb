"""gae: the recurrence over time as one parallel scan of the maps that its places are, from the end of each row.

What a place does to the pair behind it, the value V and the advantage A at the next valid place, is linear:
    V <- v + keep · V,    A <- term + from_value · V + decay · A,
a valid place having (v, 0, r - v, γ, γλ) and a masked one (0, 1, 0, 0, 1), which changes nothing. Such maps compose
associatively, so tl.associative_scan finds every place of a block in log2 steps. A row longer than a block goes block
by block from its end, one program a row, with the pair carried over.

Bytes: rewards, values and mask once, advantages and returns once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastalign.kernels._rows import row_start, rows_of
from fastalign.kernels._softmax import compute_type
from torch import Tensor

from fastalign import empty

BLOCK_BYTES = 4096  # of rewards
WARP_BYTES = 512  # 16 a thread


@triton.jit
def _compose(v, keep, term, from_value, decay, own_v, own_keep, own_term, own_from_value, own_decay):
    """First the map of the places behind, then that of the places before them (own_...)."""
    return (
        own_v + own_keep * v,
        own_keep * keep,
        own_term + own_from_value * v + own_decay * term,
        own_from_value * keep + own_decay * from_value,
        own_decay * decay,
    )


@triton.jit
def _gae(
    rewards,
    values,
    mask,
    advantages,
    returns,
    length,
    reward_inner,
    reward_outer_stride,
    reward_inner_stride,
    reward_column_stride,
    value_inner,
    value_outer_stride,
    value_inner_stride,
    value_column_stride,
    mask_inner,
    mask_outer_stride,
    mask_inner_stride,
    mask_column_stride,
    gamma: tl.float64,
    decay: tl.float64,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    gamma, decay = tl.full((), gamma, COMPUTE), tl.full((), decay, COMPUTE)
    rewards += row_start(row, reward_inner, reward_outer_stride, reward_inner_stride)
    values += row_start(row, value_inner, value_outer_stride, value_inner_stride)
    mask += row_start(row, mask_inner, mask_outer_stride, mask_inner_stride)
    advantages += row.to(tl.int64) * length
    returns += row.to(tl.int64) * length
    next_value = tl.full((), 0, COMPUTE)
    next_advantage = next_value
    blocks = tl.cdiv(length, BLOCK)
    for done in tl.range(0, blocks):  # counted upwards: of a range with a negative step no alignment is known
        place = tl.arange(0, BLOCK)
        t = (blocks - 1 - done) * BLOCK + place
        inside = t < length
        at = t.to(tl.int64)
        valid = tl.load(mask + at * mask_column_stride, mask=inside, other=0) != 0
        reward = tl.load(rewards + at * reward_column_stride, mask=inside, other=0.0).to(COMPUTE)
        value = tl.load(values + at * value_column_stride, mask=inside, other=0.0).to(COMPUTE)
        reward, value = tl.where(valid, reward, 0.0), tl.where(valid, value, 0.0)
        v, keep, term, from_value, left = tl.associative_scan(
            (
                value,
                tl.where(valid, 0.0, 1.0).to(COMPUTE),
                reward - value,
                tl.where(valid, gamma, 0.0),
                tl.where(valid, decay, 1.0),
            ),
            0,
            _compose,
            reverse=True,
        )
        after = term + from_value * next_value + left * next_advantage
        tl.store(advantages + t, tl.where(valid, after, 0.0), mask=inside)
        tl.store(returns + t, tl.where(valid, after + value, 0.0), mask=inside)
        next_value = tl.sum(tl.where(place == 0, v + keep * next_value, 0.0))
        next_advantage = tl.sum(tl.where(place == 0, after, 0.0))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    advantages, returns = empty.gae(rewards)
    length = rewards.shape[-1]
    (rewards, reward_rows), (values, value_rows), (mask, mask_rows) = (rows_of(x) for x in (rewards, values, mask))
    block = min(BLOCK_BYTES // rewards.itemsize, triton.next_power_of_2(length))
    _gae[(rewards.numel() // length,)](
        rewards, values, mask, advantages, returns, length, *reward_rows, *value_rows, *mask_rows, gamma, gamma * lam,
        COMPUTE=compute_type(rewards.dtype), BLOCK=block,
        enable_fp_fusion=True, num_warps=max(block * rewards.itemsize // WARP_BYTES, 1),
    )  # fmt: skip
    return advantages, returns
