"""Preference data as they are published: small files of the same shape become the pairs that they mean."""

import json

import pytest

from fastalign import UserError
from fastalign.data import preferences
from fastalign.data.published import LONE, TIES, UNRATED

PKU = [
    {"prompt": "how", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1,
     "is_response_0_safe": False},
    {"prompt": "why", "response_0": "c", "response_1": "d", "better_response_id": 1, "safer_response_id": 1},
]  # fmt: skip


def rated(response, overall, **ratings):
    annotations = {name: {"Rating": str(x), "Rationale": "so"} for name, x in ratings.items()}
    return {"response": response, "overall_score": overall, "annotations": annotations, "model": "m"}


ULTRAFEEDBACK = [
    {
        "instruction": "how",
        "models": ["x", "y", "z"],
        "completions": [
            rated("a", 5.0, honesty=2, helpfulness=4),
            rated("b", 8.0, honesty="N/A", helpfulness=4),
            rated("c", 2.0, honesty=5, helpfulness=4),
        ],
    }
]
SCORES = {"correctness": 3, "coherence": 3, "complexity": 1}
HELPSTEER = [
    {"prompt": "how", "response": "a", "helpfulness": 4, "verbosity": 0, **SCORES},
    {"prompt": "how", "response": "b", "helpfulness": 1, "verbosity": 2, **SCORES},
    {"prompt": "why", "response": "c", "helpfulness": 2, "verbosity": 2, **SCORES},
]
HELPSTEER3 = [
    {"domain": "x", "context": [{"role": "user", "content": "how"}], "response1": "a", "response2": "b",
     "overall_preference": -2},
    {"domain": "x", "context": [{"role": "user", "content": "why"}], "response1": "c", "response2": "d",
     "overall_preference": 0},
]  # fmt: skip
SHP = [{"history": "how", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 9, "score_B": 2},
       {"history": "why", "human_ref_A": "c", "human_ref_B": "d", "labels": 0, "score_A": 1, "score_B": 2}]  # fmt: skip
NECTAR = [
    {
        "prompt": "\n\nHuman: how\n\nAssistant: ",
        "answers": [
            {"answer": text, "rank": rank, "model": "m"} for text, rank in (("b", 2.0), ("a", 1.0), ("c", 3.0))
        ],
    }
]


HH = {"chosen": "\n\nHuman: how\n\nAssistant: a", "rejected": "\n\nHuman: how\n\nAssistant: b"}
SHUFFLED = [HELPSTEER[0], HELPSTEER[2], HELPSTEER[1]]


def written(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def sides(pairs, *more):
    return [(row["chosen"], row["rejected"], *(row[name] for name in more)) for row in pairs]


@pytest.mark.parametrize(
    ("rows", "more", "wanted", "dropped"),
    [
        (PKU, ["value"], [("a", "b", "better"), ("b", "a", "safer"), ("d", "c", "better"), ("d", "c", "safer")], {}),
        (ULTRAFEEDBACK, ["value"], [("b", "c", "overall"), ("c", "a", "honesty")], {TIES: 1, UNRATED: 2}),
        (HELPSTEER, ["value"], [("a", "b", "helpfulness"), ("b", "a", "verbosity")], {TIES: 3, LONE: 1}),
        (SHP, [], [("a", "b"), ("d", "c")], {}),
        (NECTAR, ["weight"], [("a", "b", 1 / 3), ("a", "c", 1 / 3), ("b", "c", 1 / 3)], {}),
    ],
    ids=["PKU-SafeRLHF", "UltraFeedback", "HelpSteer2", "SHP", "Nectar"],
)
def test_forms(tmp_path, rows, more, wanted, dropped):
    pairs = preferences.load(written(tmp_path / "data.jsonl", rows))
    assert sides(pairs, *more) == wanted and pairs.dropped == dropped


def test_messages_of_helpsteer(tmp_path):
    (pair,) = preferences.load(written(tmp_path / "data.jsonl", HELPSTEER3))
    assert pair["prompt"] == [{"role": "user", "content": "how"}] and pair["chosen"][0]["content"] == "a"
    prompt = "how\n<extra_id_1>Assistant\nso\n<extra_id_1>User\nand then?\n"
    rows = [{**row, "prompt": prompt if row["prompt"] == "how" else row["prompt"]} for row in HELPSTEER]
    pair = preferences.load(written(tmp_path / "data.jsonl", rows), values=["helpfulness"])[0]
    assert pair["prompt"] == [
        {"role": "user", "content": "how"},
        {"role": "assistant", "content": "so"},
        {"role": "user", "content": "and then?"},
    ]  # fmt: skip
    assert pair["chosen"] == [{"role": "assistant", "content": "a"}]


def test_values_can_be_chosen(tmp_path):
    path = written(tmp_path / "data.jsonl", PKU)
    assert sides(preferences.load(path, values=["safer"]), "value") == [("b", "a", "safer"), ("d", "c", "safer")]
    rated = preferences.load(written(tmp_path / "rated.jsonl", HELPSTEER), values=["helpfulness"])
    assert sides(rated) == [("a", "b")] and rated.dropped == {LONE: 1}  # the ties are those of other values
    with pytest.raises(UserError, match="the values of PKU-SafeRLHF are better, safer, it has no helpful"):
        preferences.load(path, values=["helpful"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**PKU[0], "better_response_id": 2}], "row 0: better_response_id must be 0 or 1, got 2"),
        ([{**SHP[0], "labels": None}], "row 0: labels must be 0 or 1, got None"),
        ([{**ULTRAFEEDBACK[0], "completions": ["a", "b"]}], "has the columns of UltraFeedback, but not its form"),
        ([HELPSTEER3[1]], "no row of it prefers one response to another"),
        ([{**HELPSTEER[0], "helpfulness": "lots"}, HELPSTEER[1]], "row 0: helpfulness must be a"),
        ([*SHP, "x"], "row 2 must be an object, got str"),
    ],
)
def test_mistakes(tmp_path, rows, message):
    with pytest.raises(UserError, match=message) as caught:
        preferences.load(written(tmp_path / "data.jsonl", rows))
    assert "\n" not in str(caught.value) and str(caught.value).count("data.jsonl") == 1


