"""token_logprobs against TRL's selective_log_softmax and plain log_softmax + gather."""

from __future__ import annotations

import pytest
import torch
from fastalign.bench.peers import both_passes, torch_log_probs

from fastalign.ops import token_logprobs

pytestmark = pytest.mark.losses
TRL, TORCH = "TRL selective_log_softmax", "log_softmax + gather"
# One sequence of 512 tokens; and four of 128, where TRL's loop over sequences makes smaller temporaries.
SHAPES = ((1, 512, 49_152), (4, 128, 49_152), (1, 512, 151_936))
CASES = [
    pytest.param(
        *shape,
        dtype,
        grad,
        id=f"{shape[0]} x {shape[1]} x {shape[2]:,} {str(dtype)[6:]}, forward{' + backward' * grad}",
    )
    for shape in SHAPES
    for dtype in (torch.float32, torch.bfloat16)
    for grad in (False, True)
]


@pytest.mark.parametrize(("batch", "length", "vocab", "dtype", "grad"), CASES)
def test_log_probs(compare, batch, length, vocab, dtype, grad):
    trl = pytest.importorskip("trl.trainer.utils").selective_log_softmax
    torch.manual_seed(0)
    logits = (torch.randn(batch, length, vocab) * 3).to(dtype).requires_grad_(grad)
    labels = torch.randint(0, vocab, (batch, length))

    def call(f):
        return both_passes(lambda: f(logits, labels), logits) if grad else lambda: f(logits, labels)

    def check():
        part = logits[:1, :64].detach(), labels[:1, :64]
        torch.testing.assert_close(
            token_logprobs(*part).double(), torch_log_probs(part[0].double(), part[1]), rtol=0, atol=1e-5
        )

    compare(
        call(token_logprobs),
        {TRL: call(trl), TORCH: call(torch_log_probs)},
        floor=logits.nbytes * (3 if grad else 1),
        bars={TRL: 10 if grad else 7} if batch == 1 else {},
        check=check,
    )
