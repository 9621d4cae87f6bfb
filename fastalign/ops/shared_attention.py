"""shared_attention: attention of one new token a row over its prompt, whose keys all its rows share, and over its own.

On GPUs alone: `decode.shared_prompt` has other forms for other devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign import empty
from fastalign.ops.library import define

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 256  # dimensions of a head
PROGRAMS = 512  # by which a GPU is full
SHARE = 256  # keys of a prompt, at least, that a program of their own is worth
MOST = 16  # shares of a prompt's keys


class Layout(NamedTuple):
    """Where each row's prompt lies. Tensors are int64, on the keys' device.

    bounds (P + 1,): prompt p's keys are the tokens from bounds[p] up to bounds[p + 1]. order (rows,): the rows, prompt
    by prompt; firsts (P + 1,): where each prompt's begin in it. longest: of the prompts; most: rows of a prompt.
    """

    bounds: Tensor
    order: Tensor
    firsts: Tensor
    longest: int
    most: int

    @classmethod
    def of(cls, prompts: Sequence[int], lengths: Sequence[int], device: torch.device) -> Layout:
        """prompts: each row's, a number; lengths: the prompts' numbers of tokens, which lie one behind another."""
        rows, sizes = torch.tensor(prompts), torch.tensor(lengths)
        counts = torch.bincount(rows, minlength=len(lengths))
        zero = sizes.new_zeros(1)
        parts = [zero, sizes.cumsum(0), rows.argsort(stable=True), zero, counts.cumsum(0)]
        table = torch.cat(parts).to(device)  # in one copy
        bounds, order, firsts = table.split([len(sizes) + 1, len(rows), len(sizes) + 1])
        return cls(bounds, order, firsts, int(sizes.max()), int(counts.max()))

    def splits(self, kv: int) -> int:
        """Into how many shares the keys of a prompt are split, with `kv` heads of keys."""
        return min(-(-self.longest // SHARE), -(-PROGRAMS // (len(self.bounds) * kv)), MOST)


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether there is a kernel for such queries (..., d) and values (..., dv)."""
    return q.dtype in DTYPES and q.dtype == v.dtype and max(q.shape[-1], v.shape[-1]) <= WIDEST


def shared_attention(
    q: Tensor,
    shared: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    lengths: Tensor,
    layout: Layout,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """(rows, heads, dv) from q (rows, heads, d), the prompts' keys and values (kv heads, tokens, d), and own ones (rows
    or more, kv heads, room, d), of which row r sees the first lengths[r] + 1. As `reference.shared_attention`."""
    settings = scaling, window or 0, softcap or 0.0
    bounds, order, firsts, _, most = layout
    splits = layout.splits(len(shared[0]))
    parts, logs = _prompts_op(q, *shared, bounds, order, firsts, lengths, splits, most, *settings)
    return _rows_op(q, *own, lengths, parts, logs, *settings)


_prompts_op = define(
    "shared_attention_prompts(Tensor q, Tensor keys, Tensor values, Tensor bounds, Tensor order, Tensor firsts, "
    "Tensor lengths, int splits, int most, float scaling, int window, float softcap) -> (Tensor, Tensor)",
    None,
    lambda q, keys, values, bounds, order, firsts, lengths, splits, *_: empty.shared_attention_prompts(
        q, values, splits
    ),
    triton="shared_attention.prompts",
)
_rows_op = define(
    "shared_attention_rows(Tensor q, Tensor keys, Tensor values, Tensor lengths, Tensor parts, Tensor logs, "
    "float scaling, int window, float softcap) -> Tensor",
    None,
    lambda q, keys, values, *_: empty.shared_attention(q, values),
    triton="shared_attention.rows",
)
