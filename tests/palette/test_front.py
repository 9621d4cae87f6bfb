"""Fronts, ways to palettes and random λ, against what other methods say of the same policies."""

import enumerable
import numpy as np
import pytest
from scipy.optimize import linprog, minimize_scalar
from scipy.special import logsumexp

from fastalign._base.errors import UserError
from fastalign.palette import (
    feasible_region,
    front_towards,
    kl_front,
    palette_path,
    pareto_front,
    solve,
    spread_directions,
)
from fastalign.palette.feasibility import INWARD


def samples(n: int, m: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n, m)) @ (np.eye(m) - 0.4 * np.eye(m, k=1))
    mixed[:, 0] = np.exp(mixed[:, 0])
    return mixed * 10.0 ** np.arange(m) + 3.0


def most_within(scores: np.ndarray, kl: float, p0: np.ndarray) -> float:
    """max of E_q[scores] over all q with KL(q ‖ p0) ≤ kl, by its dual min_β β (kl + log E_p0 exp(scores / β))."""
    at = lambda b: np.exp(b) * (kl + logsumexp(scores / np.exp(b), b=p0))  # noqa: E731
    return minimize_scalar(at, bounds=(-12, 12), method="bounded", options={"xatol": 1e-10}).fun


@pytest.mark.parametrize("m", [1, 2, 3, 6])
@pytest.mark.parametrize("kl", [0.01, 0.7, 3.0])
def test_no_policy_within_the_kl_reaches_beyond_the_front(m, kl):
    rewards = samples(300, m)
    directions = spread_directions(m, 12)
    result = kl_front(rewards, kl, directions)
    np.testing.assert_allclose(result.kl, kl, rtol=1e-9)
    scaled = rewards / rewards.std(axis=0)
    for w, levels in zip(directions, result.levels, strict=True):
        most = most_within(scaled @ w, kl, np.full(300, 1 / 300))
        assert w @ (levels / rewards.std(axis=0)) == pytest.approx(most, rel=1e-8)
    assert pareto_front(result.levels).tolist() == list(range(len(directions)))


def test_every_front_point_is_its_own_palettes_answer():
    rewards = samples(400, 3)
    front = kl_front(rewards, 1.2, spread_directions(3, 28))
    inside = (front.lam > 0).all(axis=1)
    again = solve(rewards, front.levels[inside])
    assert inside.sum() >= 10 and again.feasible.all()
    np.testing.assert_allclose(again.lam, front.lam[inside], rtol=1e-5)
    np.testing.assert_allclose(again.ess, front.ess[inside], rtol=1e-5)


def test_front_by_groups_and_by_weights():
    rewards, groups = samples(240, 2), np.arange(240) % 8
    result = kl_front(rewards, 0.9, groups=groups)
    np.testing.assert_allclose(result.kl, 0.9, rtol=1e-9)
    for lam, levels, kl in zip(result.lam[::20], result.levels[::20], result.kl[::20], strict=True):
        p = np.exp(rewards @ lam - [logsumexp((rewards @ lam)[groups == g]) for g in groups])
        np.testing.assert_allclose(p @ rewards / 8, levels, rtol=1e-9)
        assert (p @ np.log(30 * p)) / 8 == pytest.approx(kl, rel=1e-8)
    weights = np.random.default_rng(1).integers(0, 4, 240)
    weighted = kl_front(rewards.astype(np.float32), 0.9, weights=weights)
    repeated = kl_front(np.repeat(rewards.astype(np.float32), weights, axis=0), 0.9)
    np.testing.assert_allclose(weighted.levels, repeated.levels, rtol=1e-7)


def test_the_limit_is_the_best_samples():
    rewards = samples(200, 3)
    rewards[7] = rewards[3] = rewards.max(axis=0) + 1.0  # best in everything, twice
    limit = kl_front(rewards, np.inf)
    np.testing.assert_allclose(limit.levels, np.broadcast_to(rewards[3], limit.levels.shape), rtol=1e-9)
    np.testing.assert_allclose(limit.kl, np.log(100), rtol=1e-7)
    np.testing.assert_allclose(limit.ess, 2)
    # A KL that no policy has room for gives the limit.
    np.testing.assert_allclose(kl_front(rewards, 50.0).levels, limit.levels, rtol=1e-9)


