"""Rewards measured on files of correct and wrong answers."""

import json

import numpy as np
import pytest
from commands import fastalign, refused
from tiny import tiny_tokenizer

from fastalign.report import best_of

OWN = """
def value(prompts, responses):
    return [float(text.split()[-1]) for text in responses]

def wrong(prompts, responses):
    return [-float(text.split()[-1]) for text in responses]
"""
ROWS = [  # an answer ends in its score
    ("math", "1", ["a 3"], ["b 2", "c 1", "d 0"]),
    ("math", "2", ["a 1"], ["b 2", "c 1", "d 0"]),
    ("math", "3", ["a 2"], ["b 2", "c 1", "d 0"]),  # half
    ("focus", "4", ["a 9"], ["b 2", "c 1", "d 0"]),
    ("ties", "ref:1", ["a 5"], ["b 2", "c 1"]),
    ("ties", "tied:1", ["a 5", "b 4"], ["c 2", "d 1"]),
    ("ties", "ref:2", ["a 2"], ["b 3"]),
    ("ties", "tied:2", ["a 5", "b 1"], ["c 0"]),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN)
    rows = [
        {"id": id, "prompt": f"question {id}", "chosen": chosen, "rejected": rejected, "num_correct": len(chosen),
         "num_incorrect": len(rejected), "total_completions": len(chosen + rejected), "subset": subset}
        for subset, id, chosen, rejected in ROWS
    ]  # fmt: skip
    (tmp_path / "bench.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_in_reward_bench_2s_form(here):
    command = ["reward-bench", "bench.jsonl", "--rewards", "mine.py:value,mine.py:wrong", "--out", "out.json"]
    code, said, err = fastalign(*command, "--report", "page.html")
    assert code == 0, err
    result = json.loads((here / "out.json").read_text())
    value = result["rewards"]["value"]
    assert value["subsets"]["math"]["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert (
        value["subsets"]["focus"]["accuracy"] == 1 and result["rewards"]["wrong"]["subsets"]["focus"]["accuracy"] == 0
    )
    # Prompt 1: gaps 3 and 2, spread 1. Prompt 2: gaps -1 and 1, spread 4.
    margins = [np.tanh(min(3, 2) / 1 - 1), np.tanh(min(-1, 1) / 4 - 1)]
    ties = 0.3 * 1.0 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * np.mean(margins)
    assert value["subsets"]["ties"]["accuracy"] == pytest.approx(ties)
    assert value["score"] == pytest.approx(np.mean([0.5, 1.0, ties]))
    pairs = [(float(a.split()[-1]), float(b.split()[-1])) for _, _, right, wrong in ROWS for a in right for b in wrong]
    margin = np.array([a - b for a, b in pairs])
    assert value["pairs"]["pairs"] == len(pairs)
    assert value["pairs"]["accuracy"] == pytest.approx(np.mean(np.where(margin == 0, 0.5, margin > 0)))
    assert value["pairs"]["log_loss"] == pytest.approx(np.mean(np.log1p(np.exp(-margin))))
    confidence, right = 1 / (1 + np.exp(-abs(margin))), np.where(margin == 0, 0.5, margin > 0)
    bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    error = sum(abs(right[bins == b].sum() - confidence[bins == b].sum()) for b in set(bins)) / len(bins)
    assert value["pairs"]["calibration_error"] == pytest.approx(error)
    assert "mean of subsets" in said and "calibration error" in said and "<svg" in (here / "page.html").read_text()
    assert "already there" in fastalign(*command, "--report", "page.html")[2]


def test_every_head_of_a_reward_model(here):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForSequenceClassification(
        LlamaConfig(**sizes, intermediate_size=32, pad_token_id=0, id2label=(names := {0: "kind", 1: "brief"}))
    )
    model.config.fastalign_reward = {"values": list(names.values()), "text": "plain"}
    model.save_pretrained("judge")
    tiny_tokenizer().save_pretrained("judge")
    rows = [{"prompt": "the cat", "chosen": "is good", "rejected": f"is {word}"} for word in ("bad", "a mat")]
    (here / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = fastalign("reward-bench", "pairs.jsonl", "--rewards", "./judge", "--out", "out.json")
    assert code == 0, err
    result = json.loads((here / "out.json").read_text())["rewards"]
    assert list(result) == ["kind", "brief"]
    assert all(one["subsets"]["all"]["rows"] == 2 == one["pairs"]["pairs"] for one in result.values())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": ["b 1"]}, "row 0 must have prompt, chosen and rejected, lacks rejected"),
        ({"prompt": "a", "chosen": [], "rejected": ["b 1"]}, "row 0: chosen must be an answer or a list of answers"),
        ({"prompt": "a", "chosen": ["b 1"], "rejected": ["b 1"], "num_correct": 2}, "num_correct is 2, there are 1"),
        ({"prompt": "a", "chosen": ["b 1"], "rejected": ["b 1"], "subset": "Ties", "id": "3"},
         "id in the subset ties must be ref:NUMBER or tied:NUMBER, got '3'"),
    ],
)  # fmt: skip
def test_mistakes(here, row, message):
    (here / "bench.jsonl").write_text(json.dumps(row))
    assert message in refused("reward-bench", "bench.jsonl", "--rewards", "mine.py:value", "--out", "out.json")


def test_equal_scores_of_all_answers():
    rows = [(best_of.Question("ties", f"{kind}:1", 2, 3), np.zeros(3)) for kind in ("ref", "tied")]
    assert best_of.ties_score(rows) == 0.0 and best_of.best(np.zeros(4), 1) == 0.25
