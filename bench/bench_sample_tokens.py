"""sample_tokens against softmax + multinomial, behind transformers' own warpers where there are filters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fastalign.bench.common import Case

from fastalign import reference
from fastalign.ops import sample_tokens

ROWS, VOCAB = 1024, 49_152
BARS = {"no filter": 60, "top_k 50": 10, "top_p 0.9": 10}
FILTERS = ({}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9}, {"min_p": 0.05}, {"top_k": 5000})


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    logits = torch.randn(ROWS, VOCAB) * 3
    for options in FILTERS:
        told = ", ".join(f"{name} {value}" for name, value in options.items()) or "no filter"
        peer = "transformers' warpers + softmax + multinomial" if options else "softmax + multinomial"
        yield Case(
            f"{ROWS:,} × {VOCAB:,} float32, {told}",
            lambda options=options: sample_tokens(logits, seed=0, **options),
            {peer: peers(logits, options)},
            {peer: BARS[told]} if told in BARS else {},
            logits.nbytes,
            lambda options=options: check(logits[:32], options),
            rounds=5,
        )
    narrow = logits.bfloat16()
    yield Case(
        f"{ROWS:,} × {VOCAB:,} bfloat16, no filter",
        lambda: sample_tokens(narrow, seed=0),
        {"softmax + multinomial": peers(narrow, {})},
        floor_bytes=narrow.nbytes,
        check=lambda: check(narrow[:32], {}),
        rounds=5,
    )


def warpers(options):
    from transformers.generation import logits_process as process

    kinds = {"top_k": process.TopKLogitsWarper, "top_p": process.TopPLogitsWarper, "min_p": process.MinPLogitsWarper}
    return [kind(options[name]) for name, kind in kinds.items() if name in options]


def peers(logits, options):
    """What transformers' generate does with the last logits."""
    chain = warpers(options)

    def run():
        scores = logits.float()
        for warper in chain:
            scores = warper(None, scores)
        return torch.multinomial(scores.softmax(-1), 1)

    return run


def check(logits, options) -> None:
    """The warpers leave what we draw, with the probability we report; the reference draws the same ids."""
    scores = logits.double()
    for warper in warpers(options):
        scores = warper(None, scores)
    found = sample_tokens(logits, seed=0, **options)
    truth = scores.log_softmax(-1).gather(-1, found.ids[:, None])[:, 0]
    error = (found.log_probs - truth).abs().max()
    assert error < 1e-4, error
    assert torch.equal(found.ids, reference.sample_tokens(logits, **options)[0])
