"""pairwise_loss against TRL's formula of DPO's loss in torch, from the log-probabilities of tokens; forward and
backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fastalign.bench.peers import both_passes

from fastalign.ops import pairwise_loss

pytestmark = pytest.mark.losses
PAIRS, TOKENS, BETA = 64, 1024, 0.1
TORCH, COMPILED = "TRL's formula", "torch.compile(TRL's formula)"
FORMULAS = {
    "sigmoid": lambda delta: -F.logsigmoid(BETA * delta),
    "ipo": lambda delta: (delta - 1 / (2 * BETA)) ** 2,  # of the mean log-ratio of a token
}


@pytest.mark.parametrize("loss_type", FORMULAS, ids=lambda name: f"{name}, {PAIRS} pairs x {TOKENS:,} float32")
def test_pairs(compare, loss_type):
    torch.manual_seed(0)
    log_probs, ref = -2 * torch.rand(2, 2 * PAIRS, TOKENS)
    mask = torch.arange(TOKENS) < torch.randint(TOKENS // 4, TOKENS + 1, (2 * PAIRS, 1))
    log_probs = log_probs.clone().requires_grad_()

    def ours():
        return pairwise_loss(log_probs, ref, mask, beta=BETA, loss_type=loss_type).losses

    def trl():
        sums = [(x * mask).sum(-1) for x in (log_probs, ref)]
        ratios = sums[0] - sums[1]
        if loss_type == "ipo":
            ratios = ratios / mask.sum(-1).clamp(min=1)
        chosen, rejected = ratios.chunk(2)
        return FORMULAS[loss_type](chosen - rejected)

    def check():
        (a, b), grads = (ours(), trl()), []
        for losses in (a, b):
            grads += torch.autograd.grad(losses.sum(), log_probs)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)

    peers = {TORCH: trl, COMPILED: torch.compile(trl)}
    compare(
        both_passes(ours, log_probs),
        {name: both_passes(form, log_probs) for name, form in peers.items()},
        check=check,
    )
