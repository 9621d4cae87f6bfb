"""Selection: draws follow the weights, best is the best, and best_of does the whole job."""

import numpy as np
import pytest
from scipy.stats import chisquare
from tiny import tiny_causal_lm, tiny_tokenizer

from fastalign import rewards
from fastalign._base.errors import UserError
from fastalign.decode import Sampler, best_of, effective_sample_size, select

RNG = np.random.default_rng(0)
REWARDS = RNG.normal(size=(5, 7, 3)).astype(np.float32)
LAM = np.array([0.5, 0.0, 2.0])


def weights(array, lam):
    scores = array.astype(np.float64) @ np.asarray(lam)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def test_draws_follow_the_weights():
    k = 20_000
    picked = select(REWARDS, LAM, k=k, seed=1)
    assert picked.shape == (5, k) and picked.dtype == np.int64
    for row, weight in zip(picked, weights(REWARDS, LAM), strict=True):
        assert chisquare(np.bincount(row, minlength=7), k * weight).pvalue > 1e-3


def test_seed_reproduces():
    first = select(REWARDS, LAM, k=50, seed=1)
    np.testing.assert_array_equal(first, select(REWARDS, list(LAM), k=50, seed=1))
    assert (first != select(REWARDS, LAM, k=50, seed=2)).any()


def test_best_is_the_best():
    scores = REWARDS.astype(np.float64) @ LAM
    np.testing.assert_array_equal(select(REWARDS, LAM, method="best", seed=0)[:, 0], scores.argmax(1))
    three = select(REWARDS, LAM, k=3, method="best", seed=0)
    np.testing.assert_array_equal(three, np.argsort(-scores, axis=1)[:, :3])


@pytest.mark.parametrize("method", ["multinomial", "systematic", "stratified", "residual", "gumbel_top_k"])
def test_every_method_picks_candidates(method):
    picked = select(REWARDS, LAM, k=4, method=method, seed=0)
    assert picked.shape == (5, 4) and picked.min() >= 0 and picked.max() < 7


def test_huge_scores_stay_finite():
    array = np.array([[[1e6], [1e6 - 1000], [0.0]]])
    assert select(array, [10.0], k=5, seed=0).tolist() == [[0] * 5]
    np.testing.assert_allclose(effective_sample_size(array, [10.0]), [1.0])


def test_one_prompt_needs_no_prompt_axis():
    np.testing.assert_array_equal(select(REWARDS[:1], LAM, k=9, seed=3), select(REWARDS[0], LAM, k=9, seed=3))