def test_nothing_to_move():
    for rewards in (np.ones((5, 2)), samples(1, 2)):
        result = kl_front(rewards, 0.5)
        assert (result.lam == 0).all() and (result.kl == 0).all() and np.allclose(result.levels, rewards.mean(axis=0))
    half = samples(50, 2)
    half[:, 1] = 4.0
    result = kl_front(half, 0.5, [[1.0, 1.0], [0.0, 1.0]])
    np.testing.assert_allclose(result.kl, [0.5, 0.0], rtol=1e-9)


@pytest.fixture(scope="module")
def law():
    """p0 (S,) and two rewards (S, 2) of every text that a model can write."""
    sampler = enumerable.sampler()
    sequences, p0 = enumerable.law(sampler.model)
    texts = [sampler.tokenizer.decode(ids) for ids in sequences]
    rewards = np.array([[enumerable.worth(t), -abs(len(t) - 3) + 0.4 * t.count("b")] for t in texts])
    return p0 / p0.sum(), rewards


def scalarised(p0, rewards, w, beta, steps=400, rate=0.2):
    """The q that maximises w·E_q[R] − β KL(q ‖ p0), by entropic mirror ascent from the uniform law; no Gibbs form
    used."""
    log_q = np.full(len(p0), -np.log(len(p0)))
    for _ in range(steps):
        gradient = rewards @ w - beta * (log_q - np.log(p0) + 1)
        log_q = log_q + rate * gradient
        log_q -= logsumexp(log_q)
    return np.exp(log_q)


def test_map_and_linear_scalarisation_realise_the_same_levels(law):
    p0, rewards = law
    rng = np.random.default_rng(0)
    for _ in range(6):
        w, beta = rng.dirichlet(np.ones(2)), rng.uniform(0.3, 1.2)
        levels = scalarised(p0, rewards, w, beta) @ rewards
        result = solve(rewards, levels, weights=p0)  # what RLHF reaches is a palette whose λ is w / β
        assert result.feasible
        np.testing.assert_allclose(result.lam, w / beta, rtol=1e-6)
        np.testing.assert_allclose(result.levels, levels, rtol=1e-8)
    mean, deviation = p0 @ rewards, np.sqrt(p0 @ rewards**2 - (p0 @ rewards) ** 2)
    for _ in range(6):  # and a palette with λ is what RLHF with weights λ / |λ| at β = 1 / |λ| reaches
        result = solve(rewards, mean + rng.uniform(0.1, 0.6, 2) * deviation, weights=p0)
        size = result.lam.sum()
        reached = scalarised(p0, rewards, result.lam / size, 1 / size, rate=0.1 * size, steps=600)
        np.testing.assert_allclose(reached @ rewards, result.levels, rtol=1e-7)


def test_front_towards_palettes():
    rewards = samples(300, 3)
    mean = rewards.mean(axis=0)
    front = kl_front(rewards, 1.0, spread_directions(3, 15))
    t, result = front_towards(rewards, mean + 0.5 * (front.levels - mean), 1.0)
    inside = (front.lam > 0).all(axis=1)
    np.testing.assert_allclose(t[inside], 2.0, rtol=1e-6)
    np.testing.assert_allclose(result.lam[inside], front.lam[inside], rtol=1e-4)
    np.testing.assert_allclose(result.kl, 1.0, rtol=1e-7)
    # With room for any KL it goes as far as the samples allow.
    palettes = mean + rewards.std(axis=0) * [[9.0, 9.0, 9.0], [0.0, 9.0, 2.0]]
    t, result = front_towards(rewards, palettes, 30.0)
    np.testing.assert_allclose(t, solve(rewards, palettes).scaling, rtol=1e-6)
    assert (result.levels >= mean + t[:, None] * (palettes - mean) - 1e-6 * rewards.std(axis=0)).all()


