"""Candidates of other programs: every form gives the same, and a file that lacks something is one line."""

import json

import numpy as np
import pytest

from fastalign import UserError
from fastalign.decode import Candidates
from fastalign.decode.elsewhere import Columns, from_rows, read

PROMPTS = ["why", "how"]
TEXTS = [["a", "b", "c"], ["d", "e", "f"]]
SHORT = np.arange(6.0).reshape(2, 3)
GOOD = SHORT[::-1] / 10
FLAT = [
    {"prompt": PROMPTS[i], "response": TEXTS[i][j], "short": SHORT[i, j], "good": GOOD[i, j], "id": 7}
    for i in range(2)
    for j in range(3)
]
NESTED = [
    {"question": PROMPTS[i], "completions": TEXTS[i], "short": SHORT[i].tolist(), "good": GOOD[i].tolist()}
    for i in range(2)
]


def same(found, values=("short", "good")):
    assert found.prompts == PROMPTS and found.texts == TEXTS and tuple(found.rewards) == values
    for name in values:
        np.testing.assert_allclose(found.rewards[name], {"short": SHORT, "good": GOOD}[name], rtol=1e-6)


def written(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".feather":
        import pyarrow.feather

        pyarrow.feather.write_feather(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    elif path.suffix == ".csv":
        import csv

        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
        path.write_text(text)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow", ".feather"])
@pytest.mark.parametrize("form", ["a row per response", "a row per prompt"])
def test_files(tmp_path, suffix, form):
    if (suffix, form) == (".csv", "a row per prompt"):
        pytest.skip("a CSV file has no lists")
    rows = FLAT if form == "a row per response" else NESTED
    same(read(written(tmp_path / f"c{suffix}", rows), kind="scored"))
    chosen = read(written(tmp_path / f"c{suffix}", rows), kind="scored", columns=Columns(values=["good"]))
    same(chosen, ("good",))


@pytest.mark.parametrize("made", ["pandas", "datasets", "list"])
def test_tables(made):
    if made == "pandas":
        same(from_rows(pytest.importorskip("pandas").DataFrame(FLAT)))
    elif made == "datasets":
        same(from_rows(pytest.importorskip("datasets").Dataset.from_list(NESTED)))
    else:
        same(from_rows(FLAT))


def test_named_columns():
    rows = [{"q": row["prompt"], "a": row["response"], "short": row["short"], "good": row["good"]} for row in FLAT]
    same(from_rows(rows, Columns("q", "a")))
    with pytest.raises(
        UserError, match=r"rows: must have a column with the prompts .*, it has q, a, short, good: prompt_c"
    ):
        from_rows(rows)
    with pytest.raises(
        UserError, match="rows: has no column 'z', it has q, a, short, good: prompt_column names another"
    ):
        from_rows(rows, Columns("z", "a"))
    with pytest.raises(UserError, match=r"values must be columns of numbers \(short, good\), got a"):
        from_rows(rows, Columns("q", "a", ["a"]))


def test_outputs_of_servers():
    vllm = [
        {
            "request_id": "0",
            "prompt": prompt,
            "prompt_token_ids": [5, 6],
            "finished": True,
            "num_cached_tokens": 0,
            "outputs": [{"text": text, "index": j, "token_ids": [7]} for j, text in enumerate(texts)],
        }
        for prompt, texts in zip(PROMPTS, TEXTS, strict=True)
    ]
    same(from_rows(vllm), ())
    batch = [
        {
            "custom_id": prompt,
            "response": {"body": {"choices": [{"message": {"role": "assistant", "content": t}} for t in texts]}},
        }
        for prompt, texts in zip(PROMPTS, TEXTS, strict=True)
    ]
    same(from_rows(batch, Columns(prompt="custom_id")), ())
    chat = [{"messages": [{"role": "user", "content": "why"}], "response": [{"role": "assistant", "content": "a"}]}]
    found = from_rows(chat)
    assert found.texts == [["a"]] and found.prompts[0].messages == chat[0]["messages"]


def test_our_own_file_whose_note_was_lost(tmp_path):
    """pandas drops the schema's metadata; what is left is read like a stranger's."""
    pd = pytest.importorskip("pandas")
    empty = [[[] for _ in row] for row in TEXTS]
    whole = Candidates(PROMPTS, TEXTS, empty, empty, rewards={"short": SHORT, "good": GOOD})
    whole.to_parquet(tmp_path / "a.parquet")
    same(read(tmp_path / "a.parquet", kind="scored"))
    pd.read_parquet(tmp_path / "a.parquet").to_parquet(tmp_path / "b.parquet")
    same(read(tmp_path / "b.parquet", kind="scored"))
    same(from_rows(whole.to_pandas()))
    pytest.importorskip("datasets")
    same(from_rows(whole.to_dataset()))


def test_uneven_prompts_are_cut_and_said_so():
    from fastalign._base import outputs

    said = []
    with outputs.reporting_to(said.append):
        found = from_rows(FLAT[:5])
    assert found.texts == [["a", "b"], ["d", "e"]] and said == [
        "rows: prompts have 2 to 3 responses; the first 2 of each are used"
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "contains no candidates"),
        ([1], "row 0 must be an object, got int"),
        ("text", "must be a list of objects or a table, got str"),
        ([{"prompt": "", "response": "a"}], "row 0: prompt must be a string that is not empty"),
        ([{"prompt": "why", "response": None}], "row 0: response must be a text"),
    ],
)
def test_mistakes(rows, message):
    with pytest.raises(UserError, match=message) as caught:
        from_rows(rows)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([[0.1, 0.2]] * 6, "row 0: x must have one number per response, 1, got 2"),
        ([1.0] * 3 + [float("nan")] + [1.0] * 2, "row 3: x must be finite, got nan"),
        (["1", "inf"] * 3, "row 1: x must be finite, got inf"),
    ],
    ids=["embedding", "nan", "inf"],
)
def test_a_column_of_numbers_that_are_no_scores_is_told_and_is_a_mistake_only_if_asked_for(cells, message):
    from fastalign._base import outputs

    said = []
    rows = [{"x": cell, **row} for row, cell in zip(FLAT, cells, strict=True)]
    with outputs.reporting_to(said.append):
        same(from_rows(rows))
    assert said == [f"rows: {message}: the column is not read as a value"]
    with pytest.raises(UserError, match=message):
        from_rows(rows, Columns(values=["x"]))


