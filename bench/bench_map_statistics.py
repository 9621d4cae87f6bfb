"""One pass over the rewards for Z, mean and covariance at a λ, against numpy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fastalign.bench.map_peers import numpy_pass, samples, torch_pass

from fastalign.ops import map_statistics

pytestmark = pytest.mark.map


@pytest.mark.parametrize("n, m", [pytest.param(1_000_000, 6, id="n = 1,000,000, m = 6")])
def test_pass(compare, n, m):
    rewards = torch.from_numpy(samples(n, m))
    lam, wide = torch.linspace(0.5, 0.0, m, dtype=torch.float64), rewards.double()
    compare(
        lambda: map_statistics(rewards, lam),
        {"torch": lambda: torch_pass(wide, lam), "numpy": lambda: numpy_pass(wide.numpy(), lam.numpy())},
        floor=rewards.nbytes,
        check=lambda: np.testing.assert_allclose(
            map_statistics(rewards, lam).cov, numpy_pass(wide.numpy(), lam.numpy())[2], atol=1e-8
        ),
    )
