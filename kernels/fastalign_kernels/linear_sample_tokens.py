"""linear_sample_tokens on the GPU: a token from hidden states and the head's weight, the logits never written.

`forward_tiles` of the fused head leaves, for each row and block of the vocabulary, the largest logit and the mass about
it. `_draw`, one program a row, picks the block that holds the uniform number's quantile, makes the row's logits of that
block again, and picks the token: the inverse of the cumulative sum in index order, as sample_tokens draws.

Bytes: the weight once per block of rows, two numbers a row and vocabulary block, and one block of the weight a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastalign.kernels import _head
from fastalign.kernels._elementary import exp
from fastalign.kernels._first_beyond import first_beyond
from fastalign.kernels._head_layout import Head, plain
from fastalign.kernels._philox import row_uniform
from fastalign.kernels._softmax import lowest, transform

from fastalign import empty


@triton.jit(do_not_specialize=["rows", "vocab", "blocks", "seed", "offset"])
def _draw(
    ids, log_probs, partial, hidden, weight, bias, low, b, place, streams,
    rows, vocab, blocks, width, rank, hidden_row, hidden_step, weight_row, weight_step, b_row, b_step,
    to_cap: tl.float64, to_z: tl.float64, seed: tl.int64, offset: tl.int64,
    GREEDY: tl.constexpr, ROWS: tl.constexpr, SOFTCAP: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    # ---- the block ----
    s = tl.arange(0, BLOCKS)
    here = partial + s.to(tl.int64) * rows + row
    tops = tl.load(here, mask=s < blocks, other=float("-inf"))
    sums = tl.load(here + blocks.to(tl.int64) * rows, mask=s < blocks, other=0)
    top = tl.max(tops)
    masses = sums.to(tl.float64) * exp((tops - top).to(tl.float64))
    total = tl.sum(masses)
    sound = (total > 0) & (total < float("inf"))  # neither is so with NaN or +inf in the row; 0 where all is -inf
    target = row_uniform(seed, streams, row, offset, ROWS) * total
    if GREEDY:
        block = tl.min(tl.where((tops == top) & (s < blocks), s, BLOCKS - 1))
    else:
        block, before = first_beyond(masses, target, BLOCKS)
        target -= before
    block = tl.minimum(block, blocks - 1)
    # ---- its logits ----
    v = block * BLOCK_N + tl.arange(0, BLOCK_N)
    v_read = tl.minimum(v, vocab - 1).to(tl.int64)
    x = tl.zeros((BLOCK_N,), COMPUTE)
    hidden += tl.load(place + row) * hidden_row
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        h = tl.load(hidden + k.to(tl.int64) * hidden_step, mask=k < width, other=0).to(COMPUTE)
        of = weight + v_read[:, None] * weight_row + k.to(tl.int64)[None, :] * weight_step
        x += tl.sum(tl.load(of, mask=(k < width)[None, :], other=0).to(COMPUTE) * h[None, :], 1)
    if low is not None:
        for r in range(0, rank):
            x += tl.load(b + v_read * b_row + r * b_step).to(COMPUTE) * tl.load(low + row * rank + r).to(COMPUTE)
    if bias is not None:
        x += tl.load(bias + v_read).to(COMPUTE)
    z = transform(x, tl.full((), to_cap, COMPUTE), tl.full((), to_z, COMPUTE), SOFTCAP)
    z = tl.where(v < vocab, z, float("-inf"))
    # ---- the token ----
    about = tl.maximum(tl.max(z), lowest(COMPUTE))
    if GREEDY:
        found = tl.min(tl.where(z == about, tl.arange(0, BLOCK_N), BLOCK_N - 1))
        log_prob = tl.zeros((), tl.float64)
    else:
        weights = exp((z - about).to(tl.float64))
        # The block's mass now is not to the last digit what it was: the target keeps its share of it.
        mass = tl.sum(tl.where(s == block, masses, 0))
        found, _ = first_beyond(weights, target / tl.where(mass > 0, mass, 1) * tl.sum(weights), BLOCK_N)
        drawn = tl.max(tl.where(tl.arange(0, BLOCK_N) == found, z, float("-inf")))
        log_prob = (drawn - top).to(tl.float64) - tl.log(total)
    tl.store(ids + row, tl.where(sound, block.to(tl.int64) * BLOCK_N + found, -1))
    tl.store(log_probs + row, tl.where(sound, log_prob, float("nan")).to(COMPUTE))


@plain
def sample(hidden, weight, bias, a, b, adapter_scale, temperature, softcap, logit_scale, seed, offset, rows):
    """The op: one token a row."""
    ids, log_probs = empty.sample_tokens(hidden)
    if len(hidden) == 0:
        return ids, log_probs
    labels = torch.full_like(ids, -1)  # none
    greedy = temperature == 0
    temperature = 1.0 if greedy else temperature
    head = Head(hidden, weight, bias, a, b, labels, adapter_scale, labels < 0, temperature, softcap, logit_scale)
    head.use_tall()
    blocks = triton.cdiv(head.vocab, head.blocks.columns)
    partial = hidden.new_empty((_head.KINDS, blocks, head.rows), dtype=head.compute)
    given = head.arguments()
    _head.forward_tiles[(head.row_blocks * blocks,)](
        partial, None, slots=blocks, slot=0, first=0, last=head.vocab, blocks=1, splits=blocks, exps_row=0,
        exps_scale=1.0, STATISTICS=0, **given,
    )  # fmt: skip
    names = ("hidden", "weight", "bias", "low", "b", "place", "width", "rank", "hidden_row", "hidden_step")
    names += ("weight_row", "weight_step", "b_row", "b_step", "to_cap", "to_z", "SOFTCAP", "COMPUTE")
    _draw[(head.rows,)](
        ids, log_probs, partial, streams=None if rows is None else rows.contiguous(), rows=head.rows, vocab=head.vocab,
        blocks=blocks, seed=seed, offset=offset, GREEDY=greedy, ROWS=0 if rows is None else rows.ndim,
        BLOCKS=triton.next_power_of_2(blocks), BLOCK_N=head.blocks.columns, BLOCK_K=128,
        enable_fp_fusion=True, num_warps=4,
        **{name: given[name] for name in names},
    )  # fmt: skip
    return ids, log_probs
