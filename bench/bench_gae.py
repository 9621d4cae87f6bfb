"""gae against the loop over time that PPO trainers write in Python."""

from __future__ import annotations

import pytest
import torch
from fastalign.bench.peers import python_loop

from fastalign.ops import gae

pytestmark = pytest.mark.losses
SHAPES = ((64, 512), (512, 1024), (1, 8192))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]} x {s[1]:,} float32, right padding")
def test_gae(compare, shape):
    batch, length = shape
    torch.manual_seed(0)
    rewards, values = torch.randn(batch, length), torch.randn(batch, length)
    mask = torch.arange(length) < torch.randint(length // 4, length + 1, (batch, 1))
    padded = [x.masked_fill(~mask, 0) for x in (rewards, values)]

    def check():
        for a, b in zip(gae(rewards, values, mask), python_loop(*padded), strict=True):
            torch.testing.assert_close(a[mask], b[mask], rtol=1e-4, atol=1e-4)

    compare(
        lambda: gae(rewards, values, mask),
        {"Python loop over time": lambda: python_loop(*padded)},
        floor=batch * length * (4 * 4 + 1),
        check=check,
    )