@pytest.mark.parametrize(
    ("rows", "bad", "kept"),
    [
        (PKU, {"safer_response_id": None}, 2),
        (SHP, {"labels": "A"}, 1),
        (NECTAR * 2, {"answers": [{"answer": "a", "rank": "first"}, {"answer": "b", "rank": 2}]}, 3),
        (HELPSTEER3 + HELPSTEER3, {"overall_preference": "B"}, 1),
        (HELPSTEER[:1] * 2 + HELPSTEER[1:], {"coherence": "much"}, 2),
    ],
    ids=["PKU-SafeRLHF", "SHP", "Nectar", "HelpSteer3", "HelpSteer"],
)
def test_rows_that_are_not_of_the_form_can_be_dropped(tmp_path, rows, bad, kept):
    path = written(tmp_path / "data.jsonl", [{**rows[0], **bad}, *rows[1:]])
    with pytest.raises(UserError, match=f"row 0: {'rank' if 'answers' in bad else next(iter(bad))} must be"):
        preferences.load(path)
    with pytest.warns(UserWarning, match=r"1 of \d rows dropped, the first row 0"):
        pairs = preferences.load(path, on_bad="drop")
    assert len(pairs) == kept and pairs.dropped["rows that are not pairs"] == 1


def test_training_takes_the_first_value_unless_others_are_named(tmp_path):
    from fastalign._base import outputs
    from fastalign.jobs.preference import read_pairs

    path, said = written(tmp_path / "data.jsonl", PKU), []
    with outputs.reporting_to(said.append):
        assert sides(read_pairs(path)) == [("a", "b"), ("d", "c")] and "value" not in read_pairs(path)[0]
    assert said[0].endswith("data.jsonl: PKU-SafeRLHF: pairs of better; it has safer too")
    assert sides(read_pairs(path, values=["safer"]), "value") == [("b", "a", "safer"), ("d", "c", "safer")]
    with pytest.raises(UserError, match="the values of PKU-SafeRLHF are better, safer, it has no helpful"):
        read_pairs(path, values=["helpful"])


@pytest.mark.parametrize(
    ("rows", "count", "ties"),
    [([HH, {**HH, "rejected": HH["chosen"]}], 1, 1), (SHUFFLED, 2, 3)],
    ids=["hh-rlhf with a row that is a tie", "HelpSteer, shuffled"],
)
def test_rows_as_they_come(tmp_path, rows, count, ties):
    pairs = preferences.load(written(tmp_path / "data.jsonl", rows))
    assert (len(pairs), pairs.dropped["ties"]) == (count, ties)


@pytest.mark.parametrize("hole", [None, "", float("nan"), "nan"])
@pytest.mark.parametrize("form", ["HelpSteer", "UltraFeedback"])
def test_a_rating_that_is_missing_is_none_however_it_was_written(tmp_path, form, hole):
    if form == "HelpSteer":
        rows = [{**HELPSTEER[0], "helpfulness": hole}, HELPSTEER[1], {**HELPSTEER[2], "prompt": "how"}]
        value, wanted = "helpfulness", [("c", "b", "helpfulness")]
    else:
        first, *others = ULTRAFEEDBACK[0]["completions"]
        rows = [{**ULTRAFEEDBACK[0], "completions": [{**first, "overall_score": hole}, *others]}]
        value, wanted = "overall", [("b", "c", "overall")]
    found = preferences.load(written(tmp_path / "data.jsonl", rows), values=[value])
    assert sides(found, "value") == wanted


def test_labels_that_pandas_wrote_as_floats(tmp_path):
    rows = [{**row, "better_response_id": "1.0", "safer_response_id": "0.0"} for row in PKU]
    found = preferences.load(written(tmp_path / "data.jsonl", rows), values=["better"])
    assert sides(found) == [("b", "a"), ("d", "c")]
    rows = [{**row, "labels": "1.0"} for row in SHP]
    assert sides(preferences.load(written(tmp_path / "shp.jsonl", rows))) == [("a", "b"), ("c", "d")]
