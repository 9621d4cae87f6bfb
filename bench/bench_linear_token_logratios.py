"""linear_token_logratios against F.linear + cross_entropy, once a side: DPO's implicit reward from two heads; forward
and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fastalign.bench.peers import both_passes

from fastalign.ops import linear_token_logratios

pytestmark = pytest.mark.losses


@pytest.mark.parametrize("shape", [(512, 576, 49_152)], ids=lambda s: f"{s[0]} x {s[1]} x {s[2]:,} float32")
def test_log_ratios(compare, shape):
    tokens, width, vocab = shape
    torch.manual_seed(0)
    hidden, ref_hidden = torch.randn(2, tokens, width)
    weight, ref_weight = torch.randn(2, vocab, width) * 0.05
    labels = torch.randint(0, vocab, (tokens,))
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def ours():
        return linear_token_logratios(hidden, weight, ref_hidden, ref_weight, labels)

    def torchs():
        policy, ref = F.linear(hidden, weight), F.linear(ref_hidden, ref_weight)
        return F.cross_entropy(ref, labels, reduction="none") - F.cross_entropy(policy, labels, reduction="none")

    compare(
        both_passes(ours, hidden, weight),
        {"F.linear + cross_entropy, twice": both_passes(torchs, hidden, weight)},
        check=lambda: torch.testing.assert_close(ours(), torchs(), rtol=0, atol=1e-4),
        rounds=5,
    )