def test_files_without_scores(tmp_path):
    path = written(tmp_path / "c.jsonl", [{"prompt": "why", "response": "a"}])
    assert read(path, kind=("candidates", "scored")).texts == [["a"]]
    with pytest.raises(UserError, match="must have a column of numbers for each value, got none"):
        read(path, kind="scored")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.jsonl", kind="scored")


def test_an_index_of_pandas_is_no_value(tmp_path):
    same(read(written(tmp_path / "c.csv", [{"": i, **row} for i, row in enumerate(FLAT)]), kind="scored"))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_column_with_holes_is_told(tmp_path, suffix):
    from fastalign._base import outputs

    said = []
    path = written(tmp_path / f"c{suffix}", [*FLAT[:4], {**FLAT[4], "good": None}, FLAT[5]])
    with outputs.reporting_to(said.append):
        same(read(path, kind="scored"), ("short",))
    assert said == [f"{path}: row 4: good has no number: the column is not read as a value"]
    with pytest.raises(UserError, match="row 4: good has no number"):
        read(path, kind="scored", columns=Columns(values=["good"]))


def test_files_of_ours_are_known_by_their_content(tmp_path):
    from_rows(FLAT).to_parquet(tmp_path / "c.csv")
    same(read(tmp_path / "c.csv", kind=("candidates", "scored")))
    (tmp_path / "c.tsv").write_text("prompt\tresponse\n")
    with pytest.raises(UserError, match=r"c.tsv: candidates must be a .jsonl, .* file, got .tsv"):
        read(tmp_path / "c.tsv", kind="candidates")


def test_line_ends_within_a_cell_are_its_text(tmp_path):
    (tmp_path / "c.csv").write_bytes('\ufeffprompt,response,x\r\nwhy,"one\r\ntwo\rthree\n",1\r\n\r\n'.encode())
    found = read(tmp_path / "c.csv", kind="scored")
    assert found.prompts == ["why"] and found.texts == [["one\r\ntwo\rthree\n"]]


def test_messages_without_responses_name_the_columns_there_are():
    with pytest.raises(UserError, match=r"must have a column with the responses .*, it has messages: response_column"):
        from_rows([{"messages": [{"role": "user", "content": "why"}]}])
