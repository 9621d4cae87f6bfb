"""resample against softmax + multinomial in torch, and a numpy systematic resampler."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from fastalign.bench.common import Case

from fastalign.ops import resample


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    for prompts, n, k in ((4096, 64, 1), (64, 16_384, 64), (1, 1_000_000, 1000)):
        log_weights = torch.randn(prompts, n) * 2
        where = f"{prompts:,} prompts × {n:,} candidates, k = {k:,}"

        def ours(method, log_weights=log_weights, k=k):
            return lambda: resample(log_weights, k, method=method, seed=0)

        def torchs(replacement, log_weights=log_weights, k=k):
            return lambda: torch.multinomial(log_weights.softmax(-1), k, replacement=replacement)

        yield Case(
            f"multinomial, {where}", ours("multinomial"), {"softmax + multinomial": torchs(True)},
            check=lambda log_weights=log_weights, k=k: check(log_weights, k),
        )  # fmt: skip
        yield Case(
            f"systematic, {where}",
            ours("systematic"),
            {"numpy": lambda log_weights=log_weights, k=k: numpy_systematic(log_weights.numpy(), k)},
        )
        yield Case(f"gumbel_top_k, {where}", ours("gumbel_top_k"), {"softmax + multinomial": torchs(False)})
        yield Case(f"best, {where}", ours("best"), {"topk": lambda log_weights=log_weights, k=k: log_weights.topk(k)})


def numpy_systematic(log_weights, k):
    weights = np.exp(log_weights - log_weights.max(-1, keepdims=True), dtype=np.float64)
    mass = weights.cumsum(-1)
    shares = (np.arange(k) + np.random.default_rng(0).random((len(mass), 1))) / k
    return np.stack([np.searchsorted(row, share * row[-1]) for row, share in zip(mass, shares, strict=True)])


def check(log_weights, k) -> None:
    """Systematic counts lie within one of k p, and the best are torch's."""
    expected = k * log_weights.double().softmax(-1)
    ids = resample(log_weights, k, method="systematic", seed=0)
    found = torch.zeros_like(expected).scatter_add(1, ids, torch.ones_like(ids, dtype=torch.float64))
    assert (found - expected).abs().max() < 1 + 1e-6
    best = log_weights.gather(1, resample(log_weights, k, method="best", seed=0))
    assert torch.equal(best, log_weights.topk(k).values)
