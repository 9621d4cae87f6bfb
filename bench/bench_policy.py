"""The policy losses' rows, through grpo_loss, against TRL's formula in torch, forward and backward."""

from __future__ import annotations

import pytest
import torch
from fastalign.bench.peers import both_passes

from fastalign.losses import grpo_loss

pytestmark = pytest.mark.losses
ROWS, TOKENS, KL_COEF = 64, 1024, 0.04
TORCH, COMPILED = "TRL's formula", "torch.compile(TRL's formula)"


@pytest.mark.parametrize(
    "kl_coef", [0.0, KL_COEF], ids=lambda kl: f"grpo, {ROWS} x {TOKENS:,} float32{', KL' * (kl > 0)}"
)
def test_grpo(compare, kl_coef):
    torch.manual_seed(0)
    logprobs = -2 * torch.rand(ROWS, TOKENS)
    old, ref = (logprobs + 0.3 * torch.randn(ROWS, TOKENS) for _ in range(2))
    advantages = torch.randn(ROWS)
    mask = torch.arange(TOKENS) < torch.randint(TOKENS // 4, TOKENS + 1, (ROWS, 1))
    logprobs.requires_grad_()

    def ours():
        options = {"ref_logprobs": ref, "kl_coef": kl_coef} if kl_coef else {}
        return grpo_loss(logprobs, old, advantages, mask, loss_type="grpo", **options).loss

    def trl():  # GRPOTrainer._compute_loss, token-level importance
        ratio = torch.exp(logprobs - old)
        clipped = torch.clamp(ratio, 1 - 0.2, 1 + 0.2)
        loss = -torch.min(ratio * advantages[:, None], clipped * advantages[:, None])
        if kl_coef:
            loss = loss + kl_coef * (torch.exp(ref - logprobs) - (ref - logprobs) - 1)
        return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()

    def check():
        (a, b), grads = (ours(), trl()), []
        for loss in (a, b):
            grads += torch.autograd.grad(loss, logprobs)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(*grads)

    peers = {TORCH: trl, COMPILED: torch.compile(trl)}
    compare(
        both_passes(ours, logprobs),
        {name: both_passes(form, logprobs) for name, form in peers.items()},
        check=check,
    )
