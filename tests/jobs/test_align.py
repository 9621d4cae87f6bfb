"""`fastalign align` on tiny models: what it decides, proves and writes, whatever stops it."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from commands import fastalign, refused
from tiny import tiny_folder
from turns import by_the_day

from fastalign import UserError
from fastalign.decode import Candidates, estimate
from fastalign.jobs.align import distilled
from fastalign.jobs.align import job as align
from fastalign.jobs.align.budget import Budget
from fastalign.jobs.align.split import split
from fastalign.palette import parse_palette, solve
from fastalign.report import proof
from fastalign.train.steering import Steering, covariance

VALUES = "diversity,readability"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("align")
    tiny_folder(root / "model", scale=2.0)
    words = ("cat", "dog", "fox", "house", "story", "review", "hat", "mat")
    (root / "prompts.txt").write_text(
        "".join(f"tell me a {size} {word}\n" for word in words for size in ("big", "red"))
    )
    return root


def job(place, out, palette, *more, how="decode", candidates=24):
    options = ["--model", place / "model", "--prompts", place / "prompts.txt", "--rewards", VALUES]
    return ["align", *options, "--palette", palette, "--max-new-tokens", 6, "--candidates", candidates, "--how", how,
            "--out", out, *more]  # fmt: skip


def test_decode_holds_a_palette_on_prompts_it_has_not_seen(place, tmp_path):
    out = tmp_path / "out"
    code, said, err = fastalign(*job(place, out, "diversity>=base+0.3sd, readability>=base"))
    assert code == 0, err
    result = json.loads((out / "align.json").read_text())
    assert (result["kind"], result["version"], result["how"], result["feasible"]) == ("align", 1, "decode", True)
    assert list(result["values"]) == ["diversity", "readability"] == list(result["lam"])
    assert (result["train_prompts"], result["heldout_prompts"], result["n"]) == (8, 8, 24)
    assert result["cost"]["tokens"] > 0 and result["cost"]["seconds"] > 0
    assert result["nearest"] is None and result["certificate"] is None
    assert 0 < result["kl"]["measured"] <= np.log(24) and result["kl"]["se"] > 0 and 1 <= result["ess"] <= 24

    rows = [json.loads(line) for line in (out / "texts.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and {row["split"] for row in rows} == {"train", "heldout"}
    held = [row for row in rows if row["split"] == "heldout"]
    assert not {row["prompt"] for row in held} & {row["prompt"] for row in rows if row["split"] == "train"}
    for name, value in result["values"].items():
        scores = np.array([row["rewards"][name] for row in held])
        assert value["realised"] == pytest.approx(scores.mean(), rel=1e-6)
        assert value["se"] == pytest.approx(scores.std(ddof=1) / np.sqrt(8), rel=1e-6)
        assert value["verdict"] == proof.judge(value["op"], value["asked"], value["realised"], value["se"], 1.0)
        assert name in said and value["verdict"] in said
    base = Candidates.from_parquet(out / "heldout" / "scored.parquet").reward_array(["diversity", "readability"])
    assert result["values"]["readability"]["asked"] == pytest.approx(base[..., 1].mean())  # its own prompts' base
    assert result["values"]["readability"]["base"] == pytest.approx(base[..., 1].mean())
    page = (out / "report.html").read_text()
    assert result["headline"] in page and "<svg" in page

    again, said, err = fastalign(*job(place, out, "diversity>=base+0.3sd, readability>=base"))
    assert again == 0 and "already there" in err
    assert "palette=" in refused(*job(place, out, "diversity>=base+0.4sd, readability>=base"))
    code, _, err = fastalign(*job(place, out, "diversity>=base+0.2sd", "--overwrite", "--json"))
    assert code == 0, err
    result = json.loads((out / "align.json").read_text())
    free = result["values"]["readability"]
    assert free["asked"] is None and free["op"] is None and free["verdict"] == "not asked"


def test_an_impossible_palette_is_proved_so(place, tmp_path):
    out = tmp_path / "out"
    code, said, _ = fastalign(*job(place, out, "diversity>=0.5, readability>=1e6"))
    assert code == 3
    result = json.loads((out / "align.json").read_text())
    assert not result["feasible"] and {x["verdict"] for x in result["values"].values()} == {"impossible"}
    assert result["headline"].startswith("No reweighting of the model's answers reaches readability >= 1000000")
    grid = Candidates.from_parquet(out / "train" / "scored.parquet").reward_array(["diversity", "readability"])
    proved = result["certificate"]
    w = np.array([proved["weights"][name] for name in result["values"]])
    asked = np.array([x["asked"] for x in result["values"].values()])
    assert (grid.astype(np.float64) @ w).max(axis=1).mean() == pytest.approx(proved["bound"]) and proved[
        "bound"
    ] < w @ asked
    assert (
        "readability" in proved["text"] and proved["text"] in said and set(result["nearest"]) == set(result["values"])
    )
    assert (out / "report.html").is_file() and not (out / "texts.jsonl").exists()
    code, _, _ = fastalign(*job(place, tmp_path / "near", "diversity>=0.5, readability>=1e6", "--allow-infeasible"))
    result = json.loads((tmp_path / "near" / "align.json").read_text())
    assert code == 0 and not result["feasible"]
    assert result["values"]["readability"]["verdict"].startswith("missed by")


MISTAKES = {
    "a palette without rewards": (["--palette", "humour>=1"], "must name each of diversity, readability once"),
    "nothing in the palette": (["--palette", ""], "--palette must"),
    "a level without end": (["--palette", "diversity>=nan"], "--palette must be finite, got nan"),
    "a small budget for few candidates": (["--budget", "1t", "--candidates", "3"], "at least 3 candidates"),
    "bounds that contradict": (["--palette", "diversity>=0.6,diversity<=0.5"], "bounds that one level can meet"),
    "an unknown reward": (["--rewards", "humour"], "unknown reward 'humour'"),
    "nothing held out": (["--heldout", "0"], "--heldout must be a share between 0 and 1"),
    "everything held out": (["--heldout", "1"], "--heldout must be a share between 0 and 1"),
    "one prompt": (["--limit", "1"], "two different ones at least, one of them held out, got 1 prompt"),
    "no budget": (["--budget", "20"], "--budget must be a time or tokens"),
    "a small budget": (["--budget", "10t"], "--budget must allow at least 4 candidates"),
    "texts pushed": (["--push-to-hub", "me/mine"], "--push-to-hub needs a trained model, and how is decode"),
    "no candidates": (["--candidates", "0"], "-n must be an integer, at least 1, got 0"),
    "truncated and trained": (["--how", "grpo", "--top-p", "0.9"], "--how must be decode"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(place, tmp_path, mistake):
    more, message = MISTAKES[mistake]
    out = tmp_path / "out"
    line = refused(*job(place, out, "diversity>=base", *more))
    assert message in line, line
    assert not (out / "align.json").exists()


def test_a_prompt_that_is_too_long_is_refused_before_any_is_drawn_from(place, tmp_path):
    """By its place in the file, on whichever side it lies."""
    for at in (0, 3, 5):
        rows = [f"tell me {i}" for i in range(6)]
        rows[at] = "cat " * 400
        (tmp_path / "long.txt").write_text("\n".join(rows))
        line = refused(*job(place, tmp_path / "out", "diversity>=base", "--prompts", tmp_path / "long.txt"))
        assert f"prompt {at} is too long" in line and not (tmp_path / "out").exists()


def test_prompts_all_alike(place, tmp_path):
    (tmp_path / "alike.txt").write_text("tell me a story\n" * 4)
    line = refused(*job(place, tmp_path / "out", "diversity>=base", "--prompts", tmp_path / "alike.txt"))
    assert "got 4 prompts, all alike" in line


def test_repeated_prompts_are_told(place, tmp_path):
    (tmp_path / "twice.txt").write_text("tell me a story\ntell me a joke\n" * 2)
    given = ["--prompts", tmp_path / "twice.txt"]
    code, _, err = fastalign(*job(place, tmp_path / "out", "diversity>=base", *given, candidates=8))
    assert code == 0 and "2 of 4 prompts repeat others, and are left out" in err
    result = json.loads((tmp_path / "out" / "align.json").read_text())
    assert (result["train_prompts"], result["heldout_prompts"]) == (1, 1)
    code, _, err = fastalign("sample", "--model", place / "model", *given, "-n", 2, "--max-new-tokens", 2, "--out",
                             tmp_path / "c.parquet")  # fmt: skip
    assert code == 0 and "2 of 4 prompts repeat others, and are drawn for again" in err


def test_equal_prompts_are_used_once():
    prompts = ["a", "b", "c", "a", "b", "c", "d"]
    for seed in range(8):
        train, held = split(prompts, 0.5, seed)
        assert sorted([*train, *held]) == [0, 1, 2, 6]  # each prompt once
    assert [len(side) for side in split(list("abcdefghij"), 0.2, 0)] == [8, 2]
    assert [len(side) for side in split(["a", "b"], 0.01, 0)] == [1, 1]


@pytest.mark.parametrize(
    ("text", "budget"),
    [("20m", (1200, np.inf)), ("90s", (90, np.inf)), ("1h", (3600, np.inf)), ("1.5m", (90, np.inf)),
     ("200000t", (np.inf, 200000)), (None, (np.inf, np.inf))],
)  # fmt: skip
def test_budgets(text, budget):
    assert tuple(Budget.parse(text)) == budget


@pytest.mark.parametrize("text", ["", "20", "m", "-1m", "0s", "1d", "1e3t", "20 minutes"])
def test_budgets_that_mean_nothing(text):
    with pytest.raises(UserError, match="budget must be a time or tokens"):
        Budget.parse(text)


def test_a_budget_of_tokens_bounds_the_candidates(place, tmp_path):
    out = tmp_path / "out"
    code, _, err = fastalign(*job(place, out, "diversity>=base", "--budget", "1000t"))
    result = json.loads((out / "align.json").read_text())
    assert code == 0 and 4 <= result["n"] < 24 and "the budget is 1,000 tokens" in err
    assert result["cost"]["tokens"] <= 1000


def test_more_budget_goes_on_with_what_too_little_left(place, tmp_path):
    out = tmp_path / "out"
    assert "at least 4 candidates" in refused(*job(place, out, "diversity>=base", "--budget", "10t"))
    assert "palette=" in refused(*job(place, out, "diversity>=base+0.1sd", "--budget", "1000t"))
    code, _, err = fastalign(*job(place, out, "diversity>=base", "--budget", "1000t"))
    assert code == 0 and "resuming" in err
    assert "budget='1000t'" in refused(*job(place, out, "diversity>=base", "--budget", "2000t"))  # it has ended


def test_a_killed_job_goes_on(place, tmp_path):
    """Killed at a stage, another each day; the same command ends with what an uninterrupted one has."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    command = job(place, whole, "diversity>=base+0.2sd")
    assert fastalign(*command)[0] == 0
    kill = (
        "import os, signal, sys\n"
        "from fastalign.jobs.align import steps\n"
        "name = sys.argv.pop(1)\n"
        "def stop(*a, **k): os.kill(os.getpid(), signal.SIGKILL)\n"
        "setattr(steps, name, stop)\n"
        "from fastalign.cli.main import main\n"
        "main()\n"
    )
    command[command.index(whole)] = out
    for stage in by_the_day(("score", "solve_palette", "select"), 3):
        done = subprocess.run([sys.executable, "-c", kill, stage, *map(str, command)], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (out / "align.json").exists()
    code, _, err = fastalign(*command, "--resume")
    assert code == 0 and "resuming an interrupted run" in err
    ours, wanted = (json.loads((folder / "align.json").read_text()) for folder in (out, whole))
    assert ours["cost"].pop("seconds") > 0 and wanted["cost"].pop("seconds") > 0
    assert ours == wanted
    assert (out / "texts.jsonl").read_text() == (whole / "texts.jsonl").read_text()
    assert "nothing to resume" in refused(*job(place, tmp_path / "new", "diversity>=base", "--resume"))


@pytest.mark.parametrize(("needed", "how", "n"), [(6, "decode", 8), (20, "decode", 20), (1000, "grpo", 8)])
def test_auto_takes_the_cheapest_that_can_hold(place, tmp_path, monkeypatch, needed, how, n):
    """Decoding, with more candidates where these are too few; training where far too many would be needed."""

    class Needs:
        @staticmethod
        def needed():
            return needed, None

    def trained(job, out):
        shutil.copytree(job.source.name, out)

    monkeypatch.setattr(align.steps, "worth_of", lambda solution: Needs)
    monkeypatch.setattr(align.methods, "train", trained)
    out = tmp_path / "out"
    code, _, err = fastalign(*job(place, out, "diversity>=base+0.1sd", how="auto", candidates=8))
    result = json.loads((out / "align.json").read_text())
    assert code == 0 and (result["how"], result["n"]) == (how, n), err
    held = Candidates.from_parquet(out / "heldout" / "scored.parquet").n
    assert held == n and ("decoding would need 1,000 candidates" in err) == (how == "grpo")


def test_an_output_in_use_or_of_somebody_else(place, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "was not made by `fastalign align`" in refused(*job(place, out, "diversity>=base"))
    assert "is an input" in refused(*job(place, place / "model", "diversity>=base"))
    code, _, err = fastalign(*job(place, out, "diversity>=base", "--overwrite"))
    assert code == 0 and (out / "mine.txt").read_text() == "mine", err
    import fcntl

    held = os.open(out, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert "another run is writing it" in refused(*job(place, out, "diversity>=base+0.1sd", "--overwrite"))
    os.close(held)


def test_a_value_nobody_asked_about_that_fell_is_named():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(30, 8, 2))
    after = base[:, :4] + [0.5, -2.0]
    rows = proof.levels(["a", "b"], [0.0, None], [">=", ">="], base=base, predicted=[0.5, 0.0], realised=after)
    assert [row.fell for row in rows] == [False, True] and rows[0].verdict == "met"


@pytest.mark.parametrize("how", ["decode", "dpo"])
def test_a_reward_is_watched_and_not_optimised(place, tmp_path, how):
    own = "def brief(prompts, responses):\n    return [-float(len(text)) for text in responses]\n"
    (tmp_path / "mine.py").write_text(own)
    more = ["--watch", f"{tmp_path / 'mine.py'}:brief", "--budget", "9000t", "--learning-rate", 1e-3]
    out = tmp_path / "out"
    command = job(place, out, "diversity>=base+0.3sd", *more, how=how)
    code, said, err = fastalign(*command)
    assert code == 0, err
    result = json.loads((out / "align.json").read_text())
    assert list(result["lam"]) == ["diversity", "readability"]
    brief = result["values"]["brief"]
    assert brief["verdict"] == "watched" and brief["asked"] is None and brief["predicted"] is None
    scored = Candidates.from_parquet(out / "heldout" / "scored.parquet")
    assert brief["base"] == pytest.approx(scored.rewards["brief"].mean())
    assert "brief" not in Candidates.from_parquet(out / "train" / "scored.parquet").rewards
    page = (out / "report.html").read_text()
    assert "Do the values agree?" in page and "agreement-" in page and "watched" in said
    if "brief" in result["fell"]:
        assert "may be over-optimised" in page and "watched, not optimised: brief fell" in said
    again, _, err = fastalign(*command)
    assert again == 0 and "already there" in err
    (tmp_path / "mine.py").write_text(own + "\n")
    assert "a model or reward whose files have changed since" in refused(*command)
    assert "rewards must be different" in refused(*command, "--watch", "diversity")


@pytest.mark.parametrize(
    ("op", "asked", "realised", "se", "verdict"),
    [(">=", 1.0, 1.0, 0.1, "met"), (">=", 1.0, 0.81, 0.1, "met within error"), (">=", 1.0, 0.79, 0.1, "missed by 0.21"),
     ("<=", 1.0, 0.5, 0.1, "met"), ("<=", 1.0, 1.3, 0.1, "missed by 0.3"), ("==", 1.0, 1.15, 0.1, "met within error"),
     ("==", 1.0, 0.7, 0.1, "missed by 0.3"), (">=", 1.0, 0.99, None, "missed by 0.01"),
     (None, None, 5.0, 0.1, "not asked")],
)  # fmt: skip
def test_verdicts(op, asked, realised, se, verdict):
    assert proof.judge(op, asked, realised, se, 1.0) == verdict


@pytest.mark.slow_matrix
@pytest.mark.parametrize("how", ["distill", "dpo", "grpo", "ppo"])
def test_a_model_is_trained_and_proved(place, tmp_path, how):
    out = tmp_path / "out"
    budget = "4000t" if how == "ppo" else "9000t"
    command = job(
        place, out, "diversity>=base+0.2sd, readability>=base", "--budget", budget, "--learning-rate", 1e-3, how=how
    )
    code, _, err = fastalign(*command)
    assert code == 0, err
    result = json.loads((out / "align.json").read_text())
    assert result["how"] == how and result["cost"]["tokens"] > 2500
    assert result["kl"]["measured"] != 0 and all(np.isfinite(list(result["lam"].values())))
    rows = [json.loads(line) for line in (out / "texts.jsonl").read_text().splitlines()]
    assert len(rows) == 8 * 4 and {row["split"] for row in rows} == {"heldout"}
    card = (out / "model" / "README.md").read_text()
    assert "diversity>=base+0.2sd" in card and result["headline"] in card and f"--how {how}" in card
    from transformers import AutoModelForCausalLM

    tuned, base = (AutoModelForCausalLM.from_pretrained(path) for path in (out / "model", place / "model"))
    assert any(not a.equal(b) for a, b in zip(tuned.parameters(), base.parameters(), strict=True))
    again, _, err = fastalign(*command)
    assert again == 0 and "already there" in err


def test_a_training_stopped_under_a_budget_goes_on_as_if_it_had_not_been(place, tmp_path, monkeypatch):
    """It keeps back what the proof costs, and ends at the same step."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    command = job(place, whole, "diversity>=base+0.2sd", "--budget", "9000t", "--learning-rate", 1e-3, how="grpo")
    assert fastalign(*command)[0] == 0
    command[command.index(whole)] = out
    calls, spent = [], Budget.spent

    def stops(self, *of):
        calls.append(of)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return spent(self, *of)

    monkeypatch.setattr(Budget, "spent", stops)
    assert fastalign(*command)[0] == 130
    monkeypatch.setattr(Budget, "spent", spent)
    assert fastalign(*command)[0] == 0
    ours, wanted = (json.loads((folder / "align.json").read_text()) for folder in (out, whole))
    step = 8 * 8 * 16  # by which training ends later
    assert ours.pop("cost")["tokens"] == wanted.pop("cost")["tokens"] <= 9000 + step and ours == wanted


def test_a_level_at_the_end_of_the_candidates_is_still_asked(place, tmp_path):
    assert fastalign(*job(place, tmp_path / "out", "diversity>=0, readability<=1"))[0] == 0
    result = json.loads((tmp_path / "out" / "align.json").read_text())
    assert [x["verdict"] for x in result["values"].values()] == ["met", "met"]


def test_a_training_of_ones_own_is_proved_the_same_way(place, tmp_path):
    def copied(job, out, left):
        """Trains nothing: levels and KL of the base."""
        shutil.copytree(job.source.name, out)
        return 0

    prompts = (place / "prompts.txt").read_text().splitlines()
    result = align.align(
        str(place / "model"), prompts, ["diversity"], "diversity>=-100", tmp_path / "out", how=copied, candidates=8,
        max_new_tokens=6, texts_per_prompt=8,
    )  # fmt: skip
    assert result["how"] == "copied" and result["kl"]["measured"] == pytest.approx(0, abs=1e-5)
    assert result["values"]["diversity"]["verdict"] == "met"


def test_rounds_go_on_from_the_model_before(place, tmp_path):
    out = tmp_path / "out"
    more = ["--rounds", 2, "--budget", "9000t", "--learning-rate", 1e-3]
    code, _, err = fastalign(*job(place, out, "diversity>=base+0.2sd", *more, how="grpo"))
    assert code == 0, err
    result = json.loads((out / "align.json").read_text())
    assert [row["round"] for row in result["rounds"]] == [1, 2]
    assert result["rounds"][1]["kl"] == result["kl"] and (out / "round-1" / "model" / "config.json").is_file()
    second = json.loads((out / "round-2" / "palette.json").read_text())
    assert second["palette"][0] == json.loads((out / "palette.json").read_text())["palette"][0]
    page = (out / "report.html").read_text()
    assert "What each round gained" in page and page.count("<svg") == 4
    assert "rounds must be 1 for how decode" in refused(*job(place, tmp_path / "x", "diversity>=base", "--rounds", 2))


def test_a_trained_model_is_pushed_by_transformers_own_calls(place, tmp_path, monkeypatch):
    """Also by the same command again, where the first could not."""
    from huggingface_hub import ModelCard
    from transformers import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    pushed = []

    def to(kind):
        return lambda self, repository, *_, **__: pushed.append((kind, repository))

    def offline(*_, **__):
        raise ConnectionError("no way there\nat all")

    command = job(
        place, tmp_path / "out", "diversity>=base", "--budget", "6000t", "--push-to-hub", "me/mine", how="distill"
    )
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", offline)
    code, _, err = fastalign(*command)
    assert code == 1 and err.splitlines()[-1].endswith("cannot be pushed there: no way there")
    assert (tmp_path / "out" / "align.json").is_file()
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", to("model"))
    monkeypatch.setattr(PreTrainedTokenizerBase, "push_to_hub", to("tokenizer"))
    monkeypatch.setattr(ModelCard, "push_to_hub", to("card"))
    assert fastalign(*command)[0] == 0
    assert pushed == [("model", "me/mine"), ("tokenizer", "me/mine"), ("card", "me/mine")]


def test_distillation_takes_the_best_and_the_worst_candidates():
    draw = np.random.default_rng(0)
    rewards, n = draw.normal(size=(3, 40, 2)).astype(np.float32), distilled.CHOSEN
    ids = [[[p, j] for j in range(40)] for p in range(3)]
    scored = Candidates(
        ["a", "b", "c"], [["x"] * 40] * 3, ids, (-draw.exponential(size=(3, 40, 2))).tolist()
    ).with_rewards(("u", "v"), rewards.reshape(-1, 2))
    lam = {"u": 2.0, "v": -1.0}
    rows = list(distilled.selected(scored, lam, [0, 1]))
    assert sorted(row["prompt"] for row in rows) == ["a", "b", "c"]
    assert rows == list(distilled.selected(scored, lam, [0, 1])) != list(distilled.selected(scored, lam, [0, 2]))
    for row in rows:
        p, chosen = row["completion_ids"][0][0], [j for _, j in row["completion_ids"]]
        scores = rewards[p] @ [2.0, -1.0]
        ranks = np.argsort(np.argsort(scores))[chosen]
        assert len(set(chosen)) == n and (ranks[: n // 2] < 20).all() and (ranks[n // 2 :] >= 20).all()
        np.testing.assert_allclose(np.diff(np.log(row["weights"])), np.diff(scores[chosen]), rtol=1e-6)
        np.testing.assert_allclose(row["ref_logprobs"], [sum(scored.logprobs[p][j]) for j in chosen])


@pytest.mark.parametrize("palette", ["a>=base+0.5sd, b>=base", "a>=base+0.4sd, b<=base-0.2sd", "a==base+0.3sd"])
def test_distillation_asks_for_more_by_what_the_model_lacks(palette):
    """A model that goes but 0.6 of the way to p_λ is brought to the palette; λ keeps its signs."""
    grid = np.random.default_rng(0).normal(size=(40, 48, 2))
    flat, groups = grid.reshape(-1, 2), np.repeat(np.arange(40), 48)
    target, sense = parse_palette(palette, ["a", "b"], flat, rest="free")
    found = solve(flat, target, groups=groups, sense=sense)
    free = [not np.isfinite(level) or level == flat.min(0)[j] for j, level in enumerate(target)]
    solution = {"sense": sense, "free": free, "solved_for": found.levels.tolist(), "lambda": found.lam.tolist()}
    steering = Steering.of(solution, distilled.RULE)
    for _ in range(12):
        reached = flat.mean(0) + 0.6 * (estimate(grid, steering.lam, warn=False).values[0] - flat.mean(0))
        steering.update(reached, covariance(grid))
        assert steering.lam[0] > 0
        if distilled.holds(steering):
            break
    lacks = (target - reached) * np.array([{">=": 1, "<=": -1, "==": 1}[each] for each in sense])
    assert (np.where(free, 0, lacks) < 0.01 * flat.std(0)).all()
    assert estimate(grid, steering.lam, warn=False).values[0][0] > target[0] + 0.1


def test_passes_of_distillation_go_on_after_the_last_measured_one(place, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    command = job(place, whole, "diversity>=base+0.7sd", "--learning-rate", 1e-3, how="distill", candidates=10)
    assert fastalign(*command)[0] == 0
    passes = json.loads((whole / "job.json").read_text())["decided"]["train: distilled"]["passes"]
    assert passes > 1 and not list(whole.glob("train/distilled-[0-9]"))[1:]
    command[command.index(whole)] = out

    def stops(rewards):
        os.kill(os.getpid(), signal.SIGINT)
        return covariance(rewards)

    monkeypatch.setattr(distilled, "covariance", stops)
    assert fastalign(*command)[0] == 130
    monkeypatch.setattr(distilled, "covariance", covariance)
    assert fastalign(*command)[0] == 0
    ours, wanted = (json.loads((folder / "align.json").read_text()) for folder in (out, whole))
    assert ours.pop("cost") and wanted.pop("cost") and ours == wanted
    command.append("--overwrite")
    assert fastalign(*command)[0] == 0
    assert json.loads((out / "align.json").read_text())["values"] == wanted["values"]
