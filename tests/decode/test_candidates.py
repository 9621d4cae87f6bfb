"""Candidates: what is written is what is read, for each kind of file; order, parts, picks and broken files."""

import contextlib
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign._base.errors import UserError
from fastalign.decode import Candidates


def make(prompts=3, n=4, *, rewards=(), seed=0):
    rng = np.random.default_rng(seed)

    def rows(cell):
        return [[cell() for _ in range(n)] for _ in range(prompts)]

    lengths = rng.integers(0, 5, (prompts, n))
    return Candidates(
        [f"prompt {i}" for i in range(prompts)],
        rows(lambda: f"text {rng.integers(1000)}"),
        [[rng.integers(0, 50000, k).tolist() for k in row] for row in lengths],
        [[rng.normal(size=k).astype(np.float32).tolist() for k in row] for row in lengths],
        rewards={name: rng.normal(size=(prompts, n)) for name in rewards},
        settings={"model": "tiny", "seed": 3, "stop": ["\n"]},
    )


def assert_same(left: Candidates, right: Candidates):
    for name in ("prompts", "texts", "token_ids", "logprobs", "settings", "kind", "n"):
        assert getattr(left, name) == getattr(right, name), name
    np.testing.assert_array_equal(left.prompt_ids, right.prompt_ids)
    assert list(left.rewards) == list(right.rewards)
    for name in left.rewards:
        np.testing.assert_array_equal(left.rewards[name], right.rewards[name])
    if left.picked is not None or right.picked is not None:
        np.testing.assert_array_equal(left.picked, right.picked)


PICKS = np.array([[3, 3], [0, 2], [1, 0]])


@pytest.mark.parametrize(
    "kind, candidates",
    [
        ("candidates", make()),
        ("scored", make(rewards=("positive", "my reward: 2"))),
        ("selected", make(rewards=("positive",)).take(PICKS)),
        ("selected", make().take(PICKS)),
        ("candidates", make(1, 1)),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_round_trip(tmp_path, kind, candidates, suffix):
    assert candidates.kind == kind
    path = tmp_path / f"c{suffix}"
    candidates.save(path)
    assert_same(Candidates.from_parquet(path), candidates)
    assert_same(Candidates.from_parquet(path, kind=(kind, "scored")), candidates)
    assert list(tmp_path.iterdir()) == [path]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=20), min_size=1, max_size=6))
