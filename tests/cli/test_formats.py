"""Files of candidates are written in the format that their name says, and one that says another is refused."""

import csv
import json

import numpy as np
import pytest
from commands import fastalign, refused

from fastalign._base import tables
from fastalign.data.conversations import Conversation
from fastalign.decode import Candidates, elsewhere

PROMPTS = ["the cat, sat", 'a "dog"\nran', "why", "é ü"]
NOTED, PLAIN = [".parquet", ".arrow", ".feather", ""], [".csv", ".jsonl"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [[f'{prompt} {j},\n"{j % 3}"' for j in range(8)] for prompt in PROMPTS]
    tokens, logprobs = [[[[1, 2]] * 8] * 4, [[[-0.5, -1.0]] * 8] * 4]
    candidates = Candidates(PROMPTS, texts, tokens, logprobs)
    candidates.to_parquet("candidates.parquet")
    scored = candidates.with_rewards(["a", "b"], np.random.default_rng(0).normal(size=(32, 2)))
    scored.to_parquet("scored.parquet")
    assert fastalign("map", "scored.parquet", "--quantile", "0.6", "--out", "palette.json")[0] == 0
    return tmp_path


def content(path):
    """The format by the file's own beginning, and its rows."""
    head = path.read_bytes()[:6]
    if head == b"ARROW1" or head[:4] == b"PAR1":
        return "arrow" if head == b"ARROW1" else "parquet", tables.read(path).to_pylist()
    if head[:1] == b"{":
        return "jsonl", [json.loads(line) for line in path.read_text().splitlines()]
    with open(path, newline="") as file:
        return "csv", list(csv.DictReader(file))


@pytest.mark.parametrize("suffix", NOTED + PLAIN)
def test_each_command_writes_what_the_name_says(work, suffix):
    kind = {"": "parquet", ".feather": "arrow"}.get(suffix, suffix[1:])
    score = ["score", "candidates.parquet", "--rewards", "diversity,readability", "--out", f"s{suffix}"]
    select = ["select", "scored.parquet", "--palette", "palette.json", "--k", 2, "--out", f"p{suffix}"]
    for command, count in ((score, 32), (select, 8)):
        code, _, err = fastalign(*command)
        assert code == 0, err
        found, rows = content(work / command[-1])
        assert (found, len(rows)) == (kind, count)
        again = fastalign(*command)
        if suffix in NOTED:
            assert again[0] == 0 and "already there" in again[2]
        else:
            assert "exists, and such a file does not say how it was made; --overwrite replaces it" in again[2]
            assert fastalign(*command, "--overwrite")[0] == 0
    whole = elsewhere.read(work / f"s{suffix}", kind="scored")
    want = Candidates.from_parquet("candidates.parquet")
    assert (whole.prompts, whole.texts) == (want.prompts, want.texts) and list(whole.rewards) == [
        "diversity",
        "readability",
    ]


@pytest.mark.parametrize("suffix", [".arrow", ".feather"])
def test_the_whole_chain_in_arrow(work, suffix):
    def run(*arguments):
        code, _, err = fastalign(*arguments)
        assert code == 0, err

    run("score", "candidates.parquet", "--rewards", "diversity,readability", "--out", f"s{suffix}")
    run("map", f"s{suffix}", "--palette", "readability=q40,rest=free", "--out", "m.json")
    run("select", f"s{suffix}", "--palette", "m.json", "--out", f"p{suffix}")
    run("eval", f"s{suffix}", "--selected", f"p{suffix}", "--palette", "m.json", "--out", "e.json")
    assert json.loads((work / "e.json").read_text())["kind"] == "report"


def test_conversations_stay_conversations(work):
    talk = Conversation([{"role": "user", "content": "why"}, {"role": "assistant", "content": "be"}])
    empty = [[[], []], [[], []]]
    whole = Candidates([talk, "how"], [["a", "b"], ["c", "d"]], empty, empty, rewards={"x": np.eye(2)})
    for suffix in NOTED + PLAIN:
        whole.save(work / f"t{suffix}")
        read = elsewhere.read(work / f"t{suffix}", kind="scored")
        assert read.prompts == [talk, "how"] and read.prompts[0].messages == talk.messages
        np.testing.assert_array_equal(read.rewards["x"], np.eye(2))
    assert elsewhere.from_rows(whole.to_pandas()).prompts[0].messages == talk.messages


SAMPLE = ["sample", "--model", "none", "--prompts", "bundled"]
MAP = ["map", "scored.parquet", "--quantile", "0.6"]
EVAL = ["eval", "scored.parquet", "--palette", "palette.json", "--selected", "p.parquet"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["score", "candidates.parquet", "--rewards", "diversity", "--out", "s.xlsx"], "--out must end in .parquet"),
        (["select", "scored.parquet", "--palette", "palette.json", "--out", "s.txt"], "or .jsonl, got 's.txt'"),
        ([*SAMPLE, "--out", "c.json"], "--out must end in .parquet or .arrow or .feather or .csv or .jsonl"),
        ([*SAMPLE, "--method", "particles", "--palette", "palette.json", "--out", "c.csv"],
         "--out must end in .parquet or .arrow or .feather, got 'c.csv'"),
        (["sample", "--more", 2, "--out", "c.jsonl"], "--out must end in .parquet or .arrow or .feather, got"),
        ([*MAP, "--out", "palette.csv"], "--out must end in .json, got 'palette.csv'"),
        ([*EVAL, "--out", "e.html"], "--out must end in .json, got 'e.html'"),
        ([*EVAL, "--out", "e.json", "--html", "e.json2"], "--html must end in .html or .htm, got 'e.json2'"),
        (["eval", "scored.parquet", "--lam-grid", "a=1", "--out", "e.csv"], "--out must end in .json, got 'e.csv'"),
        ([*EVAL[:-1], "p.jsonl", "--out", "e.json"],
         "p.jsonl: must be a Parquet or Arrow file of `fastalign select`, which says which candidates were selected; a "
         ".jsonl file does not"),
        (["reward-bench", "x.jsonl", "--rewards", "diversity", "--out", "r.csv"], "--out must end in .json, got"),
    ],
)  # fmt: skip
def test_a_name_that_says_another_format_is_refused(work, command, message):
    before = sorted(work.iterdir())
    assert message in refused(*command)
    assert sorted(work.iterdir()) == before
