"""What the training commands read: candidates of other programs, λ of a palette for rewards by reference."""

import json

import numpy as np
import pytest

from fastalign import UserError
from fastalign._base import outputs
from fastalign.cli.train import _values_and_lam
from fastalign.data import preferences
from fastalign.jobs import distill, preference

ROWS = [
    {"ask": f"question {i}", "say": text, "short": -float(len(text)), "kind": float(j)}
    for i in range(2)
    for j, text in enumerate(("a longer answer", "brief", "an answer"))
]


@pytest.fixture
def theirs(tmp_path):
    path = tmp_path / "theirs.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


NAMED = {"prompt_column": "ask", "response_column": "say"}


def test_pairs_of_candidates_of_another_program(theirs, tmp_path):
    made = preference.read_pairs(theirs, lam={"short": 1.0}, **NAMED)
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in made] == [
        (f"question {i}", "brief", "a longer answer") for i in range(2)
    ]
    each = preference.read_pairs(theirs, values=["short", "kind"], **NAMED)
    assert [(row["value"], row["chosen"]) for row in each][::2] == [("short", "brief"), ("kind", "an answer")]
    usual = tmp_path / "usual.jsonl"
    usual.write_text(
        "\n".join(json.dumps({"prompt": r["ask"], "response": r["say"], "short": r["short"]}) for r in ROWS)
    )
    assert len(preference.read_pairs(usual, lam=[1.0])) == 2
    with pytest.raises(UserError, match=r"has no column 'asked', it has ask, say"):
        preference.read_pairs(theirs, lam=[1.0], prompt_column="asked")


def test_weighted_candidates_of_another_program(theirs):
    rows = distill.read_rows(theirs, lam={"short": 0.5}, **NAMED)
    assert [row["completions"] for row in rows] == [["a longer answer", "brief", "an answer"]] * 2
    np.testing.assert_allclose(rows[0]["weights"], np.exp(0.5 * (np.array([-15, -5, -9]) + 5)))


def test_lam_of_a_palette_for_rewards_by_reference(tmp_path):
    palette = {"kind": "palette", "version": 1, "values": ["brief", "diversity"], "lambda": [0.5, 0.25]}
    path = tmp_path / "palette.json"
    path.write_text(json.dumps(palette))
    values, lam = _values_and_lam("diversity,brief=mine.py:short", None, path)
    assert values == ["diversity", "brief=mine.py:short"] and lam == {"brief": 0.5, "diversity": 0.25}
    assert _values_and_lam(None, None, path) == (["brief", "diversity"], [0.5, 0.25])
    with pytest.raises(UserError, match="give either lam, or palette"):
        _values_and_lam(None, "1,1", path)


def test_pairs_that_are_there_twice_and_ties_are_told(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(outputs, "say", said.append)
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, [row, row, {**row, "prompt": "q"}])))
    assert len(preferences.load(tmp_path / "pairs.jsonl")) == 3
    assert said == [f"{tmp_path / 'pairs.jsonl'}: 1 of 3 pairs are there more than once; they are kept"]
    ranked = [
        {"prompt": "p", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
        {"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 1}]},
    ]
    (tmp_path / "nectar.jsonl").write_text("\n".join(map(json.dumps, ranked)))
    assert len(preferences.load(tmp_path / "nectar.jsonl")) == 1
    assert said[1:] == [f"{tmp_path / 'nectar.jsonl'}: 1 tie left out"]
