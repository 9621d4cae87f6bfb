"""Errors and intervals are those of independent units, and of one unit there are none."""

import json

import numpy as np
import pytest
from commands import fastalign
from scipy.stats import binom

from fastalign import palette
from fastalign._base.error_bars import plus_minus, standard_error, wilson
from fastalign.decode import Candidates, estimate
from fastalign.jobs import ppo as several_values
from fastalign.report import reward
from fastalign.soup.front import SoupFront


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(2, 2, 0.342, 1.0), (0, 5, 0.0, 0.434), (8, 10, 0.490, 0.943), (81, 263, 0.255, 0.366)],
)
def test_wilson_is_that_of_the_textbooks(right, n, low, high):
    assert wilson(right / n, n) == pytest.approx((low, high), abs=6e-4)


@pytest.mark.parametrize("n", [5, 20, 100])
@pytest.mark.parametrize("p", [0.5, 0.8, 0.95])
def test_wilson_covers(n, p):
    inside = [low <= p <= high for low, high in (wilson(k / n, n) for k in range(n + 1))]
    assert binom.pmf(np.arange(n + 1), n, p) @ inside > 0.87  # 0.95 on average over p; less at some


def test_wilson_of_nothing_is_everything():
    assert wilson(0.0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("error", "count", "message"),
    [
        (0.03, 12, "0.500 ± 0.030"),
        (0.0, 1, "0.500 ± n/a (1 prompt)"),
        (np.nan, 1, "0.500 ± n/a (1 prompt)"),
        (None, 0, "0.500 ± n/a (0 prompts)"),
    ],
)
def test_plus_minus(error, count, message):
    assert plus_minus(0.5, error, count) == message


def test_standard_error_is_of_the_units():
    x = np.random.default_rng(0).normal(size=(3, 5, 2))
    np.testing.assert_allclose(standard_error(x, axis=1), x.std(axis=1, ddof=1) / np.sqrt(5))
    assert standard_error(x[:, :1], axis=1).shape == (3, 2) and np.isnan(standard_error(x[:, :1], axis=1)).all()


ONE = np.random.default_rng(1).normal(size=(1, 16, 2))  # of one prompt


@pytest.mark.parametrize(
    "errors",
    [
        lambda: estimate(ONE, [0.1, 0.1], warn=False).stderr,
        lambda: SoupFront(["a", "b"], ["m"], np.ones((1, 1)), ONE.mean(axis=1)[None], np.ones(2), 16).stderr,
        lambda: palette.standard_errors(ONE[0], [0.5, 0.5], groups=np.zeros(16, dtype=int)).levels,
        lambda: palette.standard_errors(ONE[0, :1], [0.5, 0.5]).levels,
    ],
)
def test_one_prompt_has_no_error(errors):
    assert np.isnan(errors()).all()


def test_held_out_prompts_one_a_fold_have_errors():
    R = np.random.default_rng(2).normal(size=(6, 50, 1)) + np.random.default_rng(3).normal(size=(6, 1, 1))
    result = palette.held_out(R.reshape(-1, 1), [R.mean() + 0.1], groups=np.arange(300) // 50, folds=6)
    assert result.error[0] == pytest.approx(R.mean(axis=1).std(ddof=1) / np.sqrt(6), rel=0.3)


def test_a_run_of_one_step_has_no_error():
    rows = [{"values": {"v": 1.0}, "kl": 0.0, "tokens_per_second": 1.0}] * 3
    assert several_values.summary(rows, ["v"])["values"]["v"]["last"] == [1.0, None]


@pytest.mark.parametrize(("prompts", "n"), [(None, 6), (["a", "a", "b", "b", "b", "b"], 2)])
def test_accuracy_is_as_sure_as_its_prompts(prompts, n):
    (head,) = reward.build(np.ones((6, 1)), np.zeros((6, 1)), ["v"], prompts=prompts).heads
    assert (head.accuracy, head.pairs, head.prompts) == (1.0, 6, n) and (head.low, head.high) == wilson(1.0, n)
    assert head.low < 0.7 and "± 0.000" not in json.dumps(
        reward.build(np.ones((6, 1)), np.zeros((6, 1)), ["v"]).to_json()
    )


def test_the_commands_print_it_and_write_no_nan(tmp_path):
    texts = [[f"text {j}" for j in range(16)]]
    whole = Candidates(["a prompt"], texts, [[[]] * 16], [[[]] * 16]).with_rewards(["a", "b"], ONE[0])
    whole.to_parquet(tmp_path / "scored.parquet")

    def run(*arguments):
        code, out, err = fastalign(*arguments)
        assert code == 0, err
        return " ".join(out.split())

    files = {name: tmp_path / name for name in ("p.json", "s.parquet", "e.json", "g.json")}
    assert "at most" in run(
        "map", tmp_path / "scored.parquet", "--palette", "a=mean,b=mean+0.2sd", "--out", files["p.json"]
    )
    out = run("select", tmp_path / "scored.parquet", "--palette", files["p.json"], "--out", files["s.parquet"])
    assert out.count("± n/a (1 prompt)") == 2 and "nan" not in out
    out = run(
        "eval",
        tmp_path / "scored.parquet",
        "--selected",
        files["s.parquet"],
        "--palette",
        files["p.json"],
        "--out",
        files["e.json"],
    )
    assert out.count("± n/a (1 prompt)") == 2
    assert [row["se"] for row in json.loads(files["e.json"].read_text())["values"]] == [None, None]
    out = run("eval", tmp_path / "scored.parquet", "--lam-grid", "a=0:1:2", "--out", files["g.json"])
    assert "± n/a (1 prompt)" in out and "nan" not in out
    for name in ("p.json", "e.json", "g.json"):
        assert "NaN" not in files[name].read_text()


def test_a_value_of_no_pairs_is_null(tmp_path):
    result = reward.build(np.ones((3, 1)), np.zeros((3, 1)), ["v"], preference=np.zeros((3, 1)))
    row = json.loads(json.dumps(result.to_json(), allow_nan=False))["values"][0]
    assert row["pairs"] == 0 and all(row[name] is None for name in ("accuracy", "low", "high", "log_loss"))
    pytest.importorskip("matplotlib")
    result.write(tmp_path / "r.html")
    assert "n/a (0 pairs)" in (tmp_path / "r.html").read_text()