def test_round_trip_of_any_text(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("c") / "c.parquet"
    candidates = Candidates(["p"], [texts], [[[] for _ in texts]], [[[] for _ in texts]])
    candidates.to_parquet(path)
    assert Candidates.from_parquet(path).texts == [texts]


def test_columns_and_types_of_the_file(tmp_path):
    make(rewards=("positive",)).take(PICKS).to_parquet(tmp_path / "c.parquet")
    schema = pq.read_schema(tmp_path / "c.parquet")
    assert {field.name: str(field.type) for field in schema} == {
        "prompt_id": "int64",
        "candidate_id": "int32",
        "prompt": "string",
        "text": "string",
        "token_ids": "list<element: int32>",
        "logprobs": "list<element: float>",
        "draw": "int32",
        "reward:positive": "float",
    }
    metadata = json.loads(schema.metadata[b"fastalign"])
    assert metadata["kind"] == "selected" and metadata["model"] == "tiny"


def test_row_order_in_the_file_does_not_matter(tmp_path):
    candidates = make(rewards=("positive",))
    candidates.to_parquet(tmp_path / "c.parquet")
    table = pq.read_table(tmp_path / "c.parquet")
    pq.write_table(table.take(np.random.default_rng(1).permutation(len(table))), tmp_path / "c.parquet")
    assert_same(Candidates.from_parquet(tmp_path / "c.parquet"), candidates)


def test_rewards_go_to_their_candidates():
    candidates = make()
    prompts, responses = candidates.pairs()
    assert prompts[:5] == ["prompt 0"] * 4 + ["prompt 1"]
    values = np.array([[len(r), hash(p + r) % 97] for p, r in zip(prompts, responses, strict=True)])
    scored = candidates.with_rewards(["length", "hash"], values)
    array = scored.reward_array()
    assert array.shape == (3, 4, 2) and array.dtype == np.float32 and candidates.rewards == {}
    for i, row in enumerate(candidates.texts):
        for j, text in enumerate(row):
            assert array[i, j].tolist() == [len(text), hash(candidates.prompts[i] + text) % 97]
    np.testing.assert_array_equal(scored.reward_array(["hash", "length"]), array[..., ::-1])


def test_take_keeps_everything_together():
    candidates = make(rewards=("positive",))
    taken = candidates.take(PICKS)
    for i, row in enumerate(PICKS):
        for draw, j in enumerate(row):
            assert taken.texts[i][draw] == candidates.texts[i][j]
            assert taken.logprobs[i][draw] == candidates.logprobs[i][j]
            assert taken.rewards["positive"][i, draw] == candidates.rewards["positive"][i, j]
    np.testing.assert_array_equal(taken.picked, PICKS)
    again = taken.take([[1], [1], [0]])
    np.testing.assert_array_equal(again.picked, [[3], [2], [1]])


def test_parts_are_joined_in_prompt_order(tmp_path):
    whole = make(4, 2, rewards=("positive",))

    def part(*ids):
        rows = [[getattr(whole, name)[i] for i in ids] for name in ("prompts", "texts", "token_ids", "logprobs")]
        rewards = {"positive": whole.rewards["positive"][list(ids)]}
        return Candidates(*rows, rewards=rewards, settings=whole.settings, prompt_ids=np.array(ids))

    parts = [part(3, 1), part(0), part(2)]
    assert_same(Candidates.concat(parts), whole)
    for i, piece in enumerate(parts):
        piece.to_parquet(tmp_path / f"{i}.parquet")
    assert_same(Candidates.concat(Candidates.from_parquet(tmp_path / f"{i}.parquet") for i in range(3)), whole)
    with pytest.raises(UserError, match="a prompt_id twice"):
        Candidates.concat([part(0), part(0, 1)])
    with pytest.raises(UserError, match="at least one"):
        Candidates.concat([])


def test_shapes_are_checked():
    with pytest.raises(UserError, match=r"texts must hold 2 rows of 2 candidates, got 2 rows of \[1, 2\]"):
        Candidates(["a", "b"], [["x", "y"], ["z"]], [[[], []], [[]]], [[[], []], [[]]])
    with pytest.raises(UserError, match="token_ids must hold"):
        Candidates(["a"], [["x", "y"]], [[[]]], [[[], []]])
    with pytest.raises(UserError, match=r"rewards\['r'\] must have shape \(1, 2\), got \(2,\)"):
        Candidates(["a"], [["x", "y"]], [[[], []]], [[[], []]], rewards={"r": [1, 2]})
    with pytest.raises(UserError, match=r"values must have shape \(12, 1\)"):
        make().with_rewards(["r"], np.zeros((3, 4)))
    with pytest.raises(UserError, match=r"values must be rewards of the candidates \(a\), one at least, got b"):
        make(rewards=("a",)).reward_array(["a", "b"])
    with pytest.raises(UserError, match="run `fastalign score` first"):
        make().reward_array()


@pytest.mark.parametrize("indices", [[[0]], [0, 1, 2], [[4], [0], [0]], [[-1], [0], [0]]])
def test_take_checks_its_indices(indices):
    with pytest.raises(UserError, match="indices must"):
        make().take(indices)


def rewrite(path, change, metadata=...):
    table = pq.read_table(path)
    before = table.schema.metadata
    table = change(table)
    pq.write_table(table.replace_schema_metadata(before if metadata is ... else metadata), path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.drop_columns(["text"]), "lacks the column 'text' of a scored file"),
        (lambda t: t.drop_columns(["reward:a"]), "lacks the column 'reward:<name>' of a scored file"),
        (lambda t: t.slice(1), "as many candidates for every prompt, got 3 to 4"),
        (lambda t: pa.concat_tables([t, t]), r"number every prompt's candidates 0\.\.7, once each"),
        (
            lambda t: t.set_column(2, "prompt", pa.array([str(i) for i in range(12)])),
            "prompt_id 0 has more",
        ),
        (lambda t: t.set_column(3, "text", pa.array([None] * 12, pa.string())), "empty cells"),
    ],
)
def test_broken_files_give_one_line(tmp_path, change, message):
    path = tmp_path / "c.parquet"
    make(rewards=("a",)).to_parquet(path)
    rewrite(path, change)
    with pytest.raises(UserError, match=message) as caught:
        Candidates.from_parquet(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_files_of_other_kinds_give_one_line(tmp_path):
    path = tmp_path / "c.parquet"
    with pytest.raises(FileNotFoundError, match="no such file"):
        Candidates.from_parquet(path)
    path.write_bytes(b"not parquet")
    with pytest.raises(UserError, match="not a Parquet file"):
        Candidates.from_parquet(path)
    make().to_parquet(path)
    with pytest.raises(UserError, match="must be a fastalign scored file, got kind 'candidates'"):
        Candidates.from_parquet(path, kind="scored")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="not a Parquet file"):
        Candidates.from_parquet(path)
    for metadata in (None, {b"fastalign": b"{oops"}, {b"fastalign": b"3"}):
        make().to_parquet(path)
        rewrite(path, lambda t: t, metadata)
        with pytest.raises(UserError, match="was not written by fastalign"):
            Candidates.from_parquet(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.parquet"
    make(seed=1).to_parquet(path)
    before = path.read_bytes()

    def full(table, where, **_):
        where.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        make(seed=2).to_parquet(path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["c.parquet"]


def test_rewards_that_float32_cannot_hold_are_refused():
    with pytest.raises(UserError, match=r"rewards\['a'\] must fit float32, got 1e[+]39"):
        Candidates(["p"], [["a", "b"]], [[[1], [1]]], [[[-0.1], [-0.1]]], rewards={"a": np.array([[1.0, 1e39]])})


def test_candidates_can_be_looked_at():
    whole = Candidates(["p <b>", "q"], [["a", "b"]] * 2, [[[1], [2, 3]]] * 2, [[[-0.5], [-0.25, -0.5]]] * 2)
    assert repr(whole) == "Candidates: 2 prompts × 2"
    scored = whole.with_rewards(["kind", "tokens"], np.arange(8.0).reshape(4, 2))
    assert repr(scored) == "Candidates: 2 prompts × 2, 2 rewards"
    assert repr(make(1, 1, rewards=("a",))) == "Candidates: 1 prompt × 1, 1 reward"
    table = scored.to_pandas()
    assert table.columns.tolist() == [
        "prompt_id",
        "candidate_id",
        "prompt",
        "text",
        "tokens",
        "logprob",
        "kind",
        "reward:tokens",
    ]
    assert table["logprob"].tolist() == [-0.5, -0.75] * 2 and table["kind"].tolist() == [0, 2, 4, 6]
    assert table["tokens"].tolist() == [1, 2] * 2 and scored.take(np.array([[1], [0]])).to_pandas()[
        "text"
    ].tolist() == ["b", "a"]
    page = scored._repr_html_()
    assert "p &lt;b&gt;" in page and "<b>" not in page


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("log_weights", np.zeros((3, 3)), r"shape \(3, 4\), got \(3, 3\)"),
        ("log_weights", np.zeros(3), r"shape \(3, 4\), got \(3,\)"),
        ("log_weights", np.full((3, 4), np.nan), "numbers below inf, got nan"),
        ("log_weights", np.full((3, 4), "x"), "numbers below inf, got <U1"),
        ("picked", np.zeros((2, 4), dtype=int), r"shape \(3, 4\), got \(2, 4\)"),
        ("picked", np.zeros((3, 4)), "integers, at least 0, got float64"),
        ("picked", np.full((3, 4), -1), "integers, at least 0, got -1"),
        ("prompt_ids", [0, 1], r"shape \(3,\), got \(2,\)"),
        ("prompt_ids", ["a", "b", "c"], "integers, at least 0, got <U1"),
        ("rewards", {"a": np.zeros((3, 3))}, r"shape \(3, 4\), got \(3, 3\)"),
    ],
)
def test_every_field_has_its_shape(field, value, message):
    with pytest.raises(UserError, match=rf"^{field}(\['a'\])? must (be|have) {message}$"):
        replace(make(), **{field: value})


