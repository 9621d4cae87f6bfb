"""Policy and value losses from what is known of each token: one launch, one program a row.

A program walks its row BLOCK tokens at a time and keeps one running sum a lane for the objective and for each figure
that is watched; the lanes are added at the end. Where the ratio is each token's, so is the gradient, written as the
tokens pass. Where the ratio is the sequence's, it is known only at the end; but the clipped term depends on a token
through its advantage alone, so that the sums of the positive and of the negative advantages are enough, and all that a
token has of its own is the gradient of its KL estimate: the row is read once here too, and without a KL term nothing is
written but numbers per row. The backward pass scales (`_sum_gradient`).

Bytes: every input once, padding too (a load that asks the mask first is narrow and waits for it); the gradient once.
"""

import triton
import triton.language as tl
from fastalign.kernels._elementary import exp, exp_excess, expm1
from fastalign.kernels._sum_gradient import compute, contiguous_rows, valid_part

from fastalign import empty

BLOCK = 1024
NAN = tl.constexpr(tl.PropagateNan.ALL)
PER_WARP = 128  # tokens: four a thread, so that its running sums stay in registers


@triton.jit
def _policy(
    logprobs, entropy, old, advantages, mask, ref, objectives, entropies, figures, shares, scales, weights,
    rows, length, stride, entropy_stride, old_stride, advantage_stride, mask_stride, ref_stride,
    low: tl.float64, high: tl.float64, cap: tl.float64, kl_coef: tl.float64,
    IMPORTANCE: tl.constexpr, TOKEN_ADVANTAGES: tl.constexpr, KL: tl.constexpr, KL_IN_LOSS: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    low, high, cap = tl.full((), low, COMPUTE), tl.full((), high, COMPUTE), tl.full((), cap, COMPUTE)
    kl_coef = tl.full((), kl_coef, COMPUTE)
    zero = tl.zeros((BLOCK,), COMPUTE)
    tokens, entropy_sum, approx_kl, kl = zero, zero, zero, zero
    policy, ratio, fell, rose = zero, zero, zero, zero
    log_ratios, gains, costs = zero, zero, zero
    advantage = zero
    if not TOKEN_ADVANTAGES:
        advantage += tl.load(advantages + row * advantage_stride).to(COMPUTE)

    for start in range(0, length, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < length
        valid = tl.load(mask + row * mask_stride + place, mask=inside, other=0) != 0
        tokens += tl.where(valid, 1.0, 0.0)
        x = valid_part(logprobs + row * stride + place, inside, valid, COMPUTE)
        log_ratio = x - x
        if old is not None:
            log_ratio = x - valid_part(old + row * old_stride + place, inside, valid, COMPUTE)
        approx_kl += exp_excess(log_ratio)
        if TOKEN_ADVANTAGES:
            advantage = valid_part(advantages + row * advantage_stride + place, inside, valid, COMPUTE)
        if entropy is not None:
            entropy_sum += valid_part(entropy + row * entropy_stride + place, inside, valid, COMPUTE)
        estimate, by_kl = zero, zero
        if ref is not None:
            d = x - valid_part(ref + row * ref_stride + place, inside, valid, COMPUTE)
            estimate, by_kl = _kl(d, KL)
        slope = by_kl
        if IMPORTANCE == "token":
            r = exp(log_ratio)
            loss, slope = _clipped(log_ratio, advantage, low, high, cap)
            if KL_TIMES_RATIO:
                estimate *= r
                by_kl = by_kl * r + estimate
            if KL_IN_LOSS:
                slope += kl_coef * by_kl
            policy += tl.where(valid, loss, 0)
            ratio += tl.where(valid, r, 0)
            fell += tl.where(valid & (log_ratio < low) & (advantage < 0), 1.0, 0.0)
            rose += tl.where(valid & (log_ratio > high) & (advantage > 0), 1.0, 0.0)
        else:
            log_ratios += log_ratio
            gains += tl.where(valid & (advantage >= 0), advantage, 0)
            costs += tl.where(valid & (advantage >= 0), 0, tl.where(valid, advantage, 0))
            fell += tl.where(valid & (advantage < 0), 1.0, 0.0)
            rose += tl.where(valid & (advantage > 0), 1.0, 0.0)
        kl += estimate
        if IMPORTANCE == "token" or KL_IN_LOSS:
            tl.store(weights + row * length + place, tl.where(valid, slope, 0), mask=inside)

    tokens, kl, fell, rose = tl.sum(tokens), tl.sum(kl), tl.sum(fell), tl.sum(rose)
    if IMPORTANCE == "token":
        policy, ratio = tl.sum(policy), tl.sum(ratio)
    else:
        divisor = tokens * 0 + 1
        if IMPORTANCE == "mean":
            divisor = tl.maximum(tokens, 1.0)
        log_ratio = tl.sum(log_ratios) / divisor
        r = exp(log_ratio)
        gain, gain_slope = _clipped(log_ratio, tl.sum(gains), low, high, cap)
        cost, cost_slope = _clipped(log_ratio, tl.sum(costs), low, high, cap)
        policy, share, scale = gain + cost, gain_slope + cost_slope, kl_coef
        if KL_TIMES_RATIO:
            kl *= r
            scale *= r
            if KL_IN_LOSS:
                share += kl_coef * kl
        tl.store(shares + row, share / divisor)
        tl.store(scales + row, scale)
        ratio = tl.where(tokens > 0, r, 0)
        fell, rose = tl.where(log_ratio < low, fell, 0), tl.where(log_ratio > high, rose, 0)
        if not TOKEN_ADVANTAGES:
            fell, rose = tl.minimum(fell, 1.0), tl.minimum(rose, 1.0)

    objective = policy
    if KL_IN_LOSS:
        objective += kl_coef * kl
    tl.store(objectives + row, objective)
    tl.store(entropies + row, tl.sum(entropy_sum))
    tl.store(figures + row, policy)
    tl.store(figures + rows + row, kl)
    tl.store(figures + 2 * rows + row, tl.sum(approx_kl))
    tl.store(figures + 3 * rows + row, ratio)
    tl.store(figures + 4 * rows + row, fell)
    tl.store(figures + 5 * rows + row, rose)
    tl.store(figures + 6 * rows + row, tokens)


@triton.jit
def _clipped(log_ratio, advantage, low, high, cap):
    """-min(r A, clip(r) A) and its derivative by log r, which is held in bounds before it is exponentiated."""
    least = tl.where(advantage >= 0, float("-inf"), low)
    most = tl.where(advantage >= 0, high, cap)
    held = tl.where(log_ratio > most, most, tl.where(log_ratio < least, least, log_ratio))  # NaN stays NaN
    loss = -exp(held) * advantage
    return loss, tl.where((log_ratio >= least) & (log_ratio <= most), loss, 0)


@triton.jit
def _kl(d, KL: tl.constexpr):
    """The estimator's value and its derivative by d, the log-ratio to the reference."""
    if KL == "k1":
        return d, d * 0 + 1
    elif KL == "k2":
        return d * d * 0.5, d
    else:
        return exp_excess(-d), -expm1(-d)


@triton.jit
def _value(
    values,
    old,
    returns,
    mask,
    objectives,
    figures,
    weights,
    rows,
    length,
    stride,
    old_stride,
    return_stride,
    mask_stride,
    clip_range: tl.float64,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    clip_range = tl.full((), clip_range, COMPUTE)
    zero = tl.zeros((BLOCK,), COMPUTE)
    errors, over, tokens = zero, zero, zero
    for start in range(0, length, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < length
        valid = tl.load(mask + row * mask_stride + place, mask=inside, other=0) != 0
        value = valid_part(values + row * stride + place, inside, valid, COMPUTE)
        target = valid_part(returns + row * return_stride + place, inside, valid, COMPUTE)
        slope = value - target
        error = slope * slope
        if old is not None:
            before = valid_part(old + row * old_stride + place, inside, valid, COMPUTE)
            held = tl.maximum(value, before - clip_range, propagate_nan=NAN)
            apart = tl.minimum(held, before + clip_range, propagate_nan=NAN) - target
            clipped = apart * apart
            over += tl.where(clipped > error, 1.0, 0.0)
            # Where the clipped error is the larger, the value lies outside the clip and has no gradient.
            slope = tl.where(clipped <= error, slope, clipped * 0)
            error = tl.maximum(error, clipped, propagate_nan=NAN)
        tokens += tl.where(valid, 1.0, 0.0)
        errors += error
        tl.store(weights + row * length + place, slope, mask=inside)
    tl.store(objectives + row, tl.sum(errors) * 0.5)
    tl.store(figures + row, tl.sum(over))
    tl.store(figures + rows + row, tl.sum(tokens))


def policy_rows(
    logprobs, entropy, old, advantages, mask, ref, importance, low, high, cap, kl_coef, kl_estimator, kl_times_ratio
):
    out = empty.policy_rows(logprobs, ref, importance, kl_coef)
    rows, length = logprobs.shape
    if rows == 0:
        return out
    inputs, strides = _rows(logprobs, entropy, old, advantages, mask, ref)
    _policy[(rows,)](
        *inputs, *out, rows, length, *strides, low, high, cap, kl_coef,
        IMPORTANCE=importance, TOKEN_ADVANTAGES=advantages.shape[1] != 1, KL=kl_estimator,
        KL_IN_LOSS=ref is not None and kl_coef != 0, KL_TIMES_RATIO=ref is not None and kl_times_ratio,
        COMPUTE=compute(out[0]), **_blocks(length),
    )  # fmt: skip
    return out


def value_rows(values, old, returns, mask, clip_range):
    out = empty.value_rows(values)
    rows, length = values.shape
    if rows == 0:
        return out
    inputs, strides = _rows(values, old, returns, mask)
    _value[(rows,)](*inputs, *out, rows, length, *strides, clip_range, COMPUTE=compute(out[0]), **_blocks(length))
    return out


def _rows(*tensors):
    """The tensors, each as rows, and their row strides; of none 0."""
    tensors = [None if x is None else contiguous_rows(x) for x in tensors]
    return tensors, [0 if x is None else x.stride(0) for x in tensors]


def _blocks(length):
    block = min(BLOCK, triton.next_power_of_2(max(length, 1)))
    return {"BLOCK": block, "enable_fp_fusion": True, "num_warps": max(block // PER_WARP, 1)}
