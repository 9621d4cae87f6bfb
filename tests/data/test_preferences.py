"""Preference pairs: read from files of each form, made from scored candidates, bundled; and one line for each
mistake."""

import csv
import gzip
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_tokenizer

from fastalign._base.errors import UserError
from fastalign.data import hub, preferences
from fastalign.decode import Candidates
from fastalign.jobs.pairs import preference_pairs

ROWS = [
    {"prompt": "Who is there?", "chosen": "A cat.", "rejected": "No one."},
    {"prompt": 'Ünïcode, "quotes"\nand lines', "chosen": "yes", "rejected": "no", "margin": 0.5},
]
CHAT = {
    "prompt": [{"role": "user", "content": "Who?"}],
    "chosen": [{"role": "assistant", "content": "A cat."}],
    "rejected": [{"role": "assistant", "content": "No one."}],
}
HH = [
    {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: So long",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: Go",
    },
    # Parts before the last turn: split where both still agree.
    {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Hey\n\nHuman: what\n\nAssistant: nothing",
    },
]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            out = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            out.writeheader()
            out.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "jsonl.gz", "json.gz", "CSV.GZ"])
def test_reads_every_kind_of_file(tmp_path, suffix):
    rows = [{**row, "margin": row.get("margin", 0.25)} for row in ROWS]
    path = write(tmp_path / f"my.pairs.{suffix.lower().removesuffix('.gz')}", rows)
    if suffix.lower().endswith(".gz"):
        path = compressed(path, suffix)
    result = preferences.load(path)
    assert list(result) == rows and result.lost == ""


def compressed(path, suffix):
    result = path.with_name(f"compressed.{suffix}")
    result.write_bytes(gzip.compress(path.read_bytes()))
    return result


@pytest.mark.parametrize(  # named: gzip writes the time, and test workers must agree on a test's name
    "content", [b"{}", gzip.compress(b'{"prompt": "a"}' * 999)[:-20], b""], ids=["text", "cut off", "empty"]
)
def test_what_is_no_whole_gzip_file_is_one_line(tmp_path, content):
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"not a whole gzip file|contains no pairs"):
        preferences.load(path)


def test_reads_messages_with_and_without_a_prompt(tmp_path):
    whole = {"chosen": CHAT["prompt"] + CHAT["chosen"], "rejected": CHAT["prompt"] + CHAT["rejected"]}
    for row in (CHAT, whole):
        assert preferences.load(write(tmp_path / "pairs.jsonl", [row]))[0] == CHAT


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_reads_dialogues(tmp_path, suffix):
    first, second = preferences.load(write(tmp_path / f"hh.{suffix}", HH))
    start = "\n\nHuman: Hi\n\nAssistant:"
    assert first == {"prompt": start + " Hello\n\nHuman: Bye\n\nAssistant:", "chosen": " So long", "rejected": " Go"}
    assert second["prompt"] == start and second["chosen"] == " Hello"
    assert second["rejected"] == " Hey\n\nHuman: what\n\nAssistant: nothing"


