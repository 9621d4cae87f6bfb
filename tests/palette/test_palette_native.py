"""The compiled Newton against the same iteration in Python: one algorithm, written twice; per prompt and joint."""

import dataclasses
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from palette_problems import random_problem, random_problem_of_prompts
from test_palette import samples
from turns import on_its_day

from fastalign import use_backend
from fastalign.palette import native, quantile_palette, solve
from fastalign.palette.setup import pass_over


@pytest.fixture
def in_python(monkeypatch):
    """solve, with the iteration in Python."""

    def call(*arguments, **options):
        with monkeypatch.context() as patched:
            patched.setattr(native, "serves", lambda run: False)
            return solve(*arguments, **options)

    return call


def assert_same(found, expected, tolerance=1e-6, label=""):
    assert np.array_equal(found.feasible, expected.feasible), label
    for name in ("lam", "levels", "kl", "scaling"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), label
        if ours is not None:
            size = np.nanmax(np.abs(theirs), initial=0.0)
            np.testing.assert_allclose(
                ours, theirs, rtol=tolerance, atol=tolerance * size + 1e-14, err_msg=f"{label} {name}"
            )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("m", [1, 2, 4, 6, 7, 8, 9, 20])
def test_one_palette_of_any_width(in_python, m, dtype):
    rewards = samples(700 + m, m, m, "bounded").astype(dtype)
    weights = np.random.default_rng(m).random(len(rewards)) * (np.arange(len(rewards)) % 5 > 0)
    groups = np.random.default_rng(m).integers(0, 7, len(rewards))
    for options in (
        {},
        {"weights": weights},
        {"sense": "=="},
        {"lam_max": 0.2},
        {"groups": groups},
        {"groups": np.sort(groups)},
        {"groups": groups, "weights": weights + 1e-3},
        {"groups": groups, "sense": "==", "lam_max": 0.2},
    ):
        palette = quantile_palette(rewards, 0.6 if m < 8 or (m == 8 and "groups" not in options) else 0.53)
        result = solve(rewards, palette, **options)
        assert result.kkt_residual <= 1e-9 and result.iterations <= 15
        assert_same(result, in_python(rewards, palette, **options))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("problem", [random_problem, random_problem_of_prompts])
def test_hard_problems_end_as_they_do_in_python(in_python, problem, dtype):
    compared = 0
    for seed in range(5000, 5150):
        rewards, palette, senses, message, *groups = problem(seed, dtype)
        options = {"sense": senses, "groups": groups[0] if groups else None}
        result, expected = (call(rewards, palette, **options) for call in (solve, in_python))
        assert result.feasible == expected.feasible, message
        if not result.feasible:
            np.testing.assert_allclose(result.scaling, expected.scaling, rtol=1e-6, atol=1e-7, err_msg=message)
        elif result.unique and max(result.kkt_residual, expected.kkt_residual) <= 1e-9 and result.ess > 1.5:
            np.testing.assert_allclose(result.kl, expected.kl, rtol=1e-6, atol=1e-8, err_msg=message)
            compared += 1
    assert compared > 40


@pytest.mark.parametrize("prompts", [None, 18])
@pytest.mark.parametrize("kind, most", [("normal", 3.0), ("skewed", 0.8)])
def test_many_palettes_start_from_their_neighbours(in_python, kind, most, prompts):
    rewards = samples(900, 3, 2, kind).astype(np.float32)
    groups = None if prompts is None else np.arange(900) % prompts
    ask = np.random.default_rng(3).uniform(-0.3, most, (150, 3))
    palettes = rewards.mean(axis=0) + ask * rewards.std(axis=0)
    result = solve(rewards, palettes, groups=groups)
    assert_same(result, in_python(rewards, palettes, groups=groups))
    assert 20 < result.feasible.sum() < 150
    assert result.kkt_residual[result.feasible].max() <= 1e-9
    assert result.iterations[result.feasible].mean() < 7


LAWS = {
    "normal": lambda x: x,
    "bounded": np.tanh,
    "skewed": lambda x: -np.exp(0.8 * x),
    "heavy tails": lambda x: x**3,
    "scales and offsets": lambda x: 10.0 ** np.arange(-6, 6)[: x.shape[1]] * x + 30.0,
}


