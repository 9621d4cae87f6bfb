"""What the commands say about how many candidates a λ needs and what it realises."""

import json
import math
import re

import numpy as np
import pytest
from commands import fastalign, refused
from tiny import tiny_folder

from fastalign import UserError
from fastalign.decode import Candidates, best_of_n_kl, estimate, needed, worth
from fastalign.decode.worth import TRUSTED_ESS, words
from fastalign.jobs.align import predicted_need


@pytest.fixture
def scored(tmp_path):
    rng = np.random.default_rng(0)
    texts = [[f"text {i} {j}" for j in range(24)] for i in range(12)]
    empty = [[[] for _ in row] for row in texts]
    whole = Candidates([f"prompt {i}" for i in range(12)], texts, empty, empty)
    whole = whole.with_rewards(["diversity", "readability"], rng.normal(size=(12 * 24, 2)))
    whole.to_parquet(tmp_path / "scored.parquet")
    return tmp_path / "scored.parquet"


@pytest.fixture
def palette(scored, tmp_path):
    code, out, _ = fastalign(
        "map", scored, "--palette", "diversity=0.8,readability=0.3", "--out", tmp_path / "palette.json"
    )
    result = json.loads((tmp_path / "palette.json").read_text())
    estimated = worth(Candidates.from_parquet(scored).reward_array(), result["lambda"])
    assert code == 0 and estimated.tell(24) in " ".join(out.split())
    low, high = estimated.at(24)
    assert low <= result["ess"] <= high
    return tmp_path / "palette.json"


def test_select_tells_what_to_expect(scored, palette, tmp_path):
    whole, solution = Candidates.from_parquet(scored), json.loads(palette.read_text())
    estimated = estimate(whole.reward_array(solution["values"]), solution["lambda"], warn=False)
    code, out, _ = fastalign("select", scored, "--palette", palette, "--out", tmp_path / "selected.parquet")
    assert code == 0 and f"KL {estimated.kl[0]:.3f} nats, effective sample size {estimated.ess[0]:.1f} of 24" in out
    assert f"diversity {estimated.values[0, 0]:.4f} ± {estimated.stderr[0, 0]:.4f}" in out and "too few" not in out
    solution["lambda"] = [6.0, 0.0]
    palette.write_text(json.dumps(solution))
    code, out, _ = fastalign("select", scored, "--palette", palette, "--out", tmp_path / "few.parquet")
    assert code == 0 and "too few to trust" in " ".join(out.split())
    code, out, _ = fastalign(
        "select", scored, "--palette", palette, "--method", "best", "--out", tmp_path / "b.parquet"
    )
    assert code == 0 and f"KL at most {best_of_n_kl(24):.3f} nats" in out


def test_eval_along_a_grid(scored, tmp_path):
    out_file = tmp_path / "grid.json"
    code, out, _ = fastalign("eval", scored, "--lam-grid", "readability=0:4:3,diversity=0.5", "--out", out_file)
    assert code == 0 and "in yellow: fewer than 10 effective" in out
    result = json.loads(out_file.read_text())
    assert result["values"] == ["diversity", "readability"] and result["n"] == 24
    assert [row["lambda"] for row in result["rows"]] == [[0.5, 0.0], [0.5, 2.0], [0.5, 4.0]]
    array = Candidates.from_parquet(scored).reward_array()
    for row in result["rows"]:
        one = estimate(array, row["lambda"], warn=False)
        np.testing.assert_allclose(row["values"], one.values[0])
        np.testing.assert_allclose([row["low"], row["high"]], np.concatenate(one.interval()))
        assert row["doubtful"] == (one.ess[0] < TRUSTED_ESS) and row["needed"] == list(one.worth[0].needed())
        assert words(*row["needed"]) in out
        assert f"{one.values[0, 1]:.3f}±{one.interval()[1][0, 1] - one.values[0, 1]:.3f}" in out
    assert "λ throughout: diversity 0.5" in out and "λ readability" in out
    assert {row["doubtful"] for row in result["rows"]} == {True, False}
    code, out, _ = fastalign("eval", scored, "--lam-grid", "diversity=0:1:100", "--out", out_file, "--overwrite")
    assert code == 0 and "and 40 more in the file" in out and len(json.loads(out_file.read_text())["rows"]) == 100


