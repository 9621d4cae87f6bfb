"""sample_tokens against softmax + multinomial, behind transformers' own warpers where there are filters."""

from __future__ import annotations

import pytest
import torch

from fastalign import reference
from fastalign.ops import sample_tokens

pytestmark = pytest.mark.sampling
ROWS, VOCAB = 1024, 49_152
CASES = {  # dtype, filters, bar
    "float32, no filter": (torch.float32, {}, 60),
    "float32, top_k 50": (torch.float32, {"top_k": 50}, 10),
    "float32, top_p 0.9": (torch.float32, {"top_p": 0.9}, 10),
    "float32, top_k 50, top_p 0.9": (torch.float32, {"top_k": 50, "top_p": 0.9}, None),
    "float32, min_p 0.05": (torch.float32, {"min_p": 0.05}, None),
    "float32, top_k 5000": (torch.float32, {"top_k": 5000}, None),
    "bfloat16, no filter": (torch.bfloat16, {}, None),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{ROWS:,} x {VOCAB:,} {case}")
def test_tokens(compare, case):
    dtype, options, bar = CASES[case]
    torch.manual_seed(0)
    logits = (torch.randn(ROWS, VOCAB) * 3).to(dtype)
    peer = "transformers' warpers + softmax + multinomial" if options else "softmax + multinomial"
    compare(
        lambda: sample_tokens(logits, seed=0, **options),
        {peer: drawn_by_torch(logits, options)},
        floor=logits.nbytes,
        bars={} if bar is None else {peer: bar},
        check=lambda: check(logits[:32], options),
        rounds=5,
    )


def warpers(options):
    from transformers.generation import logits_process as process

    kinds = {"top_k": process.TopKLogitsWarper, "top_p": process.TopPLogitsWarper, "min_p": process.MinPLogitsWarper}
    return [kind(options[name]) for name, kind in kinds.items() if name in options]


def drawn_by_torch(logits, options):
    """As transformers' generate does with the last logits."""
    chain = warpers(options)

    def run():
        scores = logits.float()
        for warper in chain:
            scores = warper(None, scores)
        return torch.multinomial(scores.softmax(-1), 1)

    return run


def check(logits, options) -> None:
    """The warpers keep our draws, with the probability that we report; the reference draws the same ids."""
    scores = logits.double()
    for warper in warpers(options):
        scores = warper(None, scores)
    result = sample_tokens(logits, seed=0, **options)
    truth = scores.log_softmax(-1).gather(-1, result.ids[:, None])[:, 0]
    error = (result.log_probs - truth).abs().max()
    assert error < 1e-4, error
    assert torch.equal(result.ids, reference.sample_tokens(logits, **options)[0])
