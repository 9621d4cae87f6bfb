"""resample against softmax + multinomial in torch, and a numpy systematic resampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastalign.ops import resample

pytestmark = pytest.mark.sampling
SHAPES = ((4096, 64, 1), (64, 16_384, 64), (1, 1_000_000, 1000))
PEERS = {
    "multinomial": ("softmax + multinomial", lambda x, k: torch.multinomial(x.softmax(-1), k, replacement=True)),
    "systematic": ("numpy", lambda x, k: numpy_systematic(x.numpy(), k)),
    "gumbel_top_k": ("softmax + multinomial", lambda x, k: torch.multinomial(x.softmax(-1), k)),
    "best": ("topk", lambda x, k: x.topk(k)),
}
CASES = [
    pytest.param(*shape, method, id=f"{method}, {shape[0]:,} prompts x {shape[1]:,} candidates, k = {shape[2]:,}")
    for shape in SHAPES
    for method in PEERS
]


@pytest.mark.parametrize(("prompts", "n", "k", "method"), CASES)
def test_resample(compare, prompts, n, k, method):
    torch.manual_seed(0)
    log_weights = torch.randn(prompts, n) * 2
    name, peer = PEERS[method]
    compare(
        lambda: resample(log_weights, k, method=method, seed=0),
        {name: lambda: peer(log_weights, k)},
        check=lambda: check(log_weights, k, method),
    )


def numpy_systematic(log_weights, k):
    weights = np.exp(log_weights - log_weights.max(-1, keepdims=True), dtype=np.float64)
    mass = weights.cumsum(-1)
    shares = (np.arange(k) + np.random.default_rng(0).random((len(mass), 1))) / k
    return np.stack([np.searchsorted(row, share * row[-1]) for row, share in zip(mass, shares, strict=True)])


def check(log_weights, k, method) -> None:
    """Systematic counts are within one of k p, the best are torch's, and draws without replacement are distinct."""
    ids = resample(log_weights, k, method=method, seed=0)
    if method == "systematic":
        expected = k * log_weights.double().softmax(-1)
        result = torch.zeros_like(expected).scatter_add(1, ids, torch.ones_like(ids, dtype=torch.float64))
        assert (result - expected).abs().max() < 1 + 1e-6
    elif method == "best":
        assert torch.equal(log_weights.gather(1, ids), log_weights.topk(k).values)
    elif method == "gumbel_top_k":
        assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
    else:  # the draws' mean log-weight is within five standard errors of its expectation
        p = log_weights.double().softmax(-1)
        mean = (p * log_weights).sum(-1)
        variance = (p * log_weights.square()).sum(-1) - mean.square()
        error = (log_weights.gather(1, ids).double().mean(-1) - mean).mean() / (variance / k / len(p)).mean().sqrt()
        assert error.abs() < 5, error
