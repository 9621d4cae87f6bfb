"""token_logratios against log_softmax + gather and TRL's selective_log_softmax, once a side."""

from __future__ import annotations

import pytest
import torch
from fastalign.bench.peers import both_passes, torch_log_probs

from fastalign.ops import token_logratios

pytestmark = pytest.mark.losses
ROWS, VOCAB = 512, 49_152
TRL, TORCH = "TRL selective_log_softmax, twice", "log_softmax + gather, twice"


CASES = [
    pytest.param(dtype, grad, id=f"{ROWS} x {VOCAB:,} {str(dtype)[6:]}, forward{' + backward of the policy' * grad}")
    for dtype in (torch.float32, torch.bfloat16)
    for grad in (False, True)
]


@pytest.mark.parametrize(("dtype", "grad"), CASES)
def test_log_ratios(compare, dtype, grad):
    trl = pytest.importorskip("trl.trainer.utils").selective_log_softmax
    torch.manual_seed(0)
    policy, ref = ((torch.randn(1, ROWS, VOCAB) * 3).to(dtype) for _ in range(2))
    labels = torch.randint(0, VOCAB, (1, ROWS))
    policy.requires_grad_(grad)

    def twice(log_probs):
        return lambda: log_probs(policy, labels) - log_probs(ref, labels).detach()

    def ours():
        return token_logratios(policy, ref, labels)

    def check():
        wide = (torch_log_probs(x[:, :64].detach().double(), labels[:, :64]) for x in (policy, ref))
        torch.testing.assert_close(ours()[:, :64].detach().double(), next(wide) - next(wide), rtol=0, atol=2e-5)

    def call(f):
        return both_passes(f, policy) if grad else f

    compare(
        call(ours),
        {TRL: call(twice(trl)), TORCH: call(twice(torch_log_probs))},
        floor=(policy.nbytes + ref.nbytes) + 2 * policy.nbytes * grad,
        check=check,
    )
