"""Scored candidates as training texts: which are taken, and when."""

import numpy as np
import pytest

from fastalign.decode import Candidates
from fastalign.train.replay import Replay


def scored(n, prompts=("a", "b")):
    token_ids = [[[10 * i + j, 2] for j in range(n)] for i in range(len(prompts))]
    return Candidates(
        list(prompts), [["x"] * n for _ in prompts], token_ids, [[[-1.0, -float(j)] for j in range(n)] for _ in prompts]
    )


@pytest.mark.parametrize("n", [1, 2, 3, 16])
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_the_best_and_the_worst_of_a_random_half_each_with_its_own_numbers(n, size):
    rewards = np.stack([np.arange(n), np.arange(n)[::-1]])[..., None].astype(float)
    replay = Replay(scored(n), rewards, ["a", "b"])
    for seed in range(20):
        texts = replay.texts("b", size, np.array([2.0]), np.random.default_rng(seed))
        assert len(texts) == size
        for one in texts:
            j = one.token_ids[0] - 10
            assert one.token_ids == [10 + j, 2] and one.logprobs == [-1.0, -float(j)]
            assert one.rewards.tolist() == [n - 1.0 - j]
        values = [float(one.rewards[0]) for one in texts]
        assert len(set(values)) == min(n, size)  # none twice, while there are enough
        if n == 16:
            half = np.random.default_rng(seed).permutation(16)[:8]
            sorted_half = np.sort(rewards[1, half, 0])
            assert values == [*sorted_half[: size // 2], *sorted_half[8 - (size - size // 2) :]]


def test_steps_begin_on_candidates_and_then_take_turns():
    replay = Replay(scored(2), np.zeros((2, 2, 1)), ["a", "b"], first=3)
    assert [replay.turn(step) for step in range(8)] == [True] * 3 + [False, True] * 2 + [False]