def test_effective_sample_size():
    wanted = 1 / (weights(REWARDS, LAM) ** 2).sum(-1)
    np.testing.assert_allclose(effective_sample_size(REWARDS, LAM), wanted, rtol=1e-12)
    assert effective_sample_size(REWARDS[2], LAM) == pytest.approx(wanted[2])
    np.testing.assert_allclose(effective_sample_size(REWARDS, np.zeros(3)), 7.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rewards_that_are_not_finite_are_named(bad):
    array = REWARDS.copy()
    array[3, 4, 1] = bad
    for call in (lambda: select(array, LAM, seed=0), lambda: effective_sample_size(array, LAM)):
        with pytest.raises(UserError, match=f"must be finite, got {bad} at prompt 3, candidate 4, value 1"):
            call()
    with pytest.raises(UserError, match="at candidate 4, value 1"):
        effective_sample_size(array[3], LAM)


@pytest.mark.parametrize(
    "array, lam, message",
    [
        (REWARDS, [1.0, 2.0], r"one weight per value, 3, got shape \(2,\)"),
        (REWARDS, [1.0, np.nan, 0.0], "lam must be finite"),
        (REWARDS[0, 0], LAM, r"must be \(prompts, candidates, values\)"),
        (np.zeros((0, 4, 3)), LAM, r"got shape \(0, 4, 3\)"),
    ],
)
def test_shapes_are_checked(array, lam, message):
    with pytest.raises(UserError, match=message):
        select(array, lam, seed=0)


@pytest.mark.parametrize("k, method", [(0, "resample"), (8, "best"), (8, "gumbel_top_k"), (1, "no such method")])
def test_bad_k_and_method(k, method):
    with pytest.raises(ValueError) as caught:
        select(REWARDS, LAM, k=k, method=method, seed=0)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def sampler():
    tokenizer = tiny_tokenizer()
    return Sampler(tiny_causal_lm(tokenizer), tokenizer)


LENGTH = rewards.from_function(lambda prompts, responses: [len(text) for text in responses], "length")
VOWELS = rewards.from_function(lambda prompts, responses: [sum(map(t.count, "aeiou")) for t in responses], "vowels")
JOB = {"n": 16, "max_new_tokens": 8, "seed": 4}


def test_best_of_keeps_the_best(sampler):
    result = best_of(sampler, ["the cat", "why"], LENGTH, **JOB)
    assert result.rewards.shape == (2, 1) and result.indices.shape == (2,)
    for text, row, value in zip(result.texts, result.candidates.texts, result.rewards[:, 0], strict=True):
        assert len(text) == max(map(len, row)) == value
    assert result.candidates.kind == "scored"


def test_best_of_weighs_and_resamples(sampler):
    both = [LENGTH, VOWELS]
    result = best_of(sampler, ["the cat", "why"], both, lam=[-1.0, 3.0], **JOB)
    scores = result.candidates.reward_array(["length", "vowels"]) @ [-1.0, 3.0]
    np.testing.assert_array_equal(result.indices, scores.argmax(1))
    drawn = best_of(sampler, ["the cat", "why"], both, lam=[0.0, 1.0], method="resample", **JOB)
    array = drawn.candidates.reward_array()
    np.testing.assert_array_equal(drawn.rewards, array[[0, 1], drawn.indices])
    np.testing.assert_allclose(drawn.effective_sample_size, effective_sample_size(array, [0.0, 1.0]))


def test_best_of_passes_sampling_on_and_checks_lam(sampler):
    result = best_of(sampler, ["the cat"], LENGTH, temperature=0, **JOB)
    assert len(set(result.candidates.texts[0])) == 1
    with pytest.raises(UserError, match="one weight per reward, 2"):
        best_of(sampler, ["the cat"], [LENGTH, VOWELS], lam=[1.0], **JOB)


def test_best_of_keeps_k_and_averages_its_own_draw_out(sampler):
    job = {**JOB, "n": 32}
    best = best_of(sampler, ["the cat", "why"], LENGTH, k=3, **job)
    lengths = best.candidates.rewards["length"]
    np.testing.assert_array_equal(np.sort(lengths)[:, :-4:-1], best.picked.rewards["length"])
    assert best.texts == [row[0] for row in best.picked.texts] and best.values[0] == lengths.max(1).mean()
    apart = best_of(sampler, ["the cat", "why"], LENGTH, lam=[0.1], method="gumbel_top_k", k=32, **job)
    assert [sorted(row) for row in apart.picked.picked.tolist()] == [list(range(32))] * 2  # without replacement
    drawn = best_of(sampler, ["the cat", "why"], LENGTH, lam=[0.1], method="resample", k=4000, **job)
    np.testing.assert_allclose(drawn.values[0], (weights(lengths[..., None], [0.1]) * lengths).sum(1).mean(), rtol=1e-6)
    assert drawn.values[0] == pytest.approx(drawn.picked.rewards["length"].mean(), abs=4 * float(lengths.std()) / 90)
    with pytest.warns(UserWarning, match="too few to trust the ideal's values; 10 need"):
        best_of(sampler, ["the cat"], LENGTH, lam=[5.0], method="resample", **job)


def test_weights_that_leave_the_numbers_are_said():
    with pytest.raises(UserError, match="lam must leave λ·R finite"):
        select(np.full((1, 2, 2), 3.0), np.array([1e308, 1.0]), seed=0)
