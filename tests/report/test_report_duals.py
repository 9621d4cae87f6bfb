"""Both duals side by side: the example of docs/mathematics/duals.md, and that the reports show what was solved."""

import re

import numpy as np
import pytest
from test_pareto_report import NAMES, rewards
from test_report import make, page

from fastalign import palette as palettes
from fastalign.palette import quantile_palette
from fastalign.report.duals import both
from fastalign.report.pareto_html import page as pareto_page
from fastalign.report.study import study

BY_HAND = np.array([[[0.0], [0.0]], [[0.0], [1.0]]])


def test_the_example_in_the_docs():
    within, at_once = both(BY_HAND, np.array([0.4]))
    assert (within.form, at_once.form) == ("per_prompt", "joint") and within.feasible and at_once.feasible
    assert within.lam[0] == pytest.approx(np.log(4), rel=1e-8) and at_once.lam[0] == pytest.approx(np.log(2), rel=1e-8)
    assert within.kl == pytest.approx((np.log(2) + 0.8 * np.log(0.8) + 0.2 * np.log(0.2)) / 2, rel=1e-8)
    assert at_once.kl == pytest.approx(0.4 * np.log(1.6) + 0.6 * np.log(0.8), rel=1e-8)
    assert (round(within.kl, 3), round(at_once.kl, 3)) == (0.096, 0.054)
    assert within.decoded[0] == pytest.approx(0.4) and at_once.decoded[0] == pytest.approx(1 / 3)
    assert within.levels[0] == pytest.approx(0.4) and at_once.levels[0] == pytest.approx(0.4)
    # The prompts' law under the joint policy is 2/5, 3/5.
    assert within.prompts_kl == 0
    assert at_once.prompts_kl == pytest.approx(0.4 * np.log(0.8) + 0.6 * np.log(1.2), rel=1e-8)
    within, at_once = both(BY_HAND, np.array([0.9]))
    assert at_once.feasible and not within.feasible and within.lam is None
    assert within.scaling == pytest.approx((0.5 - 0.25) / (0.9 - 0.25))


def test_alike_prompts_make_the_duals_one():
    one = np.random.default_rng(0).normal(size=(1, 30, 2))
    within, at_once = both(np.repeat(one, 4, axis=0), one.mean(axis=(0, 1)) + 0.3)
    np.testing.assert_allclose(within.lam, at_once.lam, rtol=1e-7)
    assert within.kl == pytest.approx(at_once.kl) and at_once.prompts_kl == pytest.approx(0, abs=1e-12)


def test_the_joint_kl_is_its_two_parts_and_no_more_than_the_other():
    x = np.random.default_rng(1).normal(size=(7, 20, 2)) + np.random.default_rng(2).normal(size=(7, 1, 2))
    within, at_once = both(x, x.mean(axis=(0, 1)) + [0.5, -0.2], [">=", "=="])
    assert at_once.kl < within.kl
    weights = np.exp(x @ at_once.lam)
    shares = weights.sum(axis=1) / weights.sum()
    law = weights / weights.sum(axis=1, keepdims=True)
    inside = (shares * (law * np.log(law * 20)).sum(axis=1)).sum()
    assert at_once.kl == pytest.approx(at_once.prompts_kl + inside, rel=1e-6)
    np.testing.assert_allclose(at_once.decoded, np.einsum("pn,pnm->m", law, x) / 7, rtol=1e-9)


@pytest.mark.parametrize("dual", ["per_prompt", "joint"])
def test_the_report_shows_both(dual, tmp_path):
    result, a = make(p=6, n=24, m=3, dual=dual)
    text = page(result, tmp_path)
    table = re.search(r"<table class='duals'>.*?</table>", text, re.DOTALL).group(0)
    flat = a["rewards"].reshape(-1, 3)
    for groups in (None, np.repeat(np.arange(6), 24)):
        solution = palettes.solve(flat, a["palette"]["palette"], groups=groups)
        assert f"{solution.kl:.3f}" in table
        assert all(f"<td>{lam:.3g}</td>" in table for lam in solution.lam)
    own = result.to_json()["duals"][dual == "joint"]
    assert own["lambda"] == pytest.approx(a["palette"]["lambda"], rel=1e-6) and own["form"] == dual
    single, _ = make(p=1, n=24, m=2)
    assert single.duals == () and "Both duals" not in page(single, tmp_path)


def test_the_pareto_page_shows_both_for_each_palette():
    x = rewards(6, 16, 2)
    flat = x.reshape(-1, 2)
    requested = {"a <b>": quantile_palette(flat, 0.6), "far": x.max(axis=(0, 1)) - 0.05}
    result = study(NAMES[:2], x, palettes=requested, n_lam=20)
    text = pareto_page(result, {})
    assert text.count("<table class='duals'>") == 2 and "<h3>a &lt;b&gt;</h3>" in text and "<b></h3>" not in text
    assert "of the way" in text
    rows = result.to_json()["palettes"][0]["duals"]
    assert [row["form"] for row in rows] == ["per_prompt", "joint"]
    assert rows[0]["kl"] == pytest.approx(result.palettes["a <b>"].policies.kl[-1], rel=1e-5)
    assert study(NAMES[:2], x[:1], palettes=requested, n_lam=20).duals == {}
