"""Pairwise preference losses from the log-probabilities of tokens: one launch, one program a pair.

A program sums the chosen and the rejected completion under policy and reference over their masks, BLOCK tokens at a
time, and then has the pair's log-ratios as scalars: the loss, the rewards and the two derivatives are a few operations
more, by the formulas that `_pairwise` holds. Log-probabilities and mask are read once, padding too (a load that asks
the mask first is narrow and waits for it), and seven numbers a pair are written. The backward pass reads the mask and
writes the gradient (`_sum_gradient`).
"""

import math

import triton
import triton.language as tl
from fastalign.kernels._pairwise import FORMULAS, PER_TOKEN
from fastalign.kernels._sum_gradient import compute, contiguous_rows, valid_part

from fastalign import empty

BLOCK = 2048
PER_WARP = 256  # tokens: eight a thread of each of the rows that are summed


@triton.jit
def _forward(
    log_probs,
    ref_log_probs,
    mask,
    losses,
    chosen_rewards,
    rejected_rewards,
    sums,
    slopes,
    pairs,
    length,
    stride,
    ref_stride,
    mask_stride,
    beta: tl.float64,
    label_smoothing: tl.float64,
    log_kept: tl.float64,
    log_flipped: tl.float64,
    discopop_tau: tl.float64,
    FORMULA: tl.constexpr,
    SMOOTHS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    REFERENCE_TOKENS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    other = pair + pairs
    strides = (length, stride, ref_stride, mask_stride)
    chosen, ref_chosen, chosen_length = _sequence(
        log_probs, ref_log_probs, mask, pair, *strides, REFERENCE_TOKENS, COMPUTE, BLOCK
    )
    rejected, ref_rejected, rejected_length = _sequence(
        log_probs, ref_log_probs, mask, other, *strides, REFERENCE_TOKENS, COMPUTE, BLOCK
    )
    c, r = chosen - ref_chosen, rejected - ref_rejected
    if not PER_TOKEN:
        chosen_length, rejected_length = 1.0, 1.0
    margin = c / chosen_length - r / rejected_length
    scale = tl.full((), beta, COMPUTE)
    loss, by_c, by_r, by_margin = FORMULA(
        c,
        r,
        margin,
        scale,
        tl.full((), label_smoothing, COMPUTE),
        tl.full((), log_kept, COMPUTE),
        tl.full((), log_flipped, COMPUTE),
        tl.full((), discopop_tau, COMPUTE),
        SMOOTHS,
    )
    tl.store(losses + pair, loss)
    tl.store(chosen_rewards + pair, scale * c)
    tl.store(rejected_rewards + pair, scale * r)
    tl.store(sums + pair, chosen)
    tl.store(sums + other, rejected)
    tl.store(slopes + pair, by_c + by_margin / chosen_length)
    tl.store(slopes + other, by_r - by_margin / rejected_length)


@triton.jit
def _sequence(
    log_probs,
    ref_log_probs,
    mask,
    row,
    length,
    stride,
    ref_stride,
    mask_stride,
    REFERENCE_TOKENS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums over a row's valid tokens under policy and reference, and their number or 1."""
    lane = tl.arange(0, BLOCK)
    total, ref_total = tl.zeros((BLOCK,), COMPUTE), tl.zeros((BLOCK,), COMPUTE)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, length, BLOCK):
        place = start + lane
        inside = place < length
        valid = tl.load(mask + row * mask_stride + place, mask=inside, other=0) != 0
        count += valid.to(tl.int32)
        total += valid_part(log_probs + row * stride + place, inside, valid, COMPUTE)
        if REFERENCE_TOKENS:
            ref_total += valid_part(ref_log_probs + row * ref_stride + place, inside, valid, COMPUTE)
    reference = tl.sum(ref_total)
    if ref_log_probs is not None and not REFERENCE_TOKENS:
        reference = tl.load(ref_log_probs + row * ref_stride).to(COMPUTE)
    return tl.sum(total), reference, tl.maximum(tl.sum(count), 1).to(COMPUTE)


def forward(log_probs, ref_log_probs, mask, loss_type, beta, label_smoothing, discopop_tau):
    out = empty.pairwise_loss(log_probs, ref_log_probs)
    rows, length = log_probs.shape
    if rows == 0:
        return out
    log_probs, mask = contiguous_rows(log_probs), contiguous_rows(mask)
    per_token = ref_log_probs is not None and ref_log_probs.ndim == 2
    ref_log_probs = contiguous_rows(ref_log_probs) if per_token else ref_log_probs
    block = min(BLOCK, triton.next_power_of_2(length))
    _forward[(rows // 2,)](
        log_probs, ref_log_probs, mask, *out,
        rows // 2, length, log_probs.stride(0), 0 if ref_log_probs is None else ref_log_probs.stride(0), mask.stride(0),
        beta, label_smoothing, math.log1p(-label_smoothing), math.log(label_smoothing) if label_smoothing else 0.0,
        discopop_tau,
        FORMULA=FORMULAS[loss_type], SMOOTHS=label_smoothing != 0, PER_TOKEN=loss_type in PER_TOKEN,
        REFERENCE_TOKENS=per_token, COMPUTE=compute(out[0]), BLOCK=block,
        enable_fp_fusion=True, num_warps=max(block // PER_WARP, 1),
    )  # fmt: skip
    return out
