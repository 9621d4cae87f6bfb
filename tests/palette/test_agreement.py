"""Values that measure the same thing are told."""

import numpy as np
import pytest

from fastalign import UserError
from fastalign.palette.agreement import alike, correlations


def test_correlations_are_within_prompts():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(20, 30, 3))
    rewards[..., 1] = -2 * rewards[..., 0] + 7 + 0.01 * rng.normal(size=(20, 30))
    rewards[..., 2] += 100 * rewards[:, :1, 0]  # between prompts only
    table = correlations(rewards)
    apart = (rewards - rewards.mean(1, keepdims=True)).reshape(-1, 3)
    np.testing.assert_allclose(table, np.corrcoef(apart.T), atol=1e-12)
    assert abs(table[0, 2]) < 0.1 and alike(["a", "b", "c"], rewards) == [
        "a and b are opposites: their correlation within prompts is -1.000"
    ]


def test_constant_values_correlate_with_none():
    rewards = np.random.default_rng(0).normal(size=(4, 5, 2))
    rewards[..., 1] = 1e8 * np.arange(4)[:, None]
    np.testing.assert_array_equal(correlations(rewards), np.eye(2))
    assert alike(["a", "b"], rewards) == alike([], rewards[..., :0]) == []
    with pytest.raises(UserError, match="must be \\(prompts, candidates, values\\), got shape \\(4, 5\\)"):
        correlations(rewards[..., 0])
