"""Prompts: the bundled set, every file format, and one clear line for each thing that can be wrong."""

import contextlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastalign._base.errors import UserError
from fastalign.data import hub, preferences, prompts
from fastalign.data.conversations import Conversation

TWO = ["Hello, you.", 'She said "hi" – twice\u2028over']


def test_bundled_are_64_distinct_short_lines():
    every = prompts.bundled()
    assert len(every) == len(set(every)) == 64
    assert all(prompt == prompt.strip() and "\n" not in prompt and 5 < len(prompt) < 120 for prompt in every)
    assert prompts.load("bundled") == every


@pytest.mark.parametrize("k", [1, 8, 16, 64])
def test_bundled_subset_covers_the_kinds(k):
    path = prompts._BUNDLED
    kind = {row["prompt"]: row["kind"] for row in map(json.loads, path.read_text().splitlines())}
    counts = [0] * 8
    for prompt in prompts.bundled(k):
        counts[sorted(set(kind.values())).index(kind[prompt])] += 1
    assert sum(counts) == k and max(counts) - min(counts) <= 1


@pytest.mark.parametrize("k", [0, -1, 65])
def test_bundled_subset_size_is_checked(k):
    with pytest.raises(UserError, match=r"1\.\.64"):
        prompts.bundled(k)


def write(path, rows, column):
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"other": ["x"] * len(rows), column: rows}), path)
    elif path.suffix in (".arrow", ".feather"):
        table = pa.table({"other": ["x"] * len(rows), column: rows})
        make = pa.ipc.new_stream if path.suffix == ".arrow" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".csv":
        cells = "".join('x,"' + row.replace('"', '""') + '"\n' for row in rows)
        path.write_text(f"other,{column}\n{cells}", encoding="utf-8")
    elif path.suffix == ".txt":
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    else:
        objects = [{"other": 1, column: row} for row in rows]
        lines = [json.dumps(row, ensure_ascii=False) for row in objects]
        text = json.dumps(objects) if path.suffix == ".json" else "\n\n".join(lines)
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", prompts.SUFFIXES)
@pytest.mark.parametrize("column", ["prompt", "text", "question"])
def test_every_format(tmp_path, suffix, column):
    path = write(tmp_path / f"p{suffix}", TWO, column)
    assert prompts.load(path, column=None if column != "question" or suffix == ".txt" else column) == TWO


