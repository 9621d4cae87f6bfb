"""Estimates from one set of candidates against brute force: every subset, every draw, an enumerable law."""

import itertools
import math

import numpy as np
import pytest

from fastalign import UserError
from fastalign.decode import best_of_curve, best_of_n_kl, estimate, needed, select


def test_values_are_the_mean_of_what_select_draws():
    R = np.random.default_rng(0).normal(size=(20, 16, 2))
    lam = np.array([0.8, -0.3])
    result = estimate(R, lam)
    picks = np.stack([select(R, lam, seed=seed)[:, 0] for seed in range(2000)])
    drawn = R[np.arange(20)[None], picks].mean((0, 1))
    assert result.values[0] == pytest.approx(drawn, abs=5 / math.sqrt(2000 * 20))


@pytest.mark.filterwarnings("ignore:at λ")
def test_intervals_cover_the_decoders_mean():
    rng = np.random.default_rng(1)
    lam, covered, rounds = np.array([1.0]), 0, 300
    truth = estimate(rng.normal(size=(40000, 12, 1)), lam).values[0, 0]
    for _ in range(rounds):
        low, high = estimate(rng.normal(size=(60, 12, 1)), lam).interval(0.9)
        covered += low[0, 0] <= truth <= high[0, 0]
    assert 0.84 < covered / rounds < 0.96


def test_kl_and_values_approach_the_ideal():
    # Three outcomes with rewards 0, 1, 2 and p0 = (.5, .3, .2); p_λ ∝ p0 e^{λ r}.
    p0, r, lam = np.array([0.5, 0.3, 0.2]), np.arange(3.0), 0.7
    p = p0 * np.exp(lam * r)
    p /= p.sum()
    R = np.random.default_rng(2).choice(r, p=p0, size=(50, 20000, 1))
    result = estimate(R, [[lam], [0.0]])
    assert result.values[0, 0] == pytest.approx(p @ r, abs=0.005)
    assert result.kl[0] == pytest.approx(float(p @ np.log(p / p0)), abs=0.005)
    assert result.kl[1] == pytest.approx(0, abs=1e-12) and result.ess[1] == pytest.approx(20000)


def test_too_few_effective_candidates_warn_and_say_how_many_are_needed():
    R = np.random.default_rng(3).normal(size=(5, 16, 1))
    with pytest.warns(UserWarning, match=r"worth \d\.\d: too few .*; 10 need \d+"):
        estimate(R, [5.0])
    assert needed(0.0) == 10 and needed(3.0, ess=1) == math.ceil(math.e**3) and needed(1e6) > 1e100


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_curve_is_the_mean_over_all_subsets(ties):
    rng = np.random.default_rng(4)
    R = rng.integers(0, 3, size=(3, 6, 2)).astype(float) if ties else rng.normal(size=(3, 6, 2))
    lam = np.array([1.0, 1.0])
    result = best_of_curve(R, lam, [1, 2, 4, 6])
    for k, values in zip(result.k, result.values, strict=True):
        means = []
        for prompt in R:
            for subset in itertools.combinations(range(6), k):
                scores = prompt[list(subset)] @ lam
                means.append(prompt[list(subset)][scores == scores.max()].mean(0))
        assert values == pytest.approx(np.mean(means, 0)) or (ties and k not in (1, 6))
        if ties:  # equal scores share alike over all subsets: the score itself is exact
            best = np.mean([max((prompt @ lam)[list(s)]) for prompt in R for s in itertools.combinations(range(6), k)])
            assert values @ lam == pytest.approx(best)
    assert result.kl == pytest.approx([0, math.log(2) - 1 / 2, math.log(4) - 3 / 4, math.log(6) - 5 / 6])


def test_best_of_n_kl_is_exact_without_ties():
    n, size = 5, 2000  # the best of n of `size` equally likely outcomes has rank i with (i/size)^n - ((i-1)/size)^n
    i = np.arange(1, size + 1)
    p = (i / size) ** n - ((i - 1) / size) ** n
    assert best_of_n_kl(n) == pytest.approx(float((p * np.log(p * size)).sum()), abs=2e-3)
    assert best_of_n_kl(1) == 0


def test_large_n_and_extreme_scores_stay_finite():
    R = np.random.default_rng(5).normal(size=(2, 10000, 1)) * 1e4
    result = best_of_curve(R, np.ones(1), [1, 5000, 10000])
    assert np.isfinite(result.values).all() and result.values[2, 0] == pytest.approx(R.max(1).mean())
    with pytest.warns(UserWarning):
        again = estimate(R, [1.0])
    assert again.kl[0] <= math.log(10000) + 1e-9 and np.isfinite(again.values).all()


def test_mistakes():
    R = np.zeros((2, 3, 1))
    for call, match in (
        (lambda: best_of_curve(R, np.ones(1), [4]), r"ks must be numbers in 1\.\.3"),
        (lambda: best_of_n_kl(0), "n must be at least 1"),
        (lambda: needed(-1.0), "kl must be at least 0"),
        (lambda: estimate(R[0], [1.0]), "rewards must be"),
        (lambda: estimate(R, [1.0, 2.0]), "one weight per value"),
    ):
        with pytest.raises(UserError, match=match):
            call()
