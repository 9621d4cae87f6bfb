"""Senses, certificates, degenerate rewards, and the same dual in another package."""

import numpy as np
import pytest
from test_palette import dual, samples, slack

from fastalign import UserError
from fastalign.palette import quantile_palette, solve

# Entropy balancing by Google's empirical_calibration 0.12 (Apache 2.0): 16 units are weighted to the mean of others.
# python -c "import numpy as np, empirical_calibration as ec; print(ec.calibrate(covariates=X,
#   target_covariates=np.array([[.4, -.3], [.2, .1], [.5, -.2]]), objective=ec.Objective.ENTROPY))"
COVARIATES = np.array([
    [0.126, -0.132], [0.64, 0.105], [-0.536, 0.362], [1.304, 0.947], [-0.704, -1.265], [-0.623, 0.041],
    [-2.325, -0.219], [-1.246, -0.732], [-0.544, -0.316], [0.412, 1.043], [-0.129, 1.366], [-0.665, 0.352],
    [0.903, 0.094], [-0.743, -0.922], [-0.458, 0.22], [-1.01, -0.209],
])  # fmt: skip
CALIBRATED = [
    0.07958951090721121, 0.16751583420537522, 0.0037717130673696037, 0.10784146059147391, 0.17037399676226458,
    0.006933627763862521, 0.00014946261273353638, 0.010025256771477014, 0.02175830944219504, 0.007862189230525715,
    0.0008034877307388742, 0.0027492045992163743, 0.346499723611525, 0.06262548749113483, 0.006726342432458353,
    0.004774392780754476,
]  # fmt: skip


def policy(rewards, lam):
    score = rewards @ lam
    p = np.exp(score - score.max())
    return p / p.sum()


def test_equalities_are_entropy_balancing():
    result = solve(COVARIATES, [1.1 / 3, -0.4 / 3], sense="==")
    np.testing.assert_allclose(policy(COVARIATES, result.lam), CALIBRATED, atol=1e-6)
    np.testing.assert_allclose(result.levels, [1.1 / 3, -0.4 / 3], atol=1e-12)
    assert (result.lam < 0).any() and result.kl > 0


@pytest.mark.parametrize("grouped", [False, True])
def test_each_value_has_its_own_sense(grouped):
    rewards = samples(400, 4)
    groups = np.arange(400) // 20 if grouped else None
    palette = rewards.mean(axis=0) + np.array([0.2, -0.2, -0.1, 0.5]) * rewards.std(axis=0)
    result = solve(rewards, palette, sense=[">=", "<=", "==", "<="], groups=groups)
    assert result.feasible and result.kkt_residual <= 1e-9
    assert result.lam[0] > 0 > result.lam[1] and result.lam[2] != 0 and result.lam[3] == 0
    np.testing.assert_allclose(result.levels[:3], palette[:3], atol=1e-8)
    assert result.levels[3] < palette[3]
    # a value asked to be at most is its negative asked to be at least; one exactly, both at once
    turned = np.c_[rewards[:, 0], -rewards[:, 1], rewards[:, 2], -rewards[:, 2], -rewards[:, 3]]
    both = solve(turned, [palette[0], -palette[1], palette[2], -palette[2], -palette[3]], groups=groups)
    np.testing.assert_allclose(both.lam[[0, 1]], [result.lam[0], -result.lam[1]], rtol=1e-7)
    assert both.lam[2] - both.lam[3] == pytest.approx(result.lam[2], rel=1e-7)
    assert both.kl == pytest.approx(result.kl, rel=1e-9)


def test_infeasible_in_every_sense():
    rewards = samples(300, 2)
    for sense, palette, signs in (
        ("<=", [-9.0, 0.0], [-1, -1]),
        ("==", [0.0, 9.0], [0, 0]),
        (">=", [0.0, 9.0], [1, 1]),
    ):
        result = solve(rewards, palette, sense=sense)
        assert not result.feasible and (result.certificate * signs >= 0).all()
        assert (rewards @ result.certificate).max() < result.certificate @ palette
        assert solve(rewards, result.nearest, sense=sense).feasible


def test_largest_scaling_by_hand():
    """A triangle with corners (0,0), (2,0), (0,2), whose mean is (2/3, 2/3): what is reachable ends at x + y = 2."""
    rewards = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    # mean + t (5/6, 11/6): the sum 4/3 + 8/3 t is 2 at t = 1/4
    assert solve(rewards, [1.5, 2.5]).scaling == pytest.approx(0.25, abs=1e-12)
    assert solve(rewards, [1.0, 1.0]).scaling is None
    both = solve(rewards, [[1.5, 2.5], [1.0, 1.0]])
    assert both.scaling[0] == pytest.approx(0.25) and np.isnan(both.scaling[1])


@pytest.mark.parametrize("grouped", [False, True])
def test_largest_scaling_is_on_the_edge(grouped):
    rewards = samples(300, 4, 2, "skewed")
    groups = np.arange(300) // 30 if grouped else None
    palette, mean = quantile_palette(rewards, 0.99), rewards.mean(axis=0)
    result = solve(rewards, palette, groups=groups)
    assert 0 < result.scaling < 1
    assert abs(slack(rewards, mean + result.scaling * (palette - mean), groups)) < 1e-8