@pytest.mark.parametrize("name", ["bundled", "p.txt", "p.json"])
def test_texts_have_no_columns_and_files_no_splits(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("\n".join(TWO))
    (tmp_path / "p.json").write_text(json.dumps(TWO))
    with pytest.raises(UserError, match=f"^column must be left out for {name}: .* got 'question'$"):
        prompts.load(name, column="question")
    for load in (prompts.load, hub.load_prompts):
        with pytest.raises(UserError, match=f"^split must be left out for {name}: .* got 'test'$"):
            load(name, split="test")


@pytest.mark.parametrize("suffix", [s for s in prompts.SUFFIXES if s != ".txt"])
def test_missing_column_names_those_there(tmp_path, suffix):
    path = write(tmp_path / f"p{suffix}", TWO, "question")
    with pytest.raises(UserError, match=r"must have a column 'prompt' or 'messages' or 'text', got other, question"):
        prompts.load(path)


@pytest.mark.parametrize("suffix", prompts.SUFFIXES)
def test_blank_prompt_is_named(tmp_path, suffix):
    path = write(tmp_path / f"p{suffix}", [TWO[0], "  ", TWO[1]], "prompt")
    with pytest.raises(UserError, match=r"prompt 1 must be a string that is not blank") as caught:
        prompts.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_empty_file(tmp_path, suffix):
    (tmp_path / f"p{suffix}").write_text("")
    with pytest.raises(UserError, match="contains no prompts"):
        prompts.load(tmp_path / f"p{suffix}")


def test_json_lists_of_strings(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(TWO))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, TWO)))
    assert prompts.load(tmp_path / "a.json") == prompts.load(tmp_path / "a.jsonl") == TWO


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"prompt": "x"}\n{oops', "line 2 is not JSON"),
        ("a.json", b'{"prompt": "x"}', "must hold a list, got dict"),
        ("a.jsonl", b"3\n", "entry 0 must be a string or an object, got int"),
        ("a.jsonl", b'{"prompt": 3}', "prompt 0 must be a string"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.parquet", b"PAR1 nonsense", "not a Parquet file"),
        ("a.docx", b"x", "must be a .jsonl"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        prompts.load(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nope.jsonl", "./nope", "/nope/at/all"])
def test_missing_file(name):
    with pytest.raises(FileNotFoundError, match="no such prompt file"):
        prompts.load(name)


def test_a_folder_is_no_prompt_file(tmp_path):
    with pytest.raises(UserError, match="this is a folder"):
        prompts.load(tmp_path)


def test_hub_name_that_cannot_be_had(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(name, split):
        raise ConnectionError(f"Couldn't reach {name!r}\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"not available from the hub: Couldn't reach 'some/set'$"):
        prompts.load("some/set")


def test_hub_name(monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"id": [1, 2], "text": TWO})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table if split == "test" else None)
    assert prompts.load("some/set", split="test") == TWO


# -- conversations

SYSTEM, ASK = {"role": "system", "content": "be brief"}, {"role": "user", "content": "who?"}
REPLIES = [{"role": "assistant", "content": text} for text in ("a cat", "a dog")]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(
    "row, messages",
    [
        ({"prompt": [SYSTEM, ASK]}, [SYSTEM, ASK]),
        ({"messages": [ASK, REPLIES[0], ASK], "id": 3}, [ASK, REPLIES[0], ASK]),
        ({"chosen": [SYSTEM, ASK, REPLIES[0]], "rejected": [SYSTEM, ASK, REPLIES[1]]}, [SYSTEM, ASK]),
        ({"chosen": [ASK, REPLIES[0]]}, [ASK]),
        ({"prompt": "who?", "chat_template_kwargs": {"enable_thinking": False}}, [ASK]),
    ],
)
def test_conversations_are_prompts(tmp_path, suffix, row, messages):
    path = tmp_path / f"p{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps([row] if suffix == ".json" else row))
    (result,) = prompts.load(path)
    assert isinstance(result, Conversation) and result.messages == messages
    assert result.chat_template_kwargs == row.get("chat_template_kwargs", {})
    if "prompt" not in row:
        assert hub.load_prompts(path) == [result]


def test_a_prompt_of_text_beside_conversations_is_the_prompt(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": "who?", "chosen": [ASK, REPLIES[0]], "rejected": [ASK, REPLIES[1]]})
    )
    assert prompts.load(tmp_path / "p.jsonl") == ["who?"]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": [{"content": "x"}]}, "prompt 0 message 0 must have a role"),
        ({"prompt": []}, "prompt 0 must be a list of at least one message"),
        ({"prompt": ["x"]}, "prompt 0 message 0 must have a role"),
        ({"chosen": [ASK]}, "row 0: chosen must hold a prompt's messages and a reply"),
        ({"chosen": [ASK, REPLIES[0]], "rejected": [SYSTEM, REPLIES[0]]}, "row 0: must have a 'prompt', or chosen"),
        ({"prompt": "half \ud83d"}, "prompt 0 must be text that UTF-8 can hold"),
        ({"prompt": "x", "chat_template_kwargs": "on"}, "prompt 0 chat_template_kwargs must be a dict"),
    ],
)
def test_conversations_that_are_none(tmp_path, row, message):
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=message) as caught:
        prompts.load(tmp_path / "p.jsonl")
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


# -- files that other libraries stumble over

READERS = [prompts.load, preferences.load, hub.load_prompts]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.json", b"[" * 100_000, "nested too deep"),
        ("p.jsonl", b'{"prompt": ' * 100_000, "nested too deep"),
        ("p.csv", b'prompt,x\n"a', None),
        ("p.parquet", b"PAR1xxxxPAR1", "not a Parquet file that can be read"),
        ("p.parquet", b"", "not a Parquet file that can be read"),
    ],
)
def test_broken_files_are_reported_in_one_line(tmp_path, read, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) if message else contextlib.suppress(UserError):
        read(tmp_path / name)


def test_a_csv_cell_may_be_long(tmp_path):
    (tmp_path / "p.csv").write_text("prompt\n" + "x" * 140_000 + "\n")
    assert prompts.load(tmp_path / "p.csv") == ["x" * 140_000]
