"""λ steered by a policy's own levels: it ends where the dual has its minimum, on policies so small that everything is
known."""

import json

import numpy as np
import pytest
import torch
from enumerable import law, sampler

from fastalign import UserError
from fastalign.losses import group_advantages
from fastalign.palette import solve
from fastalign.train.steering import Baselines, Rule, Steering


def problem(seed=0, outcomes=60, values=3):
    """Probabilities (n,) and rewards (n, m) of every outcome, the rewards correlated and of unlike scales."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(outcomes))
    rewards = rng.normal(size=(outcomes, values)) @ rng.normal(size=(values, values)) * [1.0, 20.0, 0.05]
    return p, rewards


def moments(p, rewards):
    mean = p @ rewards
    apart = rewards - mean
    return mean, apart.T @ (p[:, None] * apart)


def tilted(p, rewards, lam):
    scores = np.log(p) + rewards @ lam
    q = np.exp(scores - scores.max())
    return q / q.sum()


CASES = {
    "two raised": ([0.8, 0.5, None], [">=", ">=", ">="]),
    "a slack bound": ([0.9, -2.0, -3.0], [">=", ">=", ">="]),
    "at most": ([-0.4, None, 0.5], ["<=", ">=", ">="]),
    "exactly": ([0.3, None, -0.2], ["==", ">=", "=="]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("begin", ["zero", "wrong"])
def test_a_policy_that_follows_at_once(case, begin):
    amounts, sense = CASES[case]
    p, rewards = problem()
    mean, covariance = moments(p, rewards)
    free = [amount is None for amount in amounts]
    palette = mean + np.array([amount or 0.0 for amount in amounts]) * np.sqrt(np.diag(covariance))
    levels = np.where(free, rewards.min(axis=0), palette)
    wanted = solve(rewards, levels, weights=p, sense=sense)
    assert wanted.feasible
    side = np.array([{">=": 1, "<=": -1, "==": 0}[each] for each in sense])
    start = np.zeros(3) if begin == "zero" else np.where(side == 0, 1, side) * 2.0 / np.sqrt(np.diag(covariance))
    steering = Steering(levels, sense, np.where(free, 0.0, start), free=free)
    for _ in range(600):
        steering.update(*moments(tilted(p, rewards, steering.lam), rewards))
    np.testing.assert_allclose(steering.lam, wanted.lam, rtol=1e-3, atol=1e-6 * np.abs(wanted.lam).max())


def test_a_policy_that_learns_by_gradient_ends_within_one_percent():
    """Logits of every outcome follow the gradient of E[λ·R] - KL to the base, three steps for each of λ's."""
    p, rewards = problem(3)
    mean, covariance = moments(p, rewards)
    palette = mean + 0.6 * np.sqrt(np.diag(covariance)) * [1, 1, 0]
    wanted = solve(rewards, palette, weights=p)
    steering = Steering(palette, [">="] * 3, np.zeros(3), rule=Rule())
    logits = np.log(p)
    for i in range(1000):
        for _ in range(3):
            q = np.exp(logits - logits.max())
            q /= q.sum()
            gain = rewards @ steering.lam - (np.log(q) - np.log(p))
            logits = logits + 0.02 * (gain - q @ gain)  # natural gradient
        steering.update(*moments(q, rewards))
        if i > 60:
            assert (np.abs(steering.lam) < 1.3 * np.abs(wanted.lam).max()).all()  # not wound up while the policy lagged
    np.testing.assert_allclose(steering.lam, wanted.lam, rtol=1e-2, atol=1e-2 * np.abs(wanted.lam).max())
    np.testing.assert_allclose(np.abs(q - tilted(p, rewards, wanted.lam)).sum(), 0, atol=1e-2)


def test_a_step_is_bounded_and_a_state_goes_on():
    p, rewards = problem(1)
    mean, covariance = moments(p, rewards)
    far = mean + 50 * np.sqrt(np.diag(covariance))
    steering = Steering(far, [">="] * 3, np.zeros(3))
    step = steering.update(mean, covariance)
    assert np.sqrt(step @ covariance @ step) == pytest.approx(steering.rule.limit)
    other = Steering(far, [">="] * 3, np.zeros(3))
    other.restore(json.loads(json.dumps(steering.state())))
    np.testing.assert_array_equal(other.update(mean, covariance), steering.update(mean, covariance))


def test_it_holds_only_when_every_level_does():
    steering = Steering([1.0, 0.0], [">=", "<="], [0.1, -0.1], rule=Rule(hold=4))
    rng = np.random.default_rng(0)
    for _ in range(4):
        steering.update(np.array([1.5, 0.4]) + 0.01 * rng.normal(size=2), np.eye(2))
    assert not steering.holds  # the second is above
    for _ in range(3):
        steering.update(np.array([1.5, -0.4]) + 0.01 * rng.normal(size=2), np.eye(2))
    assert not steering.holds  # one of the last four is
    steering.update(np.array([1.5, -0.4]), np.eye(2))
    assert steering.holds


def test_a_policy_that_falls_short_of_p_lambda_is_driven_further():
    """Towards the levels that were asked for, not towards the λ that p_λ would need."""
    p, rewards = problem(2)
    mean, covariance = moments(p, rewards)
    palette = mean + 0.5 * np.sqrt(np.diag(covariance))
    wanted = solve(rewards, palette, weights=p)
    steering = Steering(palette, [">="] * 3, wanted.lam)
    for _ in range(500):
        steering.update(*moments(tilted(p, rewards, steering.lam / 2), rewards))
    np.testing.assert_allclose(steering.lam, 2 * wanted.lam, rtol=1e-3, atol=1e-3 * np.abs(wanted.lam).max())


def test_a_constant_value_moves_nothing():
    steering = Steering([1.0, 0.5], [">=", ">="], [0.0, 0.0])
    lam = steering.update(np.array([0.0, 0.0]), np.diag([1.0, 0.0]))
    assert np.isfinite(lam).all() and lam[0] > 0
    with pytest.raises(UserError, match="one weight per level"):
        Steering([1.0], [">="], [0.0, 0.0])


def test_baselines_take_out_which_prompts_a_batch_has():
    of = {"a": np.array([0.0, 10.0]), "b": np.array([4.0, 20.0])}
    baselines = Baselines(of, np.array([2.0, 15.0]))
    rewards = np.array([[[0.5, 11.0], [1.5, 11.0]]])
    np.testing.assert_allclose(baselines.levels(["a"], rewards), [3.0, 16.0])
    np.testing.assert_allclose(baselines.levels(["b"], rewards + [4.0, 10.0]), [3.0, 16.0])
    np.testing.assert_allclose(baselines.levels(["c"], rewards), [1.0, 11.0])


def test_at_p_lambda_no_completion_has_an_advantage():
    """With the KL in the reward: λ·R less log p_λ/p0 is log Z for every text."""
    texts, p = law(sampler().model)
    rewards = np.array([[len(ids), ids.count(0)] for ids in texts], dtype=np.float64)
    lam = np.array([0.3, 0.7])
    q = tilted(p, rewards, lam)
    log_ratio = np.log(q) - np.log(p)
    group = torch.tensor(np.concatenate([rewards, log_ratio[:, None]], axis=1))[None]
    advantages = group_advantages(group, weights=torch.tensor([*lam, -1.0]), how="rloo")
    np.testing.assert_allclose(advantages.numpy(), 0, atol=1e-9)