def test_hub_names_and_rows_that_are_no_pair(monkeypatch):
    requested = []

    def load_dataset(name, split):
        requested.append((name, split))
        empty = {"chosen": HH[0]["chosen"], "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"}
        return datasets.Dataset.from_list([HH[0], empty, HH[1]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.warns(UserWarning, match="1 of 3 rows dropped, the first row 1: rejected must not be empty"):
        result = preferences.load("Anthropic/hh-rlhf", split="test")
    assert len(result) == 2 and result.dropped == {"rows that are not pairs": 1}
    assert requested == [("Anthropic/hh-rlhf", "test")]
    with pytest.raises(UserError, match="row 1: rejected must not be empty"):
        preferences.load("hh-rlhf", on_bad="raise")
    prompts = hub.load_prompts("Anthropic/hh-rlhf")
    assert prompts == ["\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant:"]


def test_prompts_of_film_reviews(monkeypatch, tmp_path):
    rows = [{"text": "One two  three<br /><br />four five six seven eight nine", "label": 0}] * 2
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows))
    assert hub.load_prompts("imdb") == ["One two three four five six seven eight"]
    local = write(tmp_path / "reviews.csv", rows)
    assert hub.load_prompts(local, words=4) == ["One two three four"]
    assert hub.load_prompts(local)[0].endswith("nine")
    assert hub.load_prompts(write(tmp_path / "hh.jsonl", HH))[1] == "\n\nHuman: Hi\n\nAssistant:"
    assert len(hub.load_prompts("bundled")) == 64
    with pytest.raises(UserError, match="words must be left out for dialogues"):
        hub.load_prompts(tmp_path / "hh.jsonl", words=3)
    with pytest.raises(UserError, match="row 0: chosen must hold a turn"):
        hub.load_prompts(write(tmp_path / "no.jsonl", [{"chosen": "hello", "rejected": "x"}]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "chosen": "b"}], "lacks 'rejected', got prompt, chosen"),
        ([ROWS[0], {**ROWS[0], "rejected": " "}], "row 1: rejected must not be empty"),
        ([ROWS[0], {**ROWS[0], "prompt": None}], "row 1: prompt must be a string or a list of messages, got nothing"),
        ([{"chosen": "b", "rejected": "c"}], "row 0: must have a 'prompt', or dialogues"),
        ([{**ROWS[0], "rejected": "A cat."}], "row 0: chosen and rejected must differ"),
        ([{**CHAT, "prompt": "text"}], "row 0: prompt, chosen and rejected must be of one kind"),
        ([{**CHAT, "chosen": [{"role": "assistant"}]}], "row 0: chosen\\[0\\] must be a message with role and content"),
        ([{**CHAT, "chosen": [{"role": "assistant", "content": ""}]}], "row 0: chosen must not be empty"),
        ([CHAT, ROWS[0]], "row 1: rows must all be text or all be messages"),
        ([{**ROWS[0], "margin": "wide"}], "row 0: margin must be a number, got 'wide'"),
        ([HH[0], {"chosen": HH[0]["chosen"], "rejected": "\n\nHuman: Other\n\nAssistant: x"}], "same turns"),
        ([], "contains no pairs"),
    ],
)
def test_mistakes_name_the_row(tmp_path, rows, message):
    path = write(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(UserError, match=message) as caught:
        preferences.load(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_mistakes_in_the_file(tmp_path):
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "ragged.csv").write_text("prompt,chosen,rejected\na,b,c,d\n")
    (tmp_path / "pairs.txt").write_text("a")
    (tmp_path / "pairs.parquet").write_text("a")
    for name, message in [
        ("broken.jsonl", "line 1 is not JSON"),
        ("ragged.csv", "row 0 has more cells"),
        ("pairs.txt", "must be a .jsonl"),
        ("pairs.parquet", "not a Parquet file"),
        ("", "is a folder"),
    ]:
        with pytest.raises(UserError, match=message):
            preferences.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file of pairs"):
        preferences.load(tmp_path / "none.csv")


def test_a_prompt_that_fills_the_context():
    tokenizer = tiny_tokenizer(chat=True)
    long = {**ROWS[0], "prompt": "hello world " * 40}
    preferences.check_lengths([long], tokenizer, 500)
    with pytest.raises(
        UserError, match=r"x: row 1: a prompt must be shorter than max_length, 16 tokens, got \d+ tokens"
    ):
        preferences.check_lengths([ROWS[0], long], tokenizer, 16, "x")
    with pytest.raises(UserError, match="row 0: a prompt must be shorter"):
        preferences.check_lengths([preferences.as_chat(long)], tokenizer, 16)


@pytest.fixture
def scored():
    texts = [["a", "b", "c", "d"], ["e", "e", "f", "g"], ["h", "i", "j", "k"]]
    rewards = {"one": np.array([[0, 1, 2, 3], [5, 5, 5, 5], [1, 0, 0, 1.0]]), "two": np.array([[3, 2, 1, 0]] * 3)}
    empty = [[[] for _ in row] for row in texts]
    return Candidates(["p", "q", "r"], texts, empty, empty, rewards=rewards, settings={"sampling": {"seed": 3}})


def test_best_against_worst(scored, tmp_path):
    result = preference_pairs(scored, lam={"one": 2.0}, seed=0)
    assert [(row["chosen"], row["rejected"]) for row in result] == [("d", "a"), ("h", "j")]  # q's candidates tie
    assert (result[0]["chosen_score"], result[0]["rejected_score"]) == (6.0, 0.0)
    assert result.dropped == {"ties": 1, "pairs with an empty text": 0, "prompts with one candidate": 0}
    assert result.lost == "1 ties"
    more = preference_pairs(scored, lam=[2.0, 0.0], pairs_per_prompt=9, seed=0)
    assert [(row["chosen"], row["rejected"]) for row in more] == [("d", "a"), ("c", "b"), ("h", "j"), ("k", "i")]
    other = preference_pairs(scored, lam=[0.0, 1.0], seed=0)
    assert [(row["chosen"], row["rejected"]) for row in other] == [("a", "d"), ("e", "g"), ("h", "k")]
    result.to_parquet(tmp_path / "pairs.parquet")
    again = preferences.load(tmp_path / "pairs.parquet")
    assert list(again) == list(result) and again.settings["pairs"]["lambda"] == [2.0]
    assert again.settings["sampling"] == {"seed": 3}
    assert result.to_dataset().column_names == ["prompt", "chosen", "rejected", "chosen_score", "rejected_score"]
    assert result.to_dataset(chat=True)[0]["chosen"] == [{"role": "assistant", "content": "d"}]


def test_drawn_pairs_follow_their_distributions():
    """chosen ~ softmax(lam R), rejected ~ uniform, independently; equal ones are dropped."""
    n, count = 4, 4000
    scores = np.array([0.0, 0.5, 1.0, 2.0])
    texts = [[f"t{j}" for j in range(n)] for _ in range(count)]
    empty = [[[] for _ in row] for row in texts]
    whole = Candidates([f"p{i}" for i in range(count)], texts, empty, empty, rewards={"r": np.tile(scores, (count, 1))})
    result = preference_pairs(whole, lam=[1.5], how="sampled", seed=1)
    p = np.exp(1.5 * scores) / np.exp(1.5 * scores).sum()
    joint = np.outer(p, np.full(n, 1 / n))
    np.fill_diagonal(joint, 0)
    assert result.dropped["ties"] == count - len(result)
    assert abs(len(result) / count - joint.sum()) < 4 * np.sqrt(0.25 / count)
    counts = np.zeros((n, n))
    for row in result:
        counts[int(row["chosen"][1]), int(row["rejected"][1])] += 1
    expected = joint / joint.sum() * len(result)
    off = ~np.eye(n, dtype=bool)
    chi2 = ((counts - expected)[off] ** 2 / expected[off]).sum()
    assert chi2 < 32.9  # 11 degrees of freedom, p = 5e-4
    again = preference_pairs(whole, lam=[1.5], how="sampled", seed=1)
    assert list(again) == list(result)
    assert list(preference_pairs(whole, lam=[1.5], how="sampled", seed=2)) != list(result)


def test_mistakes_in_making_pairs(scored, tmp_path):
    for options, message in [
        ({"lam": [0.0, 0.0]}, "no preference pairs: 3 ties"),
        ({"lam": [1.0]}, "one weight per reward, 2 \\(one, two\\)"),
        ({"lam": {"three": 1.0}}, "rewards that the file carries \\(one, two\\)"),
        ({"lam": [1.0, np.inf]}, "lam must be finite"),
        ({"lam": [1.0, 1.0], "how": "worst"}, "how must be one of best_worst, sampled"),
        ({"lam": [1.0, 1.0], "pairs_per_prompt": 0}, "pairs_per_prompt must be an integer"),
    ]:
        with pytest.raises(UserError, match=message):
            preference_pairs(scored, seed=0, **options)
    single = scored.take(np.zeros((3, 1), dtype=np.int64))
    with pytest.raises(UserError, match="at least 2 candidates"):
        preference_pairs(single, lam=[1.0, 1.0], seed=0)
    with pytest.raises(FileNotFoundError):
        preference_pairs(tmp_path / "none.parquet", lam=[1.0], seed=0)


@pytest.mark.parametrize("rule", ["length", "positive"])
def test_bundled_pairs_keep_their_rule(rule):
    if rule == "positive":
        pytest.importorskip("vaderSentiment")
    from fastalign import rewards

    result = preferences.bundled(100, rule=rule, seed=3)
    assert len(result) == 100 and list(result) == list(preferences.bundled(100, rule=rule, seed=3))
    assert len({row["prompt"] for row in result}) >= 60  # ties are left out
    for row in result:
        if rule == "length":
            assert len(row["chosen"]) > len(row["rejected"])
        else:
            better, worse = rewards.score("positive", [""] * 2, [row["chosen"], row["rejected"]])[:, 0]
            assert better > worse


def test_holding_out_keeps_prompts_apart():
    train, test = preferences.bundled(200, rule="length").split(0.25, seed=0)
    assert len(train) + len(test) == 200
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert len({row["prompt"] for row in test}) == 16
    with pytest.raises(UserError, match="fraction must lie between 0 and 1"):
        train.split(1.0, seed=0)


SYSTEM, ASK = {"role": "system", "content": "be brief"}, {"role": "user", "content": "who?"}
REPLIES = [{"role": "assistant", "content": text} for text in ("a cat", "a dog")]


@pytest.mark.parametrize("before", [[ASK], [SYSTEM, ASK], [ASK, REPLIES[0], {"role": "user", "content": "and?"}]])
def test_completions_that_begin_with_a_prompt_of_text(tmp_path, before):
    row = {"prompt": "who?", "chosen": [*before, REPLIES[0]], "rejected": [*before, REPLIES[1]], "score_chosen": 8.0}
    (pair,) = preferences.load(write(tmp_path / "uf.jsonl", [row])).rows
    assert pair == {**row, "prompt": before, "chosen": REPLIES[:1], "rejected": REPLIES[1:]}
    with pytest.raises(UserError, match="row 0: chosen and rejected must begin with the prompt"):
        preferences.load(write(tmp_path / "uf.jsonl", [{**row, "prompt": "another"}]))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "wide"])
