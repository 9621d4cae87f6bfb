"""Standard errors against many draws from a known law, the bootstrap, and data that did not make λ."""

import numpy as np
import pytest

from fastalign import UserError
from fastalign.palette import bootstrap, held_out, quantile_palette, solve, standard_errors

MIX = np.array([[1.0, 0.4], [0.0, 0.8]])


def draw(rng, n):
    return rng.normal(size=(n, 2)) @ MIX


def test_standard_errors_of_a_normal_law():
    """R ~ N(0, Σ): λ = Σ⁻¹ c and the tilted mean is known, so the spread over fresh data sets is the truth."""
    cov = MIX.T @ MIX
    palette = np.array([0.5, 0.4])
    true = np.linalg.solve(cov, palette)
    assert (true > 0).all()
    rng = np.random.default_rng(0)
    lams, lines, off, predicted = [], [], [], []
    for _ in range(400):
        rewards = draw(rng, 1000)
        lam = solve(rewards, palette).lam
        errors = standard_errors(rewards, lam)
        lams.append(lam)
        lines.append(errors.lam)
        off.append(cov @ lam - palette)  # what the policy's levels really are
        predicted.append(errors.levels)
    np.testing.assert_allclose(np.std(lams, axis=0), np.mean(lines, axis=0), rtol=0.15)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(off), axis=0)), np.mean(predicted, axis=0), rtol=0.15)
    np.testing.assert_allclose(np.mean(lams, axis=0), true, atol=0.02)


def test_a_slack_value_has_no_error():
    rewards = draw(np.random.default_rng(1), 500)
    lam = solve(rewards, [0.5, -1.0]).lam
    errors = standard_errors(rewards, lam)
    assert lam[1] == 0 == errors.lam[1] and errors.lam[0] > 0 and (errors.levels > 0).all()
    # one value: Var λ = Σ p² (R − c)² / Var_λ(R)²
    p = np.exp(rewards[:, 0] * lam[0])
    p /= p.sum()
    apart = rewards[:, 0] - 0.5
    assert errors.lam[0] == pytest.approx(np.sqrt(p**2 @ apart**2) / (p @ apart**2), rel=1e-8)


def test_whole_prompts_are_the_units():
    """Prompts of which every one is there ten times over know no more than one time over."""
    rng = np.random.default_rng(2)
    rewards, groups = draw(rng, 600) + np.repeat(rng.normal(size=(60, 2)), 10, axis=0), np.repeat(np.arange(60), 10)
    palette = rewards.mean(axis=0) + 0.2
    once = solve(rewards, palette, groups=groups)
    ten = np.tile(rewards, (10, 1)), np.tile(groups, 10)
    errors = standard_errors(rewards, once.lam, groups=groups)
    again = standard_errors(ten[0], once.lam, groups=ten[1])
    np.testing.assert_allclose(again.lam, errors.lam, rtol=1e-10)
    np.testing.assert_allclose(again.levels, errors.levels, rtol=1e-10)
    # rows: ten times the data, √10 less
    np.testing.assert_allclose(
        standard_errors(ten[0], once.lam).lam, standard_errors(rewards, once.lam).lam / np.sqrt(10), rtol=1e-10
    )


@pytest.mark.parametrize("grouped", [False, True])
def test_bootstrap_agrees_with_the_sandwich(grouped):
    rewards = draw(np.random.default_rng(3), 900)
    options = {"groups": np.arange(900) // 9} if grouped else {}
    palette = [0.3, 0.3]
    result = bootstrap(rewards, palette, draws=150, seed=1, **options)
    lam = solve(rewards, palette, **options).lam
    errors = standard_errors(rewards, lam, **options)
    assert result.feasible == 1 and result.lam.shape == result.levels.shape == (150, 2)
    np.testing.assert_allclose(result.lam.std(axis=0), errors.lam, rtol=0.3)
    low, high = result.interval(0.9)
    assert (low < lam).all() and (lam < high).all()
    np.testing.assert_array_equal(bootstrap(rewards, palette, draws=3, seed=1, **options).lam, result.lam[:3])


def test_bootstrap_tells_how_often_the_palette_is_out_of_reach():
    rewards = draw(np.random.default_rng(4), 30)
    result = bootstrap(rewards, 0.98 * solve(rewards, [9, 9]).nearest, draws=60)
    assert 0.2 < result.feasible < 1
    assert np.isfinite(result.lam).all(axis=1).mean() == result.feasible
    assert np.isfinite(result.interval()).all()


def test_held_out_levels_are_honest():
    """At an easy palette they meet it; at one made by a few outliers they fall short, though λ's own samples reach
    it."""
    rng = np.random.default_rng(5)
    rewards = draw(rng, 4000)
    easy = held_out(rewards, [0.3, 0.3])
    assert easy.feasible and easy.met.all() and (easy.error < 0.1).all()
    np.testing.assert_allclose(easy.levels, 0.3, atol=0.1)
    few = rng.normal(size=(60, 6))
    hard = held_out(few, quantile_palette(few, 0.8), folds=3)
    assert not hard.met.all() and hard.ess < 15
    grouped = held_out(rewards, [0.3, 0.3], groups=np.arange(4000) // 10, weights=rng.random(4000))
    assert grouped.feasible and grouped.met.all() and grouped.ess > 1000
    below = held_out(rewards, [-0.3, 0.3], sense=["<=", "=="])
    assert below.met.all() and below.levels[0] < -0.2
    beyond = held_out(few, [3.0] * 6)
    assert not beyond.feasible and not beyond.met.all() and np.isfinite(beyond.levels).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda r: standard_errors(r, [1.0]), "lam must be 2 finite numbers"),
        (lambda r: standard_errors(r, [np.nan, 1]), "lam must be 2 finite numbers"),
        (lambda r: bootstrap(r, [0, 0], draws=0), "draws must be at least 1, got 0"),
        (
            lambda r: held_out(r, [0, 0], folds=1),
            "folds must lie between 2 and the number of samples or prompts, 20, got 1",
        ),
        (lambda r: held_out(r, [0, 0], folds=5, groups=np.arange(20) // 10), "prompts, 2, got 5"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call(np.random.default_rng(0).normal(size=(20, 2)))