def test_sample_foretells_and_a_pilot_corrects_it(palette, tmp_path):
    model = tiny_folder(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("one prompt\nand another\n")
    job = ["sample", "--model", model, "--prompts", tmp_path / "prompts.txt", "-n", 4, "--max-new-tokens", 3]
    code, out, _ = fastalign(*job, "--palette", palette, "--pilot", "--out", tmp_path / "c.parquet")
    out = " ".join(out.split())
    assert code == 0 and Candidates.from_parquet(tmp_path / "c.parquet").n == 4
    before, after = re.findall(r"4 candidates a prompt are worth (\S+) effective ones \(95 %, from ([^);,]+)", out)
    assert before[1] == "12 prompts × 24" and after[1] == "2 prompts × 32"
    assert "give --palette with --pilot" in refused(*job, "--pilot", "--out", tmp_path / "d.parquet")


def test_a_palette_file_of_before_tells_a_bound(palette, tmp_path):
    result = json.loads(palette.read_text())
    worth = result.pop("worth")
    palette.write_text(json.dumps(result))
    kl = result["kl"]
    assert f"1,000 candidates a prompt are worth at most {1000 * math.exp(-kl):.1f}" in predicted_need(palette, 1000)
    assert f"10 need at least {needed(kl)};" in predicted_need(palette, 1000)
    palette.write_text(json.dumps({**result, "dual": "joint"}))
    assert "does not say how many candidates it needs" in predicted_need(palette, 1000)
    palette.write_text(json.dumps({**result, "worth": {**worth, "high": [1]}}))
    with pytest.raises(UserError, match=r"palette\.json: worth is not what"):
        predicted_need(palette, 1000)


def test_mistakes(scored, palette, tmp_path):
    out = ["--out", tmp_path / "x.json"]
    assert "give --selected and --palette, or --lam-grid" in refused("eval", scored, *out)
    assert "needs the scored file alone" in refused(
        "eval", scored, "--lam-grid", "diversity=1", "--palette", palette, *out
    )
    for text, match in (
        ("humor=1", "must name rewards among diversity, readability, once each, got 'humor'"),
        ("diversity=1,diversity=2", "once each, got 'diversity'"),
        ("diversity=1:2", "start:stop:count or a number for diversity, got '1:2'"),
        ("diversity=a", "start:stop:count or a number"),
        ("diversity=0:1:0", "one finite number or more"),
        ("diversity=nan", "one finite number or more"),
        ("diversity=0:1:200,readability=0:1:200", "at most 10,000 points, got 200 × 200"),
    ):
        assert match in refused("eval", scored, "--lam-grid", text, *out)
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_candidates_of_another_program_go_through_every_command(tmp_path, form):
    rows = [
        {"question": f"why {i}", "answer": f"because {j}" * (1 + j % 3), "helpful": 0.1 * ((i + 2 * j) % 7), "row": j}
        for i in range(6)
        for j in range(12)
    ]
    path = tmp_path / f"theirs.{form}"
    if form == "csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines))
    elif form == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    columns = ["--prompt-column", "question", "--response-column", "answer"]
    code, out, err = fastalign("map", path, *columns, "--palette", "helpful=base+0.9sd", "--out", tmp_path / "p.json")
    assert code == 0, err
    assert "10 need" in out and "sample --more" not in out  # that adds to what was drawn here
    solution = json.loads((tmp_path / "p.json").read_text())
    assert solution["values"] == ["helpful"] and solution["levels"][0] == pytest.approx(solution["palette"][0])
    palette, selected = ["--palette", tmp_path / "p.json"], tmp_path / "selected.parquet"
    assert fastalign("select", path, *columns, *palette, "--out", selected)[0] == 0
    picked = Candidates.from_parquet(selected, kind="selected")
    assert picked.prompts[0] == "why 0" and picked.texts[0][0].startswith("because")
    more = ["--selected", selected, *palette]
    assert fastalign("eval", path, *columns, *more, "--out", tmp_path / "eval.json")[0] == 0
    redrawn = Candidates.from_parquet(selected, kind="selected")
    redrawn.texts[0][0] += " redrawn"
    redrawn.save(tmp_path / "redrawn.parquet")
    line = refused(
        "eval", path, *columns, "--selected", tmp_path / "redrawn.parquet", *palette, "--out", tmp_path / "r.json"
    )
    assert "its texts were not selected from" in line
    other = ["--palette", tmp_path / "other.json"]
    assert fastalign("map", path, *columns, "--palette", "helpful=base+0.5sd", "--out", other[1])[0] == 0
    line = refused("eval", path, *columns, "--selected", selected, *other, "--out", tmp_path / "other_eval.json")
    assert f"{selected}: its texts were selected by another palette's λ, {solution['lambda']}" in line
    assert fastalign("eval", path, *columns, "--lam-grid", "helpful=0:1:2", "--out", tmp_path / "grid.json")[0] == 0
    assert fastalign("pareto", path, *columns, "--n-lam", 5, "--out", tmp_path / "fronts")[0] == 0
    assert fastalign("score", path, *columns, "--rewards", "diversity", "--out", tmp_path / "s.parquet")[0] == 0
    assert list(Candidates.from_parquet(tmp_path / "s.parquet", kind="scored").rewards) == ["helpful", "diversity"]
    line = refused("map", path, "--prompt-column", "q", "--palette", "0", "--out", tmp_path / "q.json")
    assert f"{path}: has no column 'q', it has question, answer, helpful, row: --prompt-column names another" in line
    assert "values must be columns of numbers (helpful), got harmless" in refused(
        "map", path, "--values", "harmless", "--palette", "0", "--out", tmp_path / "q.json"
    )