def test_the_duality_gap_bounds_the_kl():
    rewards = samples(300, 3)
    palette = quantile_palette(rewards, 0.7)
    result = solve(rewards, palette)
    rough = solve(rewards, palette, tol=1e-2)
    assert abs(result.duality_gap) < 1e-12 < abs(rough.duality_gap)
    for each in (result, rough):
        assert each.duality_gap == pytest.approx(each.kl + dual(each.lam, rewards, palette), abs=1e-12)
        assert each.duality_gap == pytest.approx(each.lam @ (each.levels - palette), abs=1e-12)


def test_what_is_nearly_infeasible_is_flagged():
    rewards = samples(2000, 2, 0, "bounded")
    easy, hard = solve(rewards, quantile_palette(rewards, 0.6)), solve(rewards, 0.99 * rewards.max(axis=0))
    assert easy.feasible and not easy.nearly_infeasible
    assert hard.feasible and hard.nearly_infeasible and hard.ess < 30
    # in every prompt down to one candidate, though there are many prompts
    groups = np.arange(2000) // 2
    assert solve(rewards, rewards.mean(axis=0) + 0.05, groups=groups).nearly_infeasible
    assert not solve(rewards[:4], rewards[:4].mean(axis=0) - 1).nearly_infeasible


@pytest.mark.parametrize("case", ["duplicate", "scaled", "sum", "opposite"])
def test_collinear_rewards_get_the_least_lambda(case):
    rewards = samples(200, 3)
    rewards[:, 2] = {
        "duplicate": rewards[:, 0],
        "scaled": 5 * rewards[:, 0],
        "sum": rewards[:, 0] + rewards[:, 1],
        "opposite": -rewards[:, 0],
    }[case]
    sense = ["==", ">=", "=="] if case == "opposite" else ">="
    deviation = rewards.std(axis=0)
    target = policy(rewards, np.array([0.5, 0.4, 0.0])) @ rewards
    result = solve(rewards, target, sense=sense)
    assert result.feasible and not result.unique and result.kkt_residual <= 1e-9
    mu = result.lam * deviation
    # moving along the flat direction in either sense makes |μ| no smaller, within the bounds
    flat = {"duplicate": [1, 0, -1], "scaled": [5, 0, -1], "sum": [1, 1, -1], "opposite": [1, 0, 1]}[case] * deviation
    flat = np.array(flat) / np.linalg.norm(flat)
    np.testing.assert_allclose((rewards @ (flat / deviation)).std(), 0, atol=1e-9)
    for t in (-1e-3, 1e-3):
        moved = mu + t * flat
        allowed = case == "opposite" or (moved >= 0).all()
        assert not allowed or moved @ moved > mu @ mu
    assert solve(rewards[:, :2], target[:2]).unique
    if case == "duplicate":  # half each, and the whole is what one of them would get
        np.testing.assert_allclose(result.lam, [0.25, 0.4, 0.25], rtol=1e-7)
    # a duplicate that is asked for less does not bind, and leaves nothing open
    if case == "duplicate":
        less = solve(rewards, target - [0, 0, 0.1])
        assert less.unique and less.lam[2] == 0
        np.testing.assert_allclose(less.lam[:2], [0.5, 0.4], rtol=1e-7)


@pytest.mark.parametrize(
    "sense, message",
    [
        (">", "sense must be '>=', '<=' or '==', got '>'"),
        ([">=", "=="], "or one for each of the 3 rewards, got 2"),
        ([">=", "==", 1], "sense must be '>=', '<=' or '==', got 1"),
    ],
)
def test_mistakes_in_a_sense(sense, message):
    with pytest.raises(UserError, match=message):
        solve(samples(20, 3), np.zeros(3), sense=sense)


def test_lam_max_bounds_both_signs():
    rewards = samples(300, 2)
    result = solve(rewards, rewards.mean(axis=0) - 1.0, sense="==", lam_max=0.1)
    np.testing.assert_allclose(result.lam, [-0.1, -0.1])
    assert result.feasible and result.kkt_residual <= 1e-9


@pytest.mark.parametrize("sense", [">=", "mixed"])
def test_a_path_of_palettes_is_what_each_gives_alone(sense):
    """Many palettes go through Newton's steps together and start from their neighbours' answers."""
    rewards, rng = samples(300, 3, 1, "bounded"), np.random.default_rng(0)
    sense = [">=", "<=", "=="] if sense == "mixed" else sense
    ask = np.linspace(0, 2, 160)[:, None] * rng.uniform(0.2, 1.2, 3) * ([1, -1, 1] if len(sense) == 3 else 1)
    palettes = rewards.mean(axis=0) + ask * rewards.std(axis=0)
    result = solve(rewards, palettes, sense=sense)
    alone = [solve(rewards, palette, sense=sense) for palette in palettes]
    assert result.feasible.tolist() == [each.feasible for each in alone]
    assert 10 < result.feasible.sum() < 160
    reached = result.feasible
    np.testing.assert_allclose(result.lam, [each.lam for each in alone], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(result.kl, [each.kl for each in alone], atol=1e-9)
    assert result.kkt_residual[reached].max() <= 1e-9
    np.testing.assert_allclose(
        result.scaling[~reached], [each.scaling for each in alone if not each.feasible], rtol=1e-6
    )
    assert result.iterations[reached].sum() < 0.8 * sum(each.iterations for each in alone if each.feasible)
