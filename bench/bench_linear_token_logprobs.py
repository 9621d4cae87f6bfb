"""The fused head against TRL's chunked head, F.linear + cross_entropy, and torch.compile of the plain form; forward
and backward.

The floor is the matrix products of the pass, in the op's tiles: four with a trainable head (the logits twice, except
for kept tiles, and two gradients), two with a frozen one.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from fastalign.bench.machine import bar
from fastalign.bench.peers import both_passes, head_products

from fastalign.ops import linear_token_logprobs

pytestmark = pytest.mark.losses
TRL, PLAIN, COMPILED = "TRL chunked head", "F.linear + cross_entropy", "torch.compile(F.linear + cross_entropy)"
TILE = 4096
SMOL = (1024, 576, 49_152)
CASES = {  # tokens × width × vocabulary, the bar against TRL, and what is unusual
    "1,024 x 576 x 49,152 float32": (SMOL, bar(2.5, zen4=2.6, zen5=4), {"compiled": True}),
    "1,024 x 576 x 49,152 float32, frozen head": (SMOL, bar(4, zen4=3.8, zen5=6), {"frozen": True}),
    "1,024 x 576 x 49,152 bfloat16": (SMOL, bar(5, zen5=8), {"dtype": torch.bfloat16}),
    "1,024 x 576 x 49,152 float32, half of it prompt": (SMOL, 4, {"prompt": 0.5}),
    "1,024 x 896 x 151,936 float32": ((1024, 896, 151_936), bar(2.5, zen4=2.6, zen5=4), {}),
    "1,024 x 2,048 x 128,256 float32": ((1024, 2048, 128_256), bar(2.5, zen4=2.6, zen5=4), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_head(compare, case):
    (tokens, width, vocab), goal, options = CASES[case]
    head(compare, tokens, width, vocab, goal=goal, **options)


def head(compare, tokens, width, vocab, *, goal, dtype=torch.float32, frozen=False, prompt=0.0, compiled=False):
    """prompt: the share of positions whose label is ignored."""
    chunked = pytest.importorskip("trl.kernels").ChunkedLogProbFunction
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width) * 0.05).to(dtype).requires_grad_(not frozen)
    labels = torch.randint(0, vocab, (tokens,))
    labels[: int(prompt * tokens)] = -100
    keep = labels != -100

    def ours():
        return linear_token_logprobs(hidden, weight, labels)

    def trl():  # as TRL does on the CPU: every position, then the mask
        everything = (hidden, weight, None, labels.clamp(min=0), 1.0, 32768, None, 1.0, ())
        return chunked.apply(*everything)[0].masked_fill(~keep, 0)

    def plain():
        return -F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")

    def check():
        error = (ours() - trl())[keep].abs().max()
        assert error < (0.1 if dtype == torch.bfloat16 else 1e-4), error

    forms = {TRL: trl, PLAIN: plain} | ({COMPILED: torch.compile(plain)} if compiled else {})

    @functools.cache
    def products():
        from fastalign.ops.head import KEPT_BYTES  # not when an earlier commit is measured

        budget = KEPT_BYTES + weight.numel() * weight.dtype.itemsize
        kept = None if frozen else budget // (int(keep.sum()) * TILE * 4)
        return head_products(hidden.detach()[keep].float(), weight.detach().float(), TILE, kept)

    compare(
        both_passes(ours, hidden, weight),
        {name: both_passes(form, hidden, weight) for name, form in forms.items()},
        floor=lambda: products()(),
        bars={TRL: goal},
        check=check,
        rounds=3,
    )
