"""Adaptive N: the candidates of a fixed N, as many as each prompt needs; a pilot that foretells it."""

import enumerable
import numpy as np
import pytest
from enumerable import LIMIT, PROMPT, WORTH, worth
from tiny import tiny_causal_lm, tiny_tokenizer

from fastalign import UserError, rewards
from fastalign.decode import Sampler, adaptive, best_of, effective_sample_size, pilot
from fastalign.decode.rows import CachedRows

VOWELS = rewards.from_function(lambda prompts, responses: [sum(map(t.count, "aeiou")) for t in responses], "vowels")
LENGTH = rewards.from_function(lambda prompts, responses: [len(text) for text in responses], "length")
PROMPTS = ["the cat", "tell me a story of the big red dog", "why", "hello world"]
JOB = {"max_new_tokens": 6, "seed": 4}


@pytest.fixture(scope="module")
def sampler():
    tokenizer = tiny_tokenizer()
    return Sampler(tiny_causal_lm(tokenizer), tokenizer)


@pytest.mark.slow_matrix
@pytest.mark.filterwarnings("ignore:at λ")
@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("method", ["resample", "best"])
def test_each_prompt_stops_at_the_first_round_that_suffices(sampler, method, shares, monkeypatch):
    if not shares:
        monkeypatch.setattr(sampler, "path", lambda: CachedRows)
    lam = [0.6, 0.02]
    result = adaptive(
        sampler, PROMPTS, [VOWELS, LENGTH], lam=lam, method=method, ess=14, gain=0.4, each=8, max_n=64, **JOB
    )
    whole = best_of(sampler, PROMPTS, [VOWELS, LENGTH], lam=lam, n=64, **JOB).candidates
    array = whole.reward_array()

    def enough(p, n):
        if method != "best":
            return effective_sample_size(array[p, :n], lam) >= 14
        scores = array[p, :n].astype(float) @ lam
        half = np.sort(scores)  # the mean best of n/2 without replacement, by its recursion
        left, mean = 1.0, 0.0
        for i in range(n - 1, n // 2 - 2, -1):
            chance = (n // 2) / (i + 1)
            mean, left = mean + left * chance * half[i], left * (1 - chance)
        return scores.max() - mean <= 0.4 * scores.std()

    for p, n in enumerate(result.counts):
        rounds = range(8, n + 1, 8)
        assert [bool(enough(p, k)) for k in rounds] == [False] * (len(rounds) - 1) + [bool(result.enough[p])]
        assert result.enough[p] or n == 64
        assert result.candidates[p].token_ids[0] == whole.token_ids[p][:n]
        assert result.texts[p] == whole.texts[p][result.indices[p]]
        np.testing.assert_array_equal(result.rewards[p], array[p, result.indices[p]])
        np.testing.assert_allclose(result.effective_sample_size[p], effective_sample_size(array[p, :n], lam))
        if method == "best":
            assert result.indices[p] == (array[p, :n].astype(float) @ lam).argmax()
    assert len(set(result.counts)) > 1


def test_a_harder_tilt_takes_more_and_max_n_ends_it(sampler):
    easy, hard = (adaptive(sampler, PROMPTS, VOWELS, lam=[lam], ess=8, each=8, max_n=32, **JOB) for lam in (0.1, 8.0))
    assert (easy.counts == 16).all() or (easy.counts <= 16).all()
    assert easy.enough.all() and (hard.counts >= easy.counts).all()
    assert not hard.enough.all() and (hard.counts[~hard.enough] == 32).all()


@pytest.mark.filterwarnings("ignore:at λ")
def test_a_pilot_foretells_the_exact_number():
    sampler = enumerable.sampler()
    sequences, p0 = enumerable.law(sampler.model)
    r = np.array([worth(sampler.tokenizer.decode(ids)) for ids in sequences])
    p = p0 * np.exp(r)
    p /= p.sum()
    kl = float(p @ np.log(p / p0))
    job = {"lam": [1.0], "max_new_tokens": LIMIT, "seed": 2}
    result = pilot(sampler, [PROMPT] * 20, WORTH, n=256, **job)
    assert (result.n, result.prompts) == (256, 8)
    assert result.kl == pytest.approx(kl, rel=0.15)
    fewest, most = result.worth.needed()
    for n in (fewest, most):
        low, high = result.worth.at(n, prompts=40)
        enough = best_of(sampler, [PROMPT] * 40, WORTH, n=n, method="resample", **job)
        assert low <= enough.effective_sample_size.mean() <= high
    assert most <= 2 * fewest
    assert pilot(sampler, [PROMPT], WORTH, **job).prompts == 1


def test_mistakes(sampler):
    for more, match in (
        ({"max_n": 20}, "max_n must be a multiple of each, got max_n=20 and each=16"),
        ({"max_n": 0}, "max_n must be a multiple"),
        ({"each": "4"}, "each must be an integer, got '4'"),
        ({"ess": 0.5}, "ess must be at least 1"),
        ({"ess": 100}, "ess must be at most max_n, 32"),
        ({"lam": [1.0, 1.0]}, "one weight per reward"),
    ):
        with pytest.raises(UserError, match=match):
            adaptive(sampler, PROMPTS, VOWELS, **{"max_n": 32, **JOB, **more})
    with pytest.raises(UserError, match="prompts must be"):
        adaptive(sampler, "hello", VOWELS, max_n=32, **JOB)
