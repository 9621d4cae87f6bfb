"""token_logratios: one program reads a label's row of the policy's logits, then that of the reference's.

Each row goes as in token_logprobs, whose backward kernel also makes the gradients, from the maximum and total that stay
of each side. Bytes: both tensors of logits once; all else is a few numbers a row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastalign.kernels import _softmax as softmax
from fastalign.kernels._rows import lanes_and_options, row_start, rows_of
from fastalign.kernels.token_logprobs import TILES, row_state, store_state
from torch import Tensor

from fastalign import empty


@triton.jit
def _forward(
    policy,
    ref,
    labels,
    log_ratios,
    policy_maxima,
    policy_totals,
    ref_maxima,
    ref_totals,
    vocab,
    policy_inner,
    policy_outer_stride,
    policy_inner_stride,
    policy_column_stride,
    ref_inner,
    ref_outer_stride,
    ref_inner_stride,
    ref_column_stride,
    ignore_index,
    to_z: tl.float64,
    COMPUTE: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0)
    to_z = tl.full((), to_z, COMPUTE)
    label = tl.load(labels + row)
    ignored = label == ignore_index
    policy_z, policy_largest, policy_total, _, _, _, _ = row_state(
        policy + row_start(row, policy_inner, policy_outer_stride, policy_inner_stride), label, ignored,
        vocab, policy_column_stride, to_z, to_z, False, False, COMPUTE, TILES, LANES,
    )  # fmt: skip
    ref_z, ref_largest, ref_total, _, _, _, _ = row_state(
        ref + row_start(row, ref_inner, ref_outer_stride, ref_inner_stride), label, ignored,
        vocab, ref_column_stride, to_z, to_z, False, False, COMPUTE, TILES, LANES,
    )  # fmt: skip
    ratio = softmax.log_prob(policy_z, policy_largest, policy_total) - softmax.log_prob(ref_z, ref_largest, ref_total)
    tl.store(log_ratios + row, ratio)
    store_state(policy_maxima, policy_totals, row, policy_largest, policy_total, ignored)
    store_state(ref_maxima, ref_totals, row, ref_largest, ref_total, ignored)


def forward(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: float, ignore_index: int
) -> tuple[Tensor, ...]:
    vocab = policy_logits.shape[-1]
    out = empty.token_logratios(policy_logits, labels)
    policy, policy_rows = rows_of(policy_logits)
    ref, ref_rows = rows_of(ref_logits)
    lanes, options = lanes_and_options(vocab, policy.dtype, policy.device)
    _, to_z, _ = softmax.transform_factors(temperature, None)
    _forward[(labels.numel(),)](
        policy, ref, labels.contiguous(), *out, vocab, *policy_rows, *ref_rows, ignore_index, to_z,
        COMPUTE=softmax.compute_type(policy.dtype), TILES=TILES, LANES=lanes, **options,
    )  # fmt: skip
    return out
