"""Several rewards as one, by reference and in Python."""

import json

import numpy as np
import pytest

from fastalign import UserError, rewards
from fastalign.decode import Candidates
from fastalign.rewards import references

OWN = """
def length(prompts, responses):
    return [float(len(text)) for text in responses]

def vowels(prompts, responses):
    return [float(sum(letter in "aeiou" for letter in text)) for text in responses]
"""
PROMPTS, TEXTS = ["p"] * 4, ["a", "tree", "sky", "aeiouaeiou"]
LENGTH, VOWELS = np.array([1.0, 4, 3, 10]), np.array([1.0, 2, 0, 10])
BOTH = np.stack([LENGTH, VOWELS], axis=1)


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    empty = [[[]] * 4]
    scores = {"length": LENGTH[None]}  # the other one is scored
    Candidates(["p"], [TEXTS], empty, empty, rewards=scores).to_parquet("base.parquet")
    return tmp_path


Z = (BOTH - BOTH.mean(0)) / BOTH.std(0)
RANKS = np.array([[0.125, 0.625, 0.375, 0.875], [0.375, 0.625, 0.125, 0.875]]).T


@pytest.mark.parametrize(
    ("reference", "name", "expected"),
    [
        ("mean[{}]", "mean", BOTH.mean(1)),
        ("worst[{}]", "worst", BOTH.min(1)),
        ("safe=worst[{}]", "safe", BOTH.min(1)),
        ("lcb[{}, c=0.5]", "lcb", BOTH.mean(1) - 0.5 * BOTH.std(1)),
        ("worst[{}, base=base.parquet]", "worst", Z.min(1)),
        ("rank[{}, base=base.parquet]", "rank", RANKS.mean(1)),
        ("mean[worst[{}],lcb[{}]]", "mean", (BOTH.min(1) + BOTH.mean(1) - BOTH.std(1)) / 2),
    ],
)
def test_each_kind(here, reference, name, expected):
    reference = reference.replace("{}", "mine.py:length,mine.py:vowels")
    assert references.names([reference, "diversity"]) == [name, "diversity"]
    assert rewards.parse(reference).name == name
    np.testing.assert_allclose(rewards.score([reference], PROMPTS, TEXTS)[:, 0], expected, rtol=1e-6)
    assert set(references.contents([reference])) == {"mine.py", *["base.parquet"] * ("base=" in reference)}


@pytest.mark.parametrize("names", [("prompt", "text"), ("question", "answer"), ("prompt", "completion")])
def test_the_base_is_a_file_of_anybody(here, names):
    rows = [dict(zip(names, pair, strict=True)) for pair in zip(PROMPTS, TEXTS, strict=True)]
    (here / "base.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = rewards.score(["worst[mine.py:length,mine.py:vowels,base=base.jsonl]"], PROMPTS, TEXTS)
    np.testing.assert_allclose(found[:, 0], Z.min(1), rtol=1e-6)


def test_in_python():
    members = [rewards.from_function(lambda p, r: LENGTH[: len(r)], "a"), rewards.get("diversity")]
    base = np.array([[0.0, 0.0], [2.0, 1.0]])
    made = rewards.ensemble(members, "worst", base=base, name="safe")
    diverse = rewards.score(["diversity"], PROMPTS, TEXTS)[:, 0]
    np.testing.assert_allclose(made(PROMPTS, TEXTS), np.minimum(LENGTH - 1, (diverse - 0.5) * 2), rtol=1e-6)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("worst[]", "must hold references, as in worst[positive,harmless]"),
        ("worst[nope,diversity]", "unknown reward 'nope'"),
        ("lcb[diversity]", "lcb must be of two rewards at least, got 1"),
        ("lcb[diversity,readability,c=-1]", "c must be a number >= 0, got -1"),
        ("rank[diversity]", "rank needs base, a file of candidates"),
        ("mean[diversity,base=lists.jsonl]", "must have the column diversity (`fastalign score`), or a text a row"),
        ("mean[diversity,base=words.jsonl]", "words.jsonl: row 0: diversity must be a number, got 'much'"),
        ("mean[diversity,base=none.parquet]", "none.parquet: no such file of candidates"),
        ("mean[diversity,base=base.parquet]", "reward 'diversity' is 0 for every text of base"),
    ],
)
def test_mistakes(here, reference, message):
    (here / "lists.jsonl").write_text('{"prompt": "p", "text": ["a", "b"]}')
    (here / "words.jsonl").write_text('{"prompt": "p", "text": "a", "diversity": "much"}')
    with pytest.raises((UserError, FileNotFoundError)) as caught:
        rewards.score(reference, PROMPTS, TEXTS)
    assert message in str(caught.value) and "\n" not in str(caught.value)
