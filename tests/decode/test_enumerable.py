"""Every way of decoding against the exact p0 and p_λ of a model whose texts are all enumerated."""

import enumerable
import numpy as np
import pytest
from enumerable import BEGIN, LIMIT, PROMPT, WORTH, worth
from scipy.stats import chisquare

from fastalign.decode import best_of, estimate, particles, select, speculative_rejection

LAM = 1.2
JOB = {"max_new_tokens": LIMIT}


# The test of few candidates is that they are few.
pytestmark = pytest.mark.filterwarnings("ignore:at λ")


@pytest.fixture(scope="module")
def sampler():
    return enumerable.sampler()


@pytest.fixture(scope="module")
def exact(sampler):
    """Sequences -> place, p0 (S,), rewards (S,), p_λ (S,), Z."""
    sequences, p0 = enumerable.law(sampler.model)
    assert len(sequences) == 341 and p0.sum() == pytest.approx(1, abs=1e-6)
    r = np.array([worth(sampler.tokenizer.decode(ids)) for ids in sequences])
    tilted = p0 * np.exp(LAM * r)
    return {ids: i for i, ids in enumerate(sequences)}, p0, r, tilted / tilted.sum(), tilted.sum()


@pytest.fixture(scope="module")
def drawn(sampler):
    """200 x 256 draws: prompts that are all the same are independent sets of candidates."""
    return sampler.sample([PROMPT] * 200, n=256, seed=11, batch_size=4096, **JOB)


def counts(place, rows):
    return np.bincount([place[tuple(ids)] for row in rows for ids in row], minlength=len(place))


def passes(observed, p):
    """Chi-square, what is rarer than 5 expected taken together."""
    expected = p / p.sum() * observed.sum()
    rare = expected < 5
    pool = lambda x: np.append(x[~rare], x[rare].sum())  # noqa: E731
    return chisquare(pool(observed), pool(expected)).pvalue > 1e-3


def test_draws_follow_p0(exact, drawn):
    place, p0, *_ = exact
    assert all(BEGIN not in ids for row in drawn.token_ids for ids in row)
    assert passes(counts(place, drawn.token_ids), p0)
    logp = np.array([sum(values) for values in drawn.logprobs[0]])
    np.testing.assert_allclose(logp, np.log(p0[[place[tuple(ids)] for ids in drawn.token_ids[0]]]), atol=1e-4)


def test_resampled_draws_approach_p_lambda_as_theory_says(exact, drawn):
    """The law of one of N resampled, its own randomness averaged out, is p_λ (1 + (rho - w / Z) / N) to first
    order, rho = E w^2 / Z^2: the bias of a self-normalised estimate. Given its reward a text follows p0 whatever N
    is, so that the total variation between the laws of texts is that between those of rewards."""
    place, p0, r, p_lam, z = exact
    levels, level = np.unique(r, return_inverse=True)
    ids = np.array([[place[tuple(ids)] for ids in row] for row in drawn.token_ids]).reshape(-1)
    w = np.exp(LAM * r)
    rho = p0 @ w**2 / z**2
    far = {}
    for n in (1, 2, 4, 8, 16, 32):
        sets = ids.reshape(-1, n)
        weights = w[sets] / w[sets].sum(1, keepdims=True)
        law = np.bincount(level[sets].ravel(), weights.ravel(), minlength=len(levels)) / len(sets)
        far[n] = np.abs(law - np.bincount(level, p_lam)).sum() / 2
    assert list(far.values()) == sorted(far.values(), reverse=True) and far[1] > 0.3
    for n in (8, 16, 32):
        assert far[n] == pytest.approx(p_lam @ np.abs(rho - w / z) / (2 * n), rel=3 / n, abs=0.01)  # and of order 1/N^2


def test_select_draws_that_law(exact, drawn):
    place, _, r, p_lam, _ = exact
    scored = drawn.with_rewards(["worth"], np.array([worth(text) for row in drawn.texts for text in row])[:, None])
    array = scored.reward_array()
    picked = drawn.take(select(array, [LAM], k=4, seed=3))
    result = counts(place, picked.token_ids) / (200 * 4)
    assert result @ r == pytest.approx(p_lam @ r, abs=4 * np.sqrt((p_lam @ r**2 - (p_lam @ r) ** 2) / 800) + 0.02)
    at = estimate(array, [LAM])
    assert at.values[0, 0] == pytest.approx(p_lam @ r, abs=4 * at.stderr[0, 0] + 0.02)
    kl = float(p_lam @ np.log(p_lam / exact[1]))
    assert at.kl[0] == pytest.approx(kl, rel=0.03)


