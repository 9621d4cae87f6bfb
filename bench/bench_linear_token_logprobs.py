"""The fused head against TRL's chunked head, F.linear + cross_entropy, and torch.compile of the plain form.

The floor is the matrix products that the pass consists of, in the tiles of the op, timed in the same turn: four with
a head that learns (the logits twice, but for the tiles that are kept, and two gradients), two with a frozen one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from fastalign.bench.common import Case

from fastalign.ops import linear_token_logprobs
from fastalign.ops.head import KEPT_BYTES

TRL, PLAIN, COMPILED = "TRL chunked head", "F.linear + cross_entropy", "torch.compile(F.linear + cross_entropy)"
TILE = 4096


def cases() -> Iterator[Case]:
    yield head("1,024 × 576 × 49,152 float32", 1024, 576, 49_152, bar=2.5, compiled=True)
    yield head("1,024 × 576 × 49,152 float32, frozen head", 1024, 576, 49_152, frozen=True, bar=4)
    yield head("1,024 × 576 × 49,152 bfloat16", 1024, 576, 49_152, dtype=torch.bfloat16, bar=5)
    yield head("1,024 × 576 × 49,152 float32, half of it prompt", 1024, 576, 49_152, prompt=0.5, bar=4)
    yield head("1,024 × 896 × 151,936 float32", 1024, 896, 151_936, bar=2.5)
    yield head("1,024 × 2,048 × 128,256 float32", 1024, 2048, 128_256, bar=2.5)


def head(name, tokens, width, vocab, *, dtype=torch.float32, frozen=False, prompt=0.0, bar, compiled=False) -> Case:
    """One shape, forward and backward; prompt: the share of positions whose label is ignored."""
    from trl.kernels import ChunkedLogProbFunction

    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width) * 0.05).to(dtype).requires_grad_(not frozen)
    labels = torch.randint(0, vocab, (tokens,))
    labels[: int(prompt * tokens)] = -100
    keep = labels != -100

    def both(log_probs):
        def run():
            hidden.grad = weight.grad = None
            log_probs().sum().backward()

        return run

    def ours():
        return linear_token_logprobs(hidden, weight, labels)

    def trl():  # what TRL does on the CPU: every position, then the mask
        everything = (hidden, weight, None, labels.clamp(min=0), 1.0, 32768, None, 1.0, ())
        return ChunkedLogProbFunction.apply(*everything)[0].masked_fill(~keep, 0)

    def plain():
        return -F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")

    def check():
        error = (ours() - trl())[keep].abs().max()
        assert error < (0.1 if dtype == torch.bfloat16 else 1e-4), error

    peers = {TRL: both(trl), PLAIN: both(plain)}
    if compiled:
        peers[COMPILED] = both(torch.compile(plain))
    budget = KEPT_BYTES + weight.numel() * weight.dtype.itemsize
    kept = None if frozen else budget // (int(keep.sum()) * TILE * 4)
    products = floor(hidden.detach()[keep].float(), weight.detach().float(), kept)
    return Case(name, both(ours), peers, {TRL: bar}, floor=products, check=check, rounds=3)


def floor(hidden, weight, kept: int | None):
    """The products of the pass, tile by tile: logits (again, but for `kept` tiles), gradients of hidden and of weight.

    None: of a frozen head, whose logits are made once and whose gradient is not.
    """
    tile, grad = torch.empty(len(hidden), TILE), torch.zeros_like(hidden)
    grad_weight = torch.zeros_like(weight) if kept is not None else None

    def run():
        for step, begin in enumerate(range(0, len(weight), TILE)):
            part = weight[begin : begin + TILE]
            logits = tile[:, : len(part)]
            for _ in range(1 if kept is None or step < kept else 2):
                torch.mm(hidden, part.T, out=logits)
            grad.addmm_(logits, part)
            if grad_weight is not None:
                torch.mm(logits.T, hidden, out=grad_weight[begin : begin + TILE])

    return run
