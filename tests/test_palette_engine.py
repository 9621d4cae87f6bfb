"""The solver in the compiled engine against the same iteration in Python: one algorithm, written twice."""

import dataclasses
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from palette_problems import random_problem
from test_palette import samples

from fastalign import use_backend
from fastalign.palette import _engine, _small, quantile_palette, solve
from fastalign.palette._setup import pass_over


@pytest.fixture
def in_python(monkeypatch):
    """solve, with the iteration in Python."""

    def call(*arguments, **options):
        with monkeypatch.context() as patched:
            patched.setattr(_engine, "serves", lambda run, count: False)
            patched.setattr(_small, "keeps", lambda n, m: False)
            return solve(*arguments, **options)

    return call


def assert_same(found, expected, tolerance=1e-6, told=""):
    assert np.array_equal(found.feasible, expected.feasible), told
    for name in ("lam", "levels", "kl", "scaling"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), told
        if ours is not None:
            size = np.nanmax(np.abs(theirs), initial=0.0)
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * size, err_msg=f"{told} {name}")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("m", [1, 2, 4, 6, 7, 8, 9, 20])
def test_one_palette_of_any_width(in_python, m, dtype):
    rewards = samples(700 + m, m, m, "bounded").astype(dtype)
    weights = np.random.default_rng(m).random(len(rewards)) * (np.arange(len(rewards)) % 5 > 0)
    for options in ({}, {"weights": weights}, {"sense": "=="}, {"lam_max": 0.2}):
        palette = quantile_palette(rewards, 0.6 if m < 9 else 0.53)
        found = solve(rewards, palette, **options)
        assert found.kkt_residual <= 1e-9 and found.iterations <= 15
        assert_same(found, in_python(rewards, palette, **options))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_hard_problems_end_as_they_do_in_python(in_python, dtype):
    compared = 0
    for seed in range(5000, 5150):
        rewards, palette, senses, told = random_problem(seed, dtype)
        found, expected = (call(rewards, palette, sense=senses) for call in (solve, in_python))
        assert found.feasible == expected.feasible, told
        if not found.feasible:
            np.testing.assert_allclose(found.scaling, expected.scaling, rtol=1e-6, atol=1e-7, err_msg=told)
        elif found.unique and max(found.kkt_residual, expected.kkt_residual) <= 1e-9 and found.ess > 1.5:
            np.testing.assert_allclose(found.kl, expected.kl, rtol=1e-6, atol=1e-8, err_msg=told)
            compared += 1
    assert compared > 40


@pytest.mark.parametrize("kind, most", [("normal", 3.0), ("skewed", 0.8)])
def test_many_palettes_start_from_their_neighbours(in_python, kind, most):
    rewards = samples(900, 3, 2, kind).astype(np.float32)
    ask = np.random.default_rng(3).uniform(-0.3, most, (150, 3))
    palettes = rewards.mean(axis=0) + ask * rewards.std(axis=0)
    found = solve(rewards, palettes)
    assert_same(found, in_python(rewards, palettes))
    assert 20 < found.feasible.sum() < 150
    assert found.kkt_residual[found.feasible].max() <= 1e-9
    assert found.iterations[found.feasible].mean() < 7


LAWS = {
    "normal": lambda x: x,
    "bounded": np.tanh,
    "skewed": lambda x: -np.exp(0.8 * x),
    "heavy tails": lambda x: x**3,
    "scales and offsets": lambda x: 10.0 ** np.arange(-6, 6)[: x.shape[1]] * x + 30.0,
}


@pytest.mark.parametrize("options", ["", "weights", "==", "lam_max"])
@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("law", LAWS)
def test_many_palettes_from_a_series_are_those_solved_alone(law, m, options):
    rng = np.random.default_rng(m)
    rewards = LAWS[law](samples(6000, m, m))
    deviation = rewards.std(axis=0)
    palettes = rewards.mean(axis=0) + rng.uniform(-0.3, 0.7, (200, m)) * deviation
    options = {
        "": {},
        "weights": {"weights": rng.random(6000) * (rng.random(6000) > 0.2)},
        "==": {"sense": "=="},
        "lam_max": {"lam_max": 0.3 / deviation.max()},
    }[options]
    found = solve(rewards, palettes, **options)
    for k in range(0, 200, 25):
        alone = solve(rewards, palettes[k], **options)
        assert found.feasible[k] == alone.feasible
        if alone.feasible and np.isfinite(alone.lam).all():
            size = np.abs(alone.lam * deviation).max() + 1e-3
            np.testing.assert_allclose(found.lam[k] * deviation, alone.lam * deviation, atol=1e-7 * size)
            np.testing.assert_allclose([found.kl[k], found.ess[k]], [alone.kl, alone.ess], rtol=1e-6, atol=1e-9)
    if law in ("normal", "bounded") and not options:
        assert found.iterations.mean() < [2.1, 2.1, 3.6, 5][m - 1]


