"""gae against the loop over time that PPO trainers write in Python."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fastalign.bench.common import Case

from fastalign.ops import gae


def cases() -> Iterator[Case]:
    for batch, length in ((64, 512), (512, 1024), (1, 8192)):
        torch.manual_seed(0)
        rewards, values = torch.randn(batch, length), torch.randn(batch, length)
        ends = torch.randint(length // 4, length + 1, (batch, 1))
        mask = torch.arange(length) < ends
        padded = [x.masked_fill(~mask, 0) for x in (rewards, values)]

        def check(rewards=rewards, values=values, mask=mask, padded=padded):
            for a, b in zip(gae(rewards, values, mask), python_loop(*padded), strict=True):
                torch.testing.assert_close(a[mask], b[mask], rtol=1e-4, atol=1e-4)

        yield Case(
            f"{batch} × {length:,} float32, right padding",
            lambda rewards=rewards, values=values, mask=mask: gae(rewards, values, mask),
            {"Python loop over time": lambda padded=padded: python_loop(*padded)},
            floor_bytes=batch * length * (4 * 4 + 1),
            check=check,
        )


def python_loop(rewards, values, gamma=1.0, lam=0.95):
    """One step of torch operations on (batch,) per token, from the last to the first; padding holds zeros."""
    length = rewards.shape[1]
    running, found = torch.zeros(len(rewards)), []
    for t in range(length - 1, -1, -1):
        upcoming = values[:, t + 1] if t + 1 < length else 0.0
        running = rewards[:, t] + gamma * upcoming - values[:, t] + gamma * lam * running
        found.append(running)
    advantages = torch.stack(found[::-1], 1)
    return advantages, advantages + values
