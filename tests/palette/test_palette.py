import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from scipy.special import logsumexp

from fastalign import UserError
from fastalign.palette import quantile_palette, solve
from fastalign.palette.inputs import as_rewards


def samples(n, m, seed=0, kind="normal"):
    """Correlated rewards; "bounded" ones pile up at their limits, "skewed" ones have a long lower tail."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, m)) @ (np.eye(m) + 0.3 * rng.normal(size=(m, m)))
    return {"normal": x, "bounded": np.tanh(x), "skewed": -np.exp(0.8 * x)}[kind]


def dual(lam, rewards, palette, groups=None, weights=None):
    """mean over groups of log Σ w e^{λ·R} / Σ w, minus λ·c."""
    weights = np.ones(len(rewards)) if weights is None else weights
    groups = np.zeros(len(rewards)) if groups is None else groups
    s = rewards @ lam
    members = [groups == g for g in np.unique(groups)]
    return np.mean([logsumexp(s[i], b=weights[i]) - np.log(weights[i].sum()) for i in members]) - lam @ palette


def scipy_dual(rewards, palette, groups=None, weights=None, upper=None):
    result = minimize(
        dual,
        np.zeros(len(palette)),
        args=(rewards, palette, groups, weights),
        method="L-BFGS-B",
        bounds=[(0, upper)] * len(palette),
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 2000, "maxfun": 10**6},
    )
    return result.x, result.fun


def slack(rewards, palette, groups=None):
    """max t such that some mixture reaches palette + t σ, by linear programming; below 0: infeasible."""
    n, m = rewards.shape
    deviation = rewards.std(axis=0)
    deviation[deviation == 0] = 1
    scaled = (rewards - palette) / deviation
    groups = np.zeros(n) if groups is None else groups
    members = np.array([groups == g for g in np.unique(groups)], dtype=float)
    reach = np.hstack([-scaled.T / len(members), np.ones((m, 1))])
    result = linprog(
        np.r_[np.zeros(n), -1],
        A_ub=reach,
        b_ub=np.zeros(m),
        A_eq=np.c_[members, np.zeros(len(members))],
        b_eq=np.ones(len(members)),
        bounds=[(0, None)] * n + [(None, None)],
    )
    assert result.status == 0
    return -result.fun


@pytest.mark.parametrize("kind", ["normal", "bounded", "skewed"])
@pytest.mark.parametrize("form", ["joint", "groups", "weights", "both"])
def test_solves_the_dual(form, kind):
    rewards = samples(400, 3, 1, kind)
    rng = np.random.default_rng(2)
    options = {}
    if form in ("groups", "both"):
        options["groups"] = rng.integers(0, 20, 400)
    if form in ("weights", "both"):
        options["weights"] = rng.random(400)
    palette = rewards.mean(axis=0) + np.array([0.3, 0.1, -0.5]) * rewards.std(axis=0)
    result = solve(rewards, palette, **options)
    lam, value = scipy_dual(rewards, palette, **options)
    assert result.feasible and result.nearest is None and result.certificate is None
    assert result.kkt_residual <= 1e-9 and result.iterations <= 12
    np.testing.assert_allclose(result.lam, lam, atol=2e-4 * (1 + np.abs(lam).max()))
    assert dual(result.lam, rewards, palette, **options) <= value + 1e-12
    # strong duality: -KL is the least value of the dual
    assert result.kl == pytest.approx(-dual(result.lam, rewards, palette, **options), abs=1e-8)
    assert (result.levels >= palette - 1e-9 * rewards.std(axis=0)).all()


def test_two_samples_by_hand():
    result = solve(np.array([[0.0], [1.0]]), [0.8])
    assert result.lam[0] == pytest.approx(np.log(4), rel=1e-9)
    assert result.kl == pytest.approx(np.log(2) + 0.8 * np.log(0.8) + 0.2 * np.log(0.2), rel=1e-9)
    assert result.ess == pytest.approx(1 / (0.8**2 + 0.2**2), rel=1e-8)
    assert result.levels[0] == pytest.approx(0.8, abs=1e-9)


def test_joint_and_per_prompt_duals_differ_as_they_should():
    """Two prompts of which one has the higher rewards: the joint form moves mass to it, the per-prompt one may not."""
    rewards, groups = np.array([[0.0], [0.0], [1.0], [1.0]]), np.array([0, 0, 1, 1])
    joint = solve(rewards, [0.75])
    assert joint.feasible and joint.lam[0] == pytest.approx(np.log(3), rel=1e-9)
    apart = solve(rewards, [0.75], groups=groups)
    assert not apart.feasible and apart.nearest == pytest.approx([0.5], abs=1e-12)


def test_groups_need_be_neither_sorted_nor_small_numbers():
    rewards, rng = samples(300, 2), np.random.default_rng(0)
    groups = rng.integers(0, 12, 300)
    names = rng.permutation(10**6)[:12] - 500_000
    palette = rewards.mean(axis=0) + 0.3
    order = np.argsort(groups, kind="stable")
    a = solve(rewards, palette, groups=names[groups])
    b = solve(rewards[order], palette, groups=groups[order])
    np.testing.assert_allclose(a.lam, b.lam, rtol=1e-8)


def test_slack_constraints_are_exactly_zero():
    rewards = samples(500, 4)
    result = solve(rewards, rewards.mean(axis=0) + np.array([0.5, -1.0, -2.0, -3.0]) * rewards.std(axis=0))
    assert result.lam[0] > 0 and (result.lam[1:] == 0).all()
    nothing = solve(rewards, rewards.mean(axis=0) - 1)
    assert (
        (nothing.lam == 0).all() and nothing.kl == 0 and nothing.iterations == 1 and nothing.ess == pytest.approx(500)
    )


def test_whole_weights_are_repeated_rows():
    rewards, rng = samples(60, 3), np.random.default_rng(0)
    weights = rng.integers(0, 4, 60)
    palette = rewards.mean(axis=0) + 0.3
    a, b = solve(rewards, palette, weights=weights), solve(np.repeat(rewards, weights, axis=0), palette)
    np.testing.assert_allclose(a.lam, b.lam, rtol=1e-8)
    assert a.kl == pytest.approx(b.kl, rel=1e-9)


def test_many_palettes_as_one_by_one():
    rewards = samples(300, 3)
    groups = np.arange(300) // 10
    palettes = np.array([np.quantile(rewards, q, axis=0) for q in (0.3, 0.5, 0.6, 0.99, 1.0)])
    for options in ({}, {"groups": groups}):
        result = solve(rewards, palettes, **options)
        assert result.lam.shape == result.levels.shape == result.nearest.shape == (5, 3)
        assert result.feasible.tolist() == [True, True, True, False, False]
        for k, palette in enumerate(palettes):
            alone = solve(rewards, palette, **options)
            for field in dataclasses.fields(alone):
                ours, one = getattr(result, field.name)[k], getattr(alone, field.name)
                one = np.full(3, np.nan) if one is None else one
                np.testing.assert_allclose(ours, one, rtol=1e-7, atol=1e-8, err_msg=field.name)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_units_do_not_matter(scale):
    rewards, scales = samples(300, 3), np.array([scale, 1.0, 1 / scale])
    palette = rewards.mean(axis=0) + np.array([0.4, 0.2, -0.3])
    plain, scaled = solve(rewards, palette), solve(rewards * scales, palette * scales)
    assert scaled.kkt_residual <= 1e-9
    np.testing.assert_allclose(scaled.lam * scales, plain.lam, rtol=1e-7)


def test_an_offset_costs_no_digits():
    rewards = samples(300, 2)
    palette = rewards.mean(axis=0) + 0.3
    far = solve(rewards + 1e6, palette + 1e6)
    np.testing.assert_allclose(far.lam, solve(rewards, palette).lam, rtol=1e-7)
    # a level far below all rewards asks nothing, and must not spoil the other's digits
    one_sided = solve(rewards, [palette[0], -1e12])
    np.testing.assert_allclose(one_sided.lam, [solve(rewards[:, :1], palette[:1]).lam[0], 0], rtol=1e-8)


@pytest.mark.parametrize("case", ["duplicate", "collinear", "constant", "all constant", "one row"])
def test_degenerate_rewards(case):
    rewards = samples(200, 3)
    if case == "duplicate":
        rewards[:, 2] = rewards[:, 0]
    if case == "collinear":
        rewards[:, 2] = rewards[:, 0] + 2 * rewards[:, 1]
    if case == "constant":
        rewards[:, 1] = 0.1
    if case == "all constant":
        rewards[:] = 0.1
    if case == "one row":
        rewards = rewards[:1]
    mean = rewards.mean(axis=0)
    met = solve(rewards, mean)
    assert met.feasible and met.kkt_residual <= 1e-9 and met.kl <= 1e-9
    step = np.where(rewards.std(axis=0) > 1e-9, 0.3, 0.0)
    result = solve(rewards, mean + step)
    assert result.feasible and result.kkt_residual <= 1e-9 and np.isfinite(result.lam).all()
    if case in ("constant", "all constant", "one row"):
        still = rewards.std(axis=0) < 1e-9
        assert (result.lam[still] == 0).all()
        too_much = solve(rewards, mean + np.where(still, 0.5, 0.0))
        assert not too_much.feasible
        np.testing.assert_allclose(too_much.nearest[still], mean[still], rtol=1e-12)


def test_a_reward_that_only_the_prompt_decides():
    """Within each group it is constant, so no λ moves it; between groups it varies by much."""
    rewards, groups = samples(300, 3), np.arange(300) // 10
    rewards[:, 1] = np.cos(groups) * 1e3
    palette = rewards.mean(axis=0) + [0.3, 0, 0.1]
    result = solve(rewards, palette, groups=groups)
    assert result.feasible and result.lam[1] == 0 and result.kkt_residual <= 1e-9
    alone = solve(rewards[:, [0, 2]], palette[[0, 2]], groups=groups)
    np.testing.assert_allclose(result.lam[[0, 2]], alone.lam, rtol=1e-8)
    assert not solve(rewards, palette + [0, 1, 0], groups=groups).feasible
    # a hair of spread within the groups is enough to be moved by, and keeps its digits beside the groups' offsets
    hair = 1e-6 * samples(300, 1, 5)[:, 0]
    rewards[:, 1] += hair
    palette[1] = np.mean(np.cos(groups) * 1e3) + hair.mean() + 3e-7
    moved = solve(rewards, palette, groups=groups)
    assert moved.feasible and moved.kkt_residual <= 1e-6
    without = solve(
        np.c_[rewards[:, 0], hair, rewards[:, 2]], [palette[0], hair.mean() + 3e-7, palette[2]], groups=groups
    )
    np.testing.assert_allclose(moved.lam, without.lam, rtol=1e-5)


def test_a_constant_in_float32_meets_its_own_value():
    rewards = np.full((50, 2), 0.7, dtype=np.float32)
    rewards[:, 1] = np.arange(50)
    assert solve(rewards, [0.7, 30.0]).feasible


def test_large_lambda_where_a_plain_exp_overflows():
    """Bounded rewards asked for near their bound: λ·R passes 88, where exp ends in float32, on few samples."""
    rewards = samples(3000, 3, 0, "bounded").astype(np.float32)
    palette = quantile_palette(rewards, 0.8)
    rewards, palette = rewards * 0.05, palette * 0.05
    result = solve(rewards, palette)
    assert result.feasible and result.kkt_residual <= 1e-9 and result.iterations <= 14
    assert result.lam.max() > 88
    p = np.exp(rewards.astype(float) @ result.lam - (rewards @ result.lam).max())
    p /= p.sum()
    assert (p @ rewards >= palette - 1e-9).all()
    assert result.ess == pytest.approx(1 / (p @ p), rel=1e-6)


@settings(max_examples=150)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 5), st.booleans(), st.booleans(), st.floats(0, 3))
def test_verdict_agrees_with_linear_programming(seed, n, m, whole, grouped, ask):
    rng = np.random.default_rng(seed)
    rewards = rng.integers(0, 4, (n, m)).astype(float) if whole else rng.normal(size=(n, m))
    groups = rng.integers(0, max(1, n // 4), n) if grouped else None
    palette = rewards.mean(axis=0) + ask * rng.random(m) * rewards.std(axis=0)
    result, room = solve(rewards, palette, groups=groups), slack(rewards, palette, groups)
    ids = np.zeros(n) if groups is None else groups
    within = np.sqrt(np.mean([rewards[ids == g].var(axis=0) for g in np.unique(ids)], axis=0))
    deviation = np.where(within > 1e-14, within, np.abs(rewards.mean(axis=0)) + (rewards.mean(axis=0) == 0))
    if result.feasible:
        assert room > -1e-7
        assert result.kkt_residual <= 1e-9
        assert (result.levels >= palette - 2e-9 * np.maximum(deviation, np.abs(palette))).all()
        return
    assert room < 1e-7
    # The certificate proves it: d >= 0 and no mixture scores d·c.
    d = result.certificate
    assert (d >= 0).all()
    farthest = np.mean([(rewards[ids == g] @ d).max() for g in np.unique(ids)])
    assert farthest < d @ palette
    # The nearest palette is reachable and asks no more anywhere; and no reachable point is nearer, because none lies
    # beyond the plane through it (with equality at the projection).
    assert slack(rewards, result.nearest, groups) > -1e-7 and solve(rewards, result.nearest, groups=groups).feasible
    assert (result.nearest <= palette + 1e-9).all()
    away = (palette - result.nearest) / deviation**2
    away /= np.abs(away).max()
    best = np.mean([(rewards[ids == g] @ away).max() for g in np.unique(ids)])
    assert best <= away @ result.nearest + 1e-7


def test_nearest_is_the_projection_by_hand():
    """A triangle with corners (0,0), (2,0), (0,2): what is reachable ends at x + y = 2."""
    rewards = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    result = solve(rewards, [1.5, 2.5])
    assert not result.feasible
    np.testing.assert_allclose(result.nearest, [0.5, 1.5], atol=1e-12)
    np.testing.assert_allclose(result.certificate / result.certificate[0], [1, 1], rtol=1e-9)
    assert np.isnan(result.lam).all() and np.isnan(result.kl) and np.isnan(result.levels).all()
    # to the right of a corner, the corner's own level in the other value does
    np.testing.assert_allclose(solve(rewards, [3.0, -1.0]).nearest, [2.0, -1.0], atol=1e-12)


@pytest.mark.parametrize("kind", ["corner", "edge", "largest level of one value"])
def test_palettes_on_the_very_edge_are_feasible(kind):
    rewards = np.vstack([np.random.default_rng(0).dirichlet(np.ones(3), 50) * 1.9, 2 * np.eye(3)])
    palette = {"corner": [2, 0, 0], "edge": [1, 1, 0], "largest level of one value": [2, -5, -5]}[kind]
    result = solve(rewards, palette)
    assert result.feasible and result.nearest is None
    assert result.kkt_residual <= 1e-9 and np.isfinite(result.lam).all()
    np.testing.assert_allclose(result.levels, np.maximum(palette, 0), atol=1e-8)


def test_lam_max_bounds_lambda_and_leaves_the_verdict():
    rewards = samples(300, 3)
    palette = quantile_palette(rewards, 0.75)
    free = solve(rewards, palette)
    bound = free.lam.max() / 2
    result = solve(rewards, palette, lam_max=bound)
    assert result.feasible and result.lam.max() == bound and result.kkt_residual <= 1e-9
    assert (result.levels < palette - 1e-3).any()
    lam, value = scipy_dual(rewards, palette, upper=bound)
    np.testing.assert_allclose(result.lam, lam, atol=1e-4)
    assert dual(result.lam, rewards, palette) <= value + 1e-12
    np.testing.assert_allclose(solve(rewards, palette, lam_max=10 * free.lam.max()).lam, free.lam, rtol=1e-6)
    # infeasible: the bounded dual has a minimum all the same
    beyond = solve(rewards, rewards.max(axis=0), lam_max=5.0)
    assert not beyond.feasible and beyond.nearest is not None
    assert np.isfinite(beyond.lam).all() and beyond.kkt_residual <= 1e-9 and beyond.kl > 0


@pytest.mark.parametrize("grouped", [False, True])
def test_many_rows_start_from_few(grouped):
    """The start on a part of the rows may only save passes, never change the answer."""
    rewards = samples(160_000, 4, 3, "bounded").astype(np.float32)
    groups = np.random.default_rng(0).permutation(np.arange(160_000) // 16) if grouped else None
    palette = quantile_palette(rewards, 0.6)
    result = solve(rewards, palette, groups=groups)
    assert result.feasible and result.kkt_residual <= 1e-9 and result.iterations <= 7
    # the gradient at λ, in float64 by the definition
    x, s = rewards.astype(float), rewards.astype(float) @ result.lam
    ids = np.zeros(len(x), int) if groups is None else groups
    weight = np.exp(s - s.max())
    p = weight / np.bincount(ids, weight)[ids] / len(np.unique(ids))
    np.testing.assert_allclose(p @ x, result.levels, atol=1e-11)
    active = result.lam > 0
    assert active.any()
    np.testing.assert_allclose((p @ x)[active], palette[active], atol=1e-8)


def test_infeasible_with_many_rows():
    rewards = samples(160_000, 3, 3).astype(np.float32)
    result = solve(rewards, quantile_palette(rewards, 0.99999))
    assert not result.feasible and (rewards @ result.certificate).max() < result.certificate @ quantile_palette(
        rewards, 0.99999
    )
    assert solve(rewards, result.nearest).feasible


def test_what_is_taken_and_what_is_copied():
    rewards = samples(100, 2).astype(np.float32)
    palette = rewards.mean(axis=0) + 0.2
    expected = solve(rewards, palette).lam
    tensor = torch.from_numpy(rewards).requires_grad_()
    for given_ in (tensor, tensor.double(), rewards.tolist(), np.asfortranarray(rewards), rewards[::-1]):
        np.testing.assert_allclose(solve(given_, torch.tensor(palette)).lam, expected, rtol=1e-5)
    assert np.shares_memory(as_rewards(tensor), rewards) and as_rewards(tensor).dtype == np.float32
    assert np.shares_memory(as_rewards(rewards[::2]), rewards)
    for narrow in (tensor.bfloat16(), tensor.half()):
        np.testing.assert_allclose(solve(narrow, palette).lam, expected, rtol=0.1)
    whole = np.array([[0], [1], [1]])
    assert solve(whole, [0.5]).lam[0] == 0


def test_runs_on_the_reference_too():
    import fastalign

    rewards, groups = samples(200, 3), np.arange(200) % 9
    palette = rewards.mean(axis=0) + 0.3
    expected = solve(rewards, palette, groups=groups).lam
    with fastalign.use_backend("reference"):
        np.testing.assert_allclose(solve(rewards, palette, groups=groups).lam, expected, rtol=1e-8)


GOOD = samples(20, 3)
BAD = GOOD.copy()
BAD[7, 2] = np.nan
INFINITE = GOOD.astype(np.float32)
INFINITE[0, 0] = -np.inf


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((BAD, np.zeros(3)), {}, UserError, "rewards must be finite, got nan in row 7, column 2"),
        ((INFINITE, np.zeros(3)), {}, UserError, "rewards must be finite, got -inf in row 0, column 0"),
        ((GOOD * 1e200, np.zeros(3)), {}, UserError, "rewards must have finite squares"),
        ((GOOD[0], np.zeros(3)), {}, UserError, r"rewards must have shape \(n, m\), got \(3,\)"),
        ((GOOD[:0], np.zeros(3)), {}, UserError, r"at least one sample and one reward, got shape \(0, 3\)"),
        ((GOOD[:, :0], np.zeros(0)), {}, UserError, r"at least one sample and one reward, got shape \(20, 0\)"),
        ((GOOD + 1j, np.zeros(3)), {}, TypeError, "rewards must be real numbers, got complex128"),
        ((GOOD, np.zeros(4)), {}, UserError, "one level for each of the 3 rewards, got 4"),
        ((GOOD, 0.5), {}, UserError, "one level for each of the 3 rewards"),
        ((GOOD, np.zeros((0, 3))), {}, UserError, "palette must"),
        ((GOOD, [0.0, np.nan, 0.0]), {}, UserError, "palette must be finite, got nan"),
        ((GOOD, np.zeros(3)), {"groups": np.zeros(19, int)}, UserError, r"groups must have shape \(20,\).*got \(19,\)"),
        ((GOOD, np.zeros(3)), {"groups": np.zeros(20)}, TypeError, "groups must be integers, got float64"),
        ((GOOD, np.zeros(3)), {"weights": np.ones(21)}, UserError, r"weights must have shape \(20,\).*got \(21,\)"),
        (
            (GOOD, np.zeros(3)),
            {"weights": -np.ones(20)},
            UserError,
            "weights must be finite and not negative, got -1.0 in row 0",
        ),
        ((GOOD, np.zeros(3)), {"weights": np.zeros(20)}, UserError, "weights must be positive in at least one row"),
        ((GOOD, np.zeros(3)), {"tol": 0}, UserError, "tol must lie between 0 and 1, got 0"),
        ((GOOD, np.zeros(3)), {"lam_max": -1.0}, UserError, "lam_max must be positive, got -1.0"),
    ],
)
def test_mistakes_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message) as caught:
        solve(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_quantile_palette():
    rewards = samples(1000, 4, 0, "skewed").astype(np.float32)
    mean, median = rewards.mean(axis=0, dtype=float), np.quantile(rewards, 0.5, axis=0)
    assert (median > mean).all()
    np.testing.assert_allclose(quantile_palette(rewards, 0.5), median, rtol=1e-6)
    np.testing.assert_allclose(quantile_palette(rewards, 0.1), mean, rtol=1e-12)
    some = quantile_palette(torch.from_numpy(rewards), 0.9, values=[1, 3])
    np.testing.assert_allclose(some[[0, 2]], mean[[0, 2]], rtol=1e-12)
    np.testing.assert_allclose(some[[1, 3]], np.quantile(rewards[:, [1, 3]], 0.9, axis=0), rtol=1e-6)
    assert some.dtype == np.float64


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((GOOD, 1.5), {}, "q must lie between 0 and 1, got 1.5"),
        ((GOOD, 70), {}, "q must lie between 0 and 1, got 70"),
        ((GOOD, 0.5), {"values": [3]}, "values must be column numbers from 0 to 2, got 3"),
        ((GOOD, 0.5), {"values": ["humor"]}, "values must be column numbers from 0 to 2, got 'humor'"),
        ((BAD, 0.5), {}, "rewards must be finite, got nan in row 7, column 2"),
    ],
)
def test_mistakes_in_a_quantile_palette(arguments, options, message):
    with pytest.raises(UserError, match=message):
        quantile_palette(*arguments, **options)


def test_a_solution_can_be_looked_at():
    import pandas as pd

    rewards = np.random.default_rng(0).normal(size=(200, 2))
    table = pd.DataFrame(rewards, columns=["kind", "short"])
    result = solve(table, [0.2, 0.3])
    assert result.values == ("kind", "short") and np.allclose(result.lam, solve(rewards, [0.2, 0.3]).lam, rtol=1e-9)
    header, names, first, second = repr(result).splitlines()
    assert header.startswith("PaletteSolution: feasible, KL ") and names.split() == ["λ", "target", "reached"]
    assert first.split()[::2] == ["kind", "0.2"] and second.split()[0] == "short"
    assert "<td>kind</td>" in result._repr_html_()
    beyond = solve(rewards, [9, 0.3], values=["<a>", "b"])
    assert "infeasible" in repr(beyond) and "nearest" in repr(beyond) and "&lt;a&gt;" in beyond._repr_html_()
    many = solve(rewards, np.full((12, 2), 0.1))
    assert (
        repr(many).startswith("PaletteSolution: 12 palettes of 2 values, 12 feasible")
        and len(repr(many).splitlines()) == 12
    )


@pytest.mark.parametrize("values", [["a"], ["a", "b", "c", "d"], "abc"])
def test_names_that_are_not_one_for_each_reward(values):
    rewards = np.random.default_rng(0).normal(size=(50, 3))
    with pytest.raises(UserError, match=r"^values must name each of the 3 rewards once, got "):
        solve(rewards, [0.0, 0.0, 0.0], values=values)