@pytest.mark.parametrize("m", [1, 3, 8, 11])
def test_offsets_of_float32_rewards_cost_no_digits(in_python, m):
    rewards = (24.5 + 1e-3 * samples(4000, m, m)).astype(np.float32)
    palette = rewards.mean(axis=0, dtype=np.float64) + 2e-4 * (np.arange(m) < 3)
    for found in (solve(rewards, palette), solve(rewards, np.tile(palette, (3, 1)))):
        assert found.kkt_residual.max() <= 1e-9 and found.iterations.max() <= 15
        np.testing.assert_allclose(np.atleast_2d(found.lam)[0], in_python(rewards, palette).lam, rtol=1e-6)


def test_many_rows_are_read_few_times(in_python):
    rewards = samples(140_000, 6, 1, "bounded").astype(np.float32)
    palette = quantile_palette(rewards, 0.6, values=[0, 1, 2])
    found = solve(rewards, palette)
    assert found.kkt_residual <= 1e-9 and found.iterations <= 6
    assert_same(found, in_python(rewards, palette), 1e-8)


@pytest.mark.parametrize("rows, count", [(700, 20), (140_000, 1)])
def test_same_bits_at_any_number_of_threads(rows, count):
    rewards = samples(rows, 4, 1).astype(np.float32)
    palettes = np.array([quantile_palette(rewards, q) for q in np.linspace(0.5, 0.62, count)])
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(solve(rewards, palettes))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for field in dataclasses.fields(other):
            np.testing.assert_array_equal(getattr(found[0], field.name), getattr(other, field.name))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no such call")
def test_solves_side_by_side_leave_every_thread_its_processors():
    rewards = samples(140_000, 4, 1).astype(np.float32)
    palette = quantile_palette(rewards, 0.6)
    expected = solve(rewards, palette)
    allowed = os.sched_getaffinity(0)
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: solve(rewards, palette), range(12)):
            np.testing.assert_array_equal(found.lam, expected.lam)
        threads = [int(name) for name in os.listdir("/proc/self/task")]
        assert all(os.sched_getaffinity(thread) == allowed for thread in threads)


def test_every_instruction_set():
    from fastalign import _C

    code = (
        "import numpy as np; from fastalign.palette import solve, _engine, quantile_palette\n"
        "for m in (1, 3, 6, 8, 11):\n"
        "    x = np.random.default_rng(m).normal(size=(1003, m)).astype(np.float32); c = quantile_palette(x, 0.55)\n"
        "    serves = _engine.serves; found = solve(x, np.stack([c, 0.9 * c])); _engine.serves = lambda *_: False\n"
        "    want = solve(x, np.stack([c, 0.9 * c])); _engine.serves = serves\n"
        "    np.testing.assert_allclose(solve(x, c).lam, want.lam[0], rtol=1e-8)\n"
        "    np.testing.assert_allclose(found.lam, want.lam, rtol=1e-8); assert found.kkt_residual.max() <= 1e-9\n"
        "from fastalign import _C; print(_C.active_isa())"
    )
    for isa in _C.available_isas():
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "FASTALIGN_ISA": isa}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == isa


@pytest.mark.parametrize("m", [1, 2, 6, 20, 64])
@pytest.mark.parametrize("sense", [">=", "<=", "=="])
def test_a_small_solve_is_the_long_one(monkeypatch, m, sense):
    rewards = samples(2000, m, 2).astype(np.float32)
    palette = rewards.mean(axis=0) + {">=": 0.2, "<=": -0.2, "==": 0.01}[sense] * rewards.std(axis=0) * (
        np.arange(m) < 3
    )
    found = solve(torch.from_numpy(rewards), palette, sense=sense)
    assert _small.solve_small(rewards, palette, sense, 1e-9) is not None
    monkeypatch.setattr(_small, "keeps", lambda n, m: False)
    expected = solve(rewards, palette, sense=sense)
    for field in dataclasses.fields(found):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        assert type(ours) is type(theirs), field.name
        if ours is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-9, err_msg=field.name)


def test_what_is_out_of_the_ordinary_goes_the_long_way():
    rewards = samples(300, 3, 2).astype(np.float32)
    level = rewards.mean(axis=0)
    assert _small.solve_small(rewards, level + 100, ">=", 1e-9) is None  # out of reach
    assert _small.solve_small(rewards, level[None], ">=", 1e-9) is None
    assert _small.solve_small(np.vstack([rewards, [[np.nan] * 3]]), level, ">=", 1e-9) is None
    assert (
        _small.solve_small(np.hstack([rewards, rewards[:, :1]]), [*level, level[0]], ">=", 1e-9) is None
    )  # twice the same
    assert _small.solve_small(np.hstack([rewards, np.ones((300, 1))]), [*level, 1.0], ">=", 1e-9) is None  # constant
    with use_backend("reference"):
        assert _small.solve_small(rewards, level, ">=", 1e-9) is None


def test_what_the_engine_serves():
    rewards = samples(100, 3)
    assert _engine.serves(pass_over(rewards, None, None), 1) and _engine.serves(pass_over(rewards, None, None), 100)
    assert not _engine.serves(pass_over(rewards, np.arange(100) // 5, None), 1)
    assert not _engine.serves(pass_over(np.zeros((5, 65)), None, None), 1)
    with use_backend("reference"):
        assert not _engine.serves(pass_over(rewards, None, None), 1)
