"""The solver against exact arithmetic on random problems. FASTALIGN_PALETTE_PROBLEMS=2000 runs them all."""

import os

import numpy as np
import pytest
from palette_problems import (
    deviations,
    exact_slack,
    mixtures,
    precise_lambda,
    random_problem,
    random_problem_of_prompts,
)

from fastalign.palette import solve

TOL = 1e-9
COUNT = int(os.environ.get("FASTALIGN_PALETTE_PROBLEMS", "100"))


@pytest.mark.slow_matrix
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("first", range(0, COUNT, 50))
@pytest.mark.parametrize("problem", [random_problem, random_problem_of_prompts])
def test_verdict_and_lambda_are_exact(problem, first, dtype):
    for seed in range(first, min(first + 50, COUNT)):
        check(*problem(seed, dtype))


def check(rewards, palette, senses, label, groups=None):
    result = solve(rewards, palette, sense=senses, groups=groups)
    rewards = rewards.astype(np.float64)
    unit = deviations(rewards, groups)
    corners = rewards if groups is None else mixtures(rewards, groups)
    slack = lambda levels: exact_slack(corners, levels, senses, unit)  # noqa: E731
    room = slack(palette)
    assert result.feasible == (room >= -TOL), f"{label}: slack {room:g}"
    signs = np.array([{">=": 1, "<=": -1, "==": 0}[s] for s in senses])
    if not result.feasible:
        d = result.certificate
        assert (d * signs >= 0).all() and np.isfinite(result.nearest).all(), label
        assert ((corners - palette) @ d).max() < 0, label
        assert slack(result.nearest) > -1e-8, label
        assert 0 <= result.scaling <= 1, label
        mean = corners.mean(axis=0)
        assert abs(slack(mean + result.scaling * (palette - mean))) < 1e-7, label
        return
    assert all(np.isfinite(x).all() for x in (result.lam, result.levels, result.kl, result.ess)), label
    assert (result.lam * signs >= 0).all(), label
    assert result.kkt_residual <= TOL or room < 1e-6, f"{label}: residual {result.kkt_residual:g}, slack {room:g}"
    if room < 1e-6 or not result.unique:
        return
    exact, left, last = precise_lambda(rewards, palette, senses, result.lam, groups)
    # At the mean λ is 0 but for the rounding of the palette: which values bind is then rounding too.
    assert left < 1e-12, f"{label}: support of λ is wrong, {left:g}"
    if last > 1e-9 * (1 + np.abs(exact).max()):
        return
    np.testing.assert_allclose(
        result.lam * unit, exact, rtol=1e-6, atol=1e-6 * np.abs(exact).max() + 1e-12, err_msg=label
    )