@pytest.mark.parametrize("column", ["margin", "weight"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_numbers_of_pairs_are_finite(tmp_path, value, column, suffix):
    if suffix == ".parquet" and value == "wide":
        pytest.skip("a column of numbers")
    number = value if value == "wide" or suffix == ".csv" else float(value)
    rows = [{**ROWS[0], column: 0.5 if suffix != ".csv" else "0.5"}, {**ROWS[0], column: number}]
    path = tmp_path / f"p{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match=rf"row 1: {column} must be a (finite )?number, got {value}|'wide'"):
        preferences.load(path)


def test_a_margin_that_is_not_given_is_0_and_a_weight_must_be(tmp_path):
    rows = [{**ROWS[0], "margin": 0.5}, {**ROWS[0], "margin": None}]
    assert [row["margin"] for row in preferences.load(write(tmp_path / "a.jsonl", rows))] == [0.5, 0.0]
    with pytest.raises(UserError, match="row 0: weight must be a number, got nothing"):
        preferences.load(write(tmp_path / "a.jsonl", [{**ROWS[0], "weight": None}]))


def test_pairs_of_conversations_are_messages():
    from fastalign.data.conversations import Conversation
    from fastalign.decode import Candidates

    begun = [SYSTEM, ASK, {"role": "assistant", "content": "a"}]
    spoken = Conversation([ASK], chat_template_kwargs={"enable_thinking": False})
    scored = Candidates(
        [[SYSTEM, ASK], begun, spoken, "who?"],
        [[" cat", " dog"]] * 4,
        [[[1], [2]]] * 4,
        [[[-1.0], [-1.0]]] * 4,
        rewards={"r": [[1.0, 0.0]] * 4},
        settings={"sampling": {"chat_template_kwargs": {"x": 1}}},
    )
    pairs = preference_pairs(scored, lam=[1.0], seed=0).rows
    reply = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    assert [pair["prompt"] for pair in pairs] == [[SYSTEM, ASK], [SYSTEM, ASK], [ASK], [ASK]]
    assert [pair["chosen"] for pair in pairs] == [reply(" cat"), reply("a cat"), reply(" cat"), reply(" cat")]
    assert [pair["chat_template_kwargs"] for pair in pairs] == [
        {"x": 1},
        {"x": 1},
        {"x": 1, "enable_thinking": False},
        {"x": 1},
    ]
    for pair in pairs:
        preferences.check(pair)