def test_the_way_to_a_palette():
    rewards, groups = samples(256, 3), np.repeat(np.arange(8), 32)
    mean, sd = rewards.mean(axis=0), rewards.std(axis=0)
    palette = mean + 0.4 * sd * [1.0, 0.5, 0.0]
    way = palette_path(rewards, palette, steps=9, groups=groups)
    assert way.limit == 1.0 and way.t[0] == 0 and way.t[-1] == 1 and len(way.t) == 9
    np.testing.assert_allclose(way.palettes[-1], palette)
    np.testing.assert_allclose(way.policies.lam[-1], solve(rewards, palette, groups=groups).lam, rtol=1e-6)
    assert (np.diff(way.policies.kl) > 0).all() and (way.policies.levels >= way.palettes - 1e-6 * sd).all()
    beyond = mean + 6.0 * sd
    way = palette_path(rewards, beyond, steps=5, groups=groups)
    # How far the per-prompt hulls reach, by linear programming: a mixture of each prompt's samples.
    a_ub = np.c_[-rewards.T / 8, beyond - mean]
    a_eq = np.c_[(groups == np.arange(8)[:, None]).astype(float), np.zeros(8)]
    most = linprog(np.r_[np.zeros(256), -1.0], A_ub=a_ub, b_ub=-mean, A_eq=a_eq, b_eq=np.ones(8)).x[-1]
    assert way.limit == pytest.approx(most, rel=1e-6) and way.t[-1] == pytest.approx(INWARD * most, rel=1e-6)
    assert len(way.t) == 5 and np.isfinite(way.policies.lam).all()
    exactly = palette_path(rewards, palette, steps=3, groups=groups, sense="==")
    np.testing.assert_allclose(exactly.policies.levels, exactly.palettes, rtol=1e-8)


def test_random_lambda_and_the_desirable_ones():
    rewards = samples(150, 3)
    result = feasible_region(rewards, 400, 3.0, seed=5)
    assert np.array_equal(result.policies.lam, feasible_region(rewards, 400, 3.0, seed=5).policies.lam)
    assert not np.array_equal(result.policies.lam, feasible_region(rewards, 400, 3.0, seed=6).policies.lam)
    scaled = result.policies.lam * rewards.std(axis=0)
    assert (scaled >= 0).all() and scaled.sum(axis=1).max() <= 3.0
    # Uniform over the corner: Σ ≤ r has the share (r / 3)³.
    assert (scaled.sum(axis=1) < 1.5).mean() == pytest.approx(1 / 8, abs=0.05)
    desirable = []
    for lam, levels, kl in zip(*result.policies[:3], strict=True):
        p = np.exp(rewards @ lam - logsumexp(rewards @ lam))
        np.testing.assert_allclose(levels, p @ rewards, rtol=1e-9)
        assert kl == pytest.approx(p @ np.log(150 * p), abs=1e-9)
        desirable.append((p @ rewards >= rewards.mean(axis=0)).all())
    assert result.desirable.tolist() == desirable and 0.02 < result.desirable.mean() < 0.98


def test_directions():
    for m in (1, 2, 3, 5):
        result = spread_directions(m, 30)
        assert (result >= 0).all() and len(np.unique(result, axis=0)) == len(result)
        np.testing.assert_allclose(np.linalg.norm(result, axis=1), 1)
        assert all((np.abs(result - axis).max(axis=1) < 1e-12).any() for axis in np.eye(m))
    assert len(spread_directions(3, 28)) == 28 and (spread_directions(4, 5, columns=[1, 3])[:, [0, 2]] == 0).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda r: kl_front(r, 0.0), "kl must be positive, got 0.0"),
        (lambda r: kl_front(r, np.nan), "kl must be positive, got nan"),
        (lambda r: kl_front(r, 1.0, [[1.0]]), "directions must have shape (K, 2), got (1, 1)"),
        (lambda r: kl_front(r, 1.0, [[0.0, 0.0]]), "directions must be finite, not negative, and not 0 in every value"),
        (lambda r: kl_front(np.where(r > 5, np.nan, r), 1.0), "rewards must be finite, got nan in row"),
        (lambda r: front_towards(r, r.mean(axis=0) - 1, 1.0), "palettes must each ask for more than the mean"),
        (lambda r: front_towards(r, r.mean(axis=0) + 1, np.inf), "kl must be positive and finite, got inf"),
        (lambda r: palette_path(r, r.mean(axis=0), steps=1), "steps must be at least 2, got 1"),
        (lambda r: palette_path(r, [1.0]), "palette must have one level for each of the 2 rewards, got 1"),
        (lambda r: feasible_region(r, 0, 1.0, 0), "n_lam must be at least 1, got 0"),
        (lambda r: feasible_region(r, 5, np.inf, 0), "l1_max must be positive and finite, got inf"),
    ],
)
def test_bad_input_is_one_clear_line(call, says):
    with pytest.raises(UserError) as error:
        call(samples(40, 2))
    assert str(error.value).startswith(says) and "\n" not in str(error.value)
