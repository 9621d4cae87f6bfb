"""The MAP solve, per prompt and joint, against scipy's L-BFGS-B, cvxpy with Clarabel and the 150 Adam steps of the
paper's code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fastalign.bench.map_peers import (
    adam,
    candidates,
    cvxpy_clarabel,
    lbfgsb_per_prompt,
    out_of_reach_by_highs,
    residual,
    samples,
    scipy_lbfgsb,
    within,
)

from fastalign.palette import quantile_palette, solve

pytestmark = pytest.mark.map
LBFGSB, ONE_BY_ONE = "scipy L-BFGS-B", "scipy L-BFGS-B, one by one"
CLARABEL, ADAM = "cvxpy + Clarabel", "150 Adam steps"


@pytest.mark.parametrize(
    ("prompts", "n", "m", "bar", "rounds"),
    [
        pytest.param(10_000, 100, 6, 20, 5, id="solve per prompt, 10,000 prompts x 100, m = 6"),
        pytest.param(2_000, 100, 6, 14, 5, id="solve per prompt, 2,000 prompts x 100, m = 6"),
        # what `fastalign demo` solves
        pytest.param(16, 32, 3, None, 50, id="solve per prompt, 16 prompts x 32, m = 3"),
    ],
)
def test_per_prompt(compare, prompts, n, m, bar, rounds):
    rewards, groups = candidates(prompts, n, m)
    starts, wide = np.arange(0, len(rewards), n), rewards.astype(np.float64)
    palette = rewards.mean(axis=0, dtype=np.float64) + 0.5 * within(rewards, groups) * (np.arange(m) < 3)

    def check():
        ours, theirs = solve(rewards, palette, groups=groups), lbfgsb_per_prompt(wide, palette, starts)
        assert ours.kkt_residual <= 1e-9
        np.testing.assert_allclose(ours.lam, theirs, atol=1e-5 * (1 + ours.lam.max()))

    compare(
        lambda: solve(rewards, palette, groups=groups),
        {LBFGSB: lambda: lbfgsb_per_prompt(wide, palette, starts)},
        bars={} if bar is None else {LBFGSB: bar},
        check=check,
        rounds=rounds,
    )


@pytest.mark.parametrize(
    ("prompts", "n", "m"), [pytest.param(200, 100, 3, id="solve per prompt, 200 prompts x 100, m = 3, 1,000 palettes")]
)
def test_per_prompt_many_palettes(compare, prompts, n, m):
    rewards, groups = candidates(prompts, n, m)
    starts, wide = np.arange(0, len(rewards), n), rewards.astype(np.float64)
    palettes = around(rewards, 1000, within(rewards, groups))
    compare(
        lambda: solve(rewards, palettes, groups=groups),
        {ONE_BY_ONE: lambda: [lbfgsb_per_prompt(wide, one, starts) for one in palettes]},
        bars={ONE_BY_ONE: 60},
        check=lambda: agree_on_many(rewards, palettes, lambda x, c: lbfgsb_per_prompt(x, c, starts), groups),
        rounds=3,
    )


@pytest.mark.parametrize(("n", "m"), [pytest.param(1_000_000, 6, id="solve, joint, n = 1,000,000, m = 6")])
def test_joint_many_samples(compare, n, m):
    rewards = samples(n, m)
    palette, wide = quantile_palette(rewards, 0.7, values=[0, 1, 2]), rewards.astype(np.float64)
    compare(
        lambda: solve(rewards, palette),
        {LBFGSB: lambda: scipy_lbfgsb(wide, palette)},
        bars={LBFGSB: 25},
        check=lambda: agree(rewards, palette, 1e-3, scipy_lbfgsb),
        rounds=5,
    )


# As many as MAP's authors publish.
@pytest.mark.parametrize(("n", "m"), [pytest.param(2312, 6, id="solve, joint, n = 2,312, m = 6")])
def test_joint_few_samples(compare, n, m):
    rewards = samples(n, m)
    palette, wide = quantile_palette(rewards, 0.6, values=[0, 1, 2]), rewards.astype(np.float64)
    compare(
        lambda: solve(rewards, palette),
        {LBFGSB: lambda: scipy_lbfgsb(wide, palette), ADAM: lambda: adam(rewards, palette)},
        bars={LBFGSB: 6},
        check=lambda: agree(rewards, palette, 1e-4, scipy_lbfgsb),
        rounds=50,
    )


@pytest.mark.parametrize(
    ("n", "m"),
    [pytest.param(2312, 6, id="a palette out of reach, joint, n = 2,312, m = 6: verdict, proof, nearest")],
)
def test_joint_out_of_reach(compare, n, m):
    rewards = samples(n, m)
    palette, wide = 0.9 * rewards.max(axis=0), rewards.astype(np.float64)

    def check():
        assert bool(solve(rewards, palette).feasible) != out_of_reach_by_highs(wide, palette)

    compare(
        lambda: solve(rewards, palette),
        {"scipy linprog (HiGHS), the verdict alone": lambda: out_of_reach_by_highs(wide, palette)},
        check=check,
        rounds=20,
    )


@pytest.mark.parametrize(("n", "m"), [pytest.param(20_000, 3, id="solve, joint, n = 20,000, m = 3")])
def test_joint_against_cvxpy(compare, n, m):
    pytest.importorskip("cvxpy")
    rewards = samples(n, m)
    palette, wide = quantile_palette(rewards, 0.7), rewards.astype(np.float64)
    compare(
        lambda: solve(rewards, palette),
        {
            CLARABEL: lambda: cvxpy_clarabel(rewards, palette),
            LBFGSB: lambda: scipy_lbfgsb(wide, palette),
            ADAM: lambda: adam(rewards, palette),
        },
        bars={CLARABEL: 500},
        check=lambda: agree(rewards, palette, 1e-4, cvxpy_clarabel, scipy_lbfgsb, adam),
        rounds=5,
    )


@pytest.mark.parametrize(("n", "m"), [pytest.param(20_000, 3, id="solve, joint, n = 20,000, m = 3, 1,000 palettes")])
def test_joint_many_palettes(compare, n, m):
    rewards = samples(n, m)
    palettes, wide = around(rewards, 1000, rewards.std(axis=0, dtype=np.float64)), rewards.astype(np.float64)
    compare(
        lambda: solve(rewards, palettes),
        {ONE_BY_ONE: lambda: [scipy_lbfgsb(wide, one) for one in palettes]},
        check=lambda: agree_on_many(rewards, palettes, scipy_lbfgsb),
        rounds=3,
    )


@pytest.mark.parametrize(("n", "m"), [pytest.param(10_000_000, 6, id="solve, joint, n = 10,000,000, m = 6")])
def test_joint_ten_million_samples(compare, n, m):
    rewards = samples(n, m)
    palette, peer = quantile_palette(rewards, 0.7, values=[0, 1, 2]), "one sum over the data, numpy"
    compare(
        lambda: solve(rewards, palette),
        {
            peer: lambda: rewards.sum(dtype=np.float64),
            "one sum over the data, torch": lambda: torch.from_numpy(rewards).sum(),
        },
        bars={peer: 1 / 12},
        check=lambda: of_own(rewards, palette),
        rounds=5,
    )


@pytest.mark.parametrize(("n", "m"), [pytest.param(10_000_000, 64, id="solve, joint, n = 10,000,000, m = 64")])
def test_joint_ten_million_samples_of_many_values(compare, n, m):
    rewards, palette = many_values(n, m)
    compare(
        lambda: solve(rewards, palette),
        {"one sum over the data, torch": lambda: torch.from_numpy(rewards).sum()},
        check=lambda: of_own(rewards, palette),
        rounds=1,
    )


def many_values(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples (2.6 GB for ten million of 64 rewards), generated a tenth at a time; a palette that raises eight
    values."""
    rng, mix = np.random.default_rng(0), np.eye(m) + 0.05 * np.random.default_rng(1).normal(size=(m, m))
    rewards = np.empty((n, m), dtype=np.float32)
    for part in np.split(rewards, 10):
        np.matmul(rng.standard_normal(part.shape, dtype=np.float32), mix.astype(np.float32), out=part)
        np.tanh(part[:, ::2], out=part[:, ::2])
    ask = 0.3 * part.std(axis=0, dtype=np.float64) * (np.arange(m) < 8)
    return rewards, rewards[: n // 10].mean(axis=0, dtype=np.float64) + ask


def around(rewards: np.ndarray, count: int, deviation: np.ndarray) -> np.ndarray:
    """Palettes from slightly below the mean to 0.7 standard deviations above it, drawn independently for each value."""
    ask = np.random.default_rng(1).uniform(-0.2, 0.7, (count, rewards.shape[1]))
    return rewards.mean(axis=0, dtype=np.float64) + ask * deviation


def agree_on_many(rewards: np.ndarray, palettes: np.ndarray, peer, groups=None) -> None:
    result = solve(rewards, palettes, groups=groups)
    assert result.feasible.all() and result.kkt_residual.max() <= 1e-9
    for k in range(0, len(palettes), 100):
        theirs = peer(rewards.astype(np.float64), palettes[k])
        np.testing.assert_allclose(result.lam[k], theirs, atol=1e-4 * (1 + result.lam[k].max()))


def agree(rewards: np.ndarray, palette: np.ndarray, tolerance: float, *peers) -> str:
    """Compares with the first peer; reports all residuals."""
    result = solve(rewards, palette)
    theirs = [peer(rewards, palette) for peer in peers]
    residuals = [residual(rewards, palette, lam) for lam in (result.lam, *theirs)]
    np.testing.assert_allclose(result.lam, theirs[0], atol=tolerance * (1 + result.lam.max()))
    assert residuals[0] <= min(2e-9, residuals[1])
    lines = [f"{peer.__name__} {x:.0e}" for peer, x in zip(peers, residuals[1:], strict=True)]
    return ", ".join([f"KKT residual ours {residuals[0]:.0e} in {result.iterations} passes", *lines])


def of_own(rewards: np.ndarray, palette: np.ndarray) -> str:
    """The solver's own residual, if the definition in float64 would take too much time and memory."""
    result = solve(rewards, palette)
    assert result.kkt_residual <= 1e-9
    return f"KKT residual {result.kkt_residual:.0e} by its own account, in {result.iterations} passes"