@pytest.mark.parametrize("options", ["", "weights", "==", "lam_max", "groups"])
@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("law", LAWS)
def test_many_palettes_are_those_solved_alone(law, m, options):
    rng = np.random.default_rng(m)
    rewards = LAWS[law](samples(6000, m, m))
    deviation = rewards.std(axis=0)
    palettes = rewards.mean(axis=0) + rng.uniform(-0.3, 0.7, (200, m)) * deviation
    options = {
        "": {},
        "weights": {"weights": rng.random(6000) * (rng.random(6000) > 0.2)},
        "==": {"sense": "=="},
        "lam_max": {"lam_max": 0.3 / deviation.max()},
        "groups": {"groups": rng.integers(0, 60, 6000)},
    }[options]
    result = solve(rewards, palettes, **options)
    for k in range(0, 200, 25):
        alone = solve(rewards, palettes[k], **options)
        assert result.feasible[k] == alone.feasible
        if alone.feasible and np.isfinite(alone.lam).all():
            size = np.abs(alone.lam * deviation).max() + 1e-3
            np.testing.assert_allclose(result.lam[k] * deviation, alone.lam * deviation, atol=1e-7 * size)
            np.testing.assert_allclose([result.kl[k], result.ess[k]], [alone.kl, alone.ess], rtol=1e-6, atol=1e-9)
    if law in ("normal", "bounded") and not options:
        assert result.iterations.mean() < [3.5, 4.5, 5, 5.5][m - 1]


@pytest.mark.parametrize("m", [1, 3, 8, 11])
def test_offsets_of_float32_rewards_cost_no_digits(in_python, m):
    rewards = (24.5 + 1e-3 * samples(4000, m, m)).astype(np.float32)
    palette = rewards.mean(axis=0, dtype=np.float64) + 2e-4 * (np.arange(m) < 3)
    for result in (solve(rewards, palette), solve(rewards, np.tile(palette, (3, 1)))):
        assert result.kkt_residual.max() <= 1e-9 and result.iterations.max() <= 15
        np.testing.assert_allclose(np.atleast_2d(result.lam)[0], in_python(rewards, palette).lam, rtol=1e-6)


@pytest.mark.parametrize("candidates", [None, 70, 5000])
def test_many_rows_are_read_few_times(in_python, candidates):
    rewards = samples(600_000, 6, 1, "bounded").astype(np.float32)
    groups = None if candidates is None else np.arange(len(rewards)) // candidates
    palette = quantile_palette(rewards, 0.6, values=[0, 1, 2])
    result = solve(rewards, palette, groups=groups)
    assert result.kkt_residual <= 1e-9 and result.iterations <= 5
    assert_same(result, in_python(rewards, palette, groups=groups), 1e-8)


@pytest.mark.parametrize("prompts", [None, 30])
@pytest.mark.parametrize("rows, count", [(6000, 20), (140_000, 1)])
def test_same_bits_at_any_number_of_threads(rows, count, prompts):
    rewards = samples(rows, 4, 1).astype(np.float32)
    groups = None if prompts is None else np.sort(np.random.default_rng(0).integers(0, prompts, rows))
    palettes = np.array([quantile_palette(rewards, q) for q in np.linspace(0.5, 0.62, count)])
    before = torch.get_num_threads()
    try:
        result = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result.append(solve(rewards, palettes, groups=groups))
    finally:
        torch.set_num_threads(before)
    for other in result[1:]:
        for field in dataclasses.fields(other):
            np.testing.assert_array_equal(getattr(result[0], field.name), getattr(other, field.name))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no such call")
def test_solves_side_by_side_leave_every_thread_its_processors():
    rewards = samples(140_000, 4, 1).astype(np.float32)
    palette = quantile_palette(rewards, 0.6)
    expected = solve(rewards, palette)
    allowed = os.sched_getaffinity(0)
    with ThreadPoolExecutor(3) as pool:
        for result in pool.map(lambda _: solve(rewards, palette), range(12)):
            np.testing.assert_array_equal(result.lam, expected.lam)
        threads = [int(name) for name in os.listdir("/proc/self/task")]
        assert all(os.sched_getaffinity(thread) == allowed for thread in threads)


@on_its_day("levels: palettes")
def test_every_instruction_set():
    from fastalign import _C

    code = (
        "import numpy as np; from fastalign.palette import solve, native, quantile_palette\n"
        "for m in (1, 3, 6, 8, 11):\n"
        "    x = np.random.default_rng(m).normal(size=(1003, m)).astype(np.float32); c = quantile_palette(x, 0.55)\n"
        "    for groups in (None, np.arange(1003) // 17):\n"
        "        serves = native.serves; found = solve(x, np.stack([c, 0.9 * c]), groups=groups)\n"
        "        native.serves = lambda _: False; want = solve(x, np.stack([c, 0.9 * c]), groups=groups)\n"
        "        native.serves = serves; assert found.kkt_residual.max() <= 1e-9\n"
        "        np.testing.assert_allclose(found.lam, want.lam, rtol=1e-8)\n"
        "from fastalign import _C; print(_C.active_isa())"
    )
    for isa in _C.available_isas():
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "FASTALIGN_ISA": isa}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == isa


def test_what_is_served():
    rewards = samples(100, 3)
    for groups in (None, np.arange(100) // 5):
        assert native.serves(pass_over(rewards, groups, None))
    assert not native.serves(pass_over(np.zeros((5, 65)), None, None))
    with use_backend("reference"):
        assert not native.serves(pass_over(rewards, None, None))