def test_a_candidate_may_have_no_weight():
    weights = np.array([[0.0, -np.inf]])
    assert replace(make(1, 2), log_weights=weights.tolist()).log_weights.tolist() == weights.tolist()


def test_prompt_ids_are_those_written_however_large(tmp_path):
    one = Candidates(["p"], [["a"]], [[[1]]], [[[-1.0]]], prompt_ids=np.array([2**31 + 5]))
    one.to_parquet(tmp_path / "c.parquet")
    assert Candidates.from_parquet(tmp_path / "c.parquet").prompt_ids.tolist() == [2**31 + 5]


ODD = {
    "texts": ["x"],
    "integers": [7],
    "numbers": [0.5],
    "bytes": [b"\xff"],
    "objects": [{"a": 1}],
    "lists": [[0.5]],
    "lists with nulls": [[1, None]],
    "nulls": [None],
}
FITS = {
    "prompt_id": "integers", "candidate_id": "integers", "draw": "integers", "prompt": "texts", "text": "texts",
    "token_ids": "", "logprobs": "lists", "log_weight": "numbers integers", "reward:a": "numbers integers",
}  # fmt: skip


@pytest.mark.parametrize("column", FITS)
@pytest.mark.parametrize("odd", ODD)
def test_a_column_of_another_type_is_one_line(tmp_path, column, odd):

    whole = make(rewards=("a",))
    if column == "draw":
        whole = whole.take(np.zeros((len(whole.prompts), 1), dtype=int))
    elif column == "log_weight":
        whole = replace(whole, log_weights=np.zeros((len(whole.prompts), whole.n)))
    path = tmp_path / "c.parquet"
    whole.to_parquet(path)
    table = pq.read_table(path)
    values = pa.array(ODD[odd] * len(table))
    pq.write_table(table.set_column(table.column_names.index(column), column, values), path)
    if odd in FITS[column].split():
        with contextlib.suppress(UserError):  # such as one number for all candidates
            Candidates.from_parquet(path)
        return
    with pytest.raises(UserError) as caught:
        Candidates.from_parquet(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and repr(column) in line and "\n" not in line


@pytest.mark.parametrize("metadata", ["sampling", "selection", "made"])
def test_metadata_that_is_no_object(tmp_path, metadata):
    replace(make(), settings={metadata: [1]}).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(UserError, match=rf"'{metadata}' in its metadata must be an object, got \[1\]"):
        Candidates.from_parquet(tmp_path / "c.parquet")


def test_no_candidates_at_all(tmp_path):
    make().to_parquet(tmp_path / "c.parquet")

    pq.write_table(pq.read_table(tmp_path / "c.parquet").slice(0, 0), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet: contains no candidates"):
        Candidates.from_parquet(tmp_path / "c.parquet")