@pytest.mark.parametrize("method", ["systematic", "multinomial", "residual", "stratified"])
def test_particles_are_properly_weighted(sampler, exact, method):
    """Unbiased in Z and in Z E f, for a few particles, however often they were resampled."""
    place, _, r, p_lam, z = exact
    runs = 600
    result = particles(
        sampler,
        [PROMPT] * runs,
        WORTH,
        n=6,
        lam=[LAM],
        checkpoints=[1, 2, 3],
        ess=1.0,
        method=method,
        seed=5,
        batch_size=6 * runs,
        **JOB,
    )
    assert result.resampled.mean() > 1.5
    w = np.exp(result.log_weights)
    ids = np.array([[place[tuple(ids)] for ids in row] for row in result.candidates.token_ids])
    for f, truth in ((np.ones_like(r), z), (r, z * (p_lam @ r)), (r == 2.0, z * p_lam[r == 2.0].sum())):
        each = (w * f[ids]).mean(1)
        assert each.mean() == pytest.approx(truth, abs=4 * each.std() / np.sqrt(runs))
    np.testing.assert_allclose(result.log_z, np.log(w.mean(1)))


@pytest.mark.parametrize("promise", [None, lambda prompts, texts: [-2.0 * worth(t) + len(t) for t in texts]])
def test_any_promise_is_taken_back(sampler, exact, promise):
    """A promise that points the wrong way costs variance, no bias."""
    _, _, r, p_lam, z = exact
    runs = 800
    result = particles(
        sampler,
        [PROMPT] * runs,
        WORTH,
        n=8,
        lam=[LAM],
        checkpoints=[2, 3],
        ess=1.0,
        promise=promise,
        seed=6,
        batch_size=8 * runs,
        **JOB,
    )
    each = np.exp(result.log_z)
    assert each.mean() == pytest.approx(z, abs=4 * each.std() / np.sqrt(runs))
    mean = (np.exp(result.log_weights) * result.candidates.reward_array()[..., 0]).mean(1)
    assert mean.mean() == pytest.approx(z * (p_lam @ r), abs=4 * mean.std() / np.sqrt(runs))


def test_the_best_promise_makes_particles_exact(sampler, exact):
    """log E[exp(lam r) | so far]: every particle then has the weight Z, and the texts follow p_λ itself."""
    place, p0, r, p_lam, _ = exact
    sequences = list(place)

    def promise(prompts, texts):
        result = []
        for text in texts:
            begun = [
                i
                for i, ids in enumerate(sequences)
                if sampler.tokenizer.decode(ids).startswith(text)
                and len(ids) > len(text)
                and all(t < 4 for t in ids[: len(text)])
            ]
            result.append(np.log(p0[begun] @ np.exp(LAM * r[begun]) / p0[begun].sum()))
        return result

    runs = 60
    result = particles(
        sampler,
        [PROMPT] * runs,
        WORTH,
        n=16,
        lam=[LAM],
        checkpoints=[1, 2, 3],
        ess=1.0,
        promise=promise,
        seed=7,
        batch_size=16 * runs,
        **JOB,
    )
    plain = particles(sampler, [PROMPT] * runs, WORTH, n=16, lam=[LAM], checkpoints=[], seed=7, **JOB)
    assert result.log_z.std() < 0.8 * plain.log_z.std()
    assert result.values[0] == pytest.approx(p_lam @ r, abs=0.15)


def test_particles_without_checkpoints_are_resample(sampler):
    job = {"n": 16, "lam": [LAM], "seed": 8, **JOB}
    result = particles(sampler, [PROMPT] * 3, WORTH, checkpoints=[], **job)
    plain = best_of(sampler, [PROMPT] * 3, WORTH, method="resample", **job)
    assert result.candidates.token_ids == plain.candidates.token_ids
    np.testing.assert_allclose(result.log_weights, LAM * plain.candidates.reward_array()[..., 0], rtol=1e-6)
    np.testing.assert_allclose(result.values, plain.values, rtol=1e-6)
    assert result.tokens == sum(len(ids) for row in plain.candidates.token_ids for ids in row)


def test_the_bias_of_speculative_rejection_is_what_its_candidates_say(sampler, drawn):
    """Its mean reward lies between that of the tokens' worth of whole candidates and best-of-n's."""
    job = {"n": 16, "lam": [1.0], "seed": 9, "batch_size": 16 * 300, **JOB}
    whole = best_of(sampler, [PROMPT] * 300, WORTH, **job)
    result = speculative_rejection(sampler, [PROMPT] * 300, WORTH, checkpoints=[1, 2], keep=0.5, **job)
    best, reached, mean = whole.values[0], result.rewards.mean(), whole.candidates.rewards["worth"].mean()
    assert (result.rewards <= whole.rewards).all()
    assert mean + 0.5 * (best - mean) < reached < best
    full = sum(len(ids) for row in whole.candidates.token_ids for ids in row)
    assert 0.4 * full < result.tokens < 0.75 * full
