"""What every command does where its output is an input, or is there already, or cannot be one."""

import errno
import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from commands import fastalign, refused
from tiny import tiny_folder

from fastalign._base import files, outputs
from fastalign._base.errors import UserError
from fastalign.decode import Candidates

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["the cat sat", "a dog ran", "hello world", "who is it", "why", "tell me"]
SMALL = ["-n", 2, "--max-new-tokens", 3]
TRAIN = ["--max-steps", 1, "--batch-size", 2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the commands read, made once; each test gets a copy."""
    root = tmp_path_factory.mktemp("made")
    for i in range(2):
        tiny_folder(root / f"model{i}", seed=i, scale=2.0)
    (root / "prompts.txt").write_text("\n".join(TEXTS))
    pairs = [{"prompt": text, "chosen": " yes", "rejected": f" no {i}"} for i, text in enumerate(TEXTS)]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    rng = np.random.default_rng(0)
    texts = [[f"{text} {j}" for j in range(12)] for text in TEXTS]
    empty = [[[] for _ in row] for row in texts]
    tokens = [[[5 + i, 6 + j] for j in range(12)] for i in range(len(TEXTS))]
    candidates = Candidates(TEXTS, texts, tokens, empty)
    candidates.to_parquet(root / "candidates.parquet")
    scored = candidates.with_rewards(["diversity", "readability"], rng.normal(size=(72, 2)))
    scored.to_parquet(root / "scored.parquet")
    for command in (
        ["map", root / "scored.parquet", "--palette", "0.2,0.2", "--out", root / "palette.json"],
        ["select", root / "scored.parquet", "--palette", root / "palette.json", "--out", root / "selected.parquet"],
    ):
        assert fastalign(*command)[0] == 0
    return root


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTALIGN_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


# command: its arguments (bare names are its inputs), other settings, the file that its output is or holds
COMMANDS = {
    "align": (
        ["--model", "model0", "--prompts", "prompts.txt", "--rewards", "diversity,readability", "--palette",
         "readability>=base", "--how", "decode", *SMALL],
        ["--seed", 1], "align.json",
    ),
    "sample": (["--model", "model0", "--prompts", "prompts.txt", *SMALL], ["--seed", 1], ""),
    "sample --method rejection": (
        ["--model", "model0", "--prompts", "prompts.txt", *SMALL, "--palette", "palette.json"], ["--seed", 1], "",
    ),
    "score": (["candidates.parquet", "--rewards", "diversity"], ["--rewards", "readability"], ""),
    "map": (["scored.parquet", "--quantile", 0.6], ["--quantile", 0.55], ""),
    "select": (["scored.parquet", "--palette", "palette.json"], ["--seed", 1], ""),
    "eval": (["scored.parquet", "--selected", "selected.parquet", "--palette", "palette.json"], None, ""),
    "eval --lam-grid diversity=0:1:3": (["scored.parquet"], ["--lam-grid", "diversity=0:2:3"], ""),
    "reward-bench": (["pairs.jsonl", "--rewards", "diversity"], ["--rewards", "readability"], ""),
    "pareto": (["scored.parquet", "--n-lambda", 20], ["--n-lambda", 21], "pareto.json"),
    "soup": (["model0", "model1", "--weights", "0.5,0.5"], ["--weights", "0.4,0.6"], "model.safetensors"),
    "soup-front": (
        ["model0", "model1", "--prompts", "prompts.txt", "--rewards", "diversity,readability", "--grid", 2, *SMALL],
        ["--seed", 1], "soups.json",
    ),
    "train distill": (
        ["scored.parquet", "--palette", "palette.json", "--model", "model0", *TRAIN, "--learning-rate", 0.01],
        ["--seed", 1], "model.safetensors",
    ),
    "train dpo": (["--model", "model0", "--data", "pairs.jsonl", *TRAIN], ["--seed", 1], "model.safetensors"),
    "train reward": (["--model", "model0", "--data", "pairs.jsonl", *TRAIN, "--held-out", 0], ["--seed", 1],
                     "model.safetensors"),
    "train grpo": (
        ["--model", "model0", "--prompts", "prompts.txt", "--values", "readability", "--lam", 1, *TRAIN,
         "--num-generations", 2, "--max-new-tokens", 8, "--learning-rate", 0.01],
        ["--seed", 1], "model.safetensors",
    ),
    "train ppo": (
        ["--model", "model0", "--data", "prompts.txt", "--values", "diversity", "--lam", 1, *TRAIN, "--max-new-tokens",
         3],
        ["--seed", 1], "model.safetensors",
    ),
}  # fmt: skip
FILES = [name for name, (_, _, inner) in COMMANDS.items() if not inner]
FOLDERS = [name for name in COMMANDS if name not in FILES]
every_command = pytest.mark.parametrize("name", COMMANDS)


def argued(name, *more):
    return [*name.split(), *COMMANDS[name][0], *more]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def inputs_of(name):
    return [word for word in COMMANDS[name][0] if isinstance(word, str) and Path(word).exists()]


@pytest.mark.slow_matrix
@every_command
@pytest.mark.parametrize("by", ["name", "link", "hard link", "link to its folder"])
def test_an_input_is_never_the_output(name, by, work):
    for i, word in enumerate(inputs_of(name)):
        target = Path(word)
        if by == "link":
            target = Path(f"link{i}")
            target.symlink_to(word)
        elif by == "hard link":
            if target.is_dir():
                continue
            target = Path(f"hard{i}")
            os.link(word, target)
        elif by == "link to its folder":
            Path(f"around{i}").symlink_to(work)
            target = Path(f"around{i}") / word
        before = contents(work)
        assert "is an input" in refused(*argued(name, "--out", target, "--overwrite"))
        if Path(word).is_dir():
            assert f"lies in {word}, an input" in refused(*argued(name, "--out", target / "new", "--overwrite"))
            assert "an input" in refused(*argued(name, "--out", target / "model.safetensors", "--overwrite"))
        assert contents(work) == before


@pytest.mark.slow_matrix
@every_command
@pytest.mark.parametrize(
    ("kind", "message"), [("folder", "this is a folder"), ("FIFO", "this is a FIFO"), ("", "no such")]
)
def test_what_is_no_file_is_no_input(name, kind, message, work):
    for i, word in enumerate(inputs_of(name)):
        if Path(word).is_dir():
            continue
        odd = Path(f"odd{i}").with_suffix(Path(word).suffix)
        if kind:
            {"folder": os.mkdir, "FIFO": os.mkfifo}[kind](odd)
        requested = [odd if argument == word else argument for argument in argued(name, "--out", "out")]
        line = refused(*requested)
        assert line.startswith(f"fastalign: {odd}: ") and message in line
        assert not Path("out").exists()


@pytest.mark.parametrize("name", [name for name in COMMANDS if "model0" in COMMANDS[name][0]])
def test_what_is_refused_after_the_model_was_looked_at_leaves_no_folder(name, work):
    Path("model0/model.safetensors").write_bytes(b"no weights")
    refused(*argued(name, "--out", "new/folder/out"))
    assert not Path("new").exists()


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "pareto"])
def test_a_folder_among_whose_files_an_input_is_is_never_the_output(name, work):
    before = contents(work)
    for target in (".", work, "../work"):
        assert "an input, lies in it" in refused(*argued(name, "--out", target, "--overwrite"))
    assert contents(work) == before


@pytest.mark.slow_matrix
@every_command
def test_what_is_there_stays_without_overwrite(name, work, monkeypatch):
    inner = COMMANDS[name][2]
    out = Path("out")
    if inner:
        out.mkdir()
        (out / (inner if name in ("pareto",) else "thesis.txt")).write_text("precious")
        if name == "soup-front":
            (out / "000.parquet").write_text("precious")
    else:
        out.write_text("precious")
    before = contents(work)
    with monkeypatch.context() as patch:  # before anything long begins
        patch.setattr("fastalign.models.loading.load_causal_lm", lambda *_, **__: pytest.fail("loaded"))
        patch.setattr("fastalign.rewards.score", lambda *_, **__: pytest.fail("scored"))
        line = refused(*argued(name, "--out", out))
    assert "out" in line and "exists" in line and contents(work) == before
    if name == "soup":
        assert "no merge made it" in refused(*argued(name, "--out", out, "--overwrite"))
        assert contents(work) == before
    else:
        assert fastalign(*argued(name, "--out", out, "--overwrite"))[0] == 0
        assert (out / inner).is_file() and "precious" not in (out / inner).read_text(errors="replace")


@pytest.mark.slow_matrix
@every_command
def test_the_same_again_is_taken_as_it_is_and_other_settings_are_refused(name, work, monkeypatch):
    other, inner = COMMANDS[name][1:]
    out = Path("out")
    assert fastalign(*argued(name, "--out", out))[0] == 0
    before = contents(work)
    state = (out / inner).stat()
    with monkeypatch.context() as patch:
        patch.setattr("fastalign.rewards.score", lambda *_, **__: pytest.fail("scored"))
        patch.setattr("fastalign.decode.Sampler.iter_batches", lambda *_, **__: pytest.fail("drawn"))
        code, shown, err = fastalign(*argued(name, "--out", out))
    assert code == 0, err
    if name != "soup-front":  # which writes its summary anew
        assert "already there" in err + shown and (out / inner).stat().st_mtime_ns == state.st_mtime_ns
        assert contents(work) == before
    if other is None:
        return
    line = refused(*argued(name, *other, "--out", out))
    assert "--overwrite" in line and str(out) in line
    assert contents(work).keys() == before.keys()
    assert contents(work)[str(out / inner)] == before[str(out / inner)]
    code, _, err = fastalign(*argued(name, *other, "--out", out, "--overwrite"))
    assert code == 0, err
    if name != "pareto":
        assert contents(work)[str(out / inner)] != before[str(out / inner)]
    assert fastalign(*argued(name, *other, "--out", out))[0] == 0  # what it is now


@pytest.mark.parametrize("name", ["map", "select"])
def test_other_inputs_of_the_same_name_are_other_inputs(name, work):
    assert fastalign(*argued(name, "--out", "out"))[0] == 0
    whole = Candidates.from_parquet("scored.parquet")
    whole.with_rewards(["diversity"], np.arange(72.0)[:, None]).to_parquet("scored.parquet")
    assert "out: exists, made of other inputs; --overwrite replaces it" in refused(*argued(name, "--out", "out"))


@pytest.mark.parametrize("name", FILES)
def test_a_link_stays_and_what_it_leads_to_is_written(name, work):
    Path("elsewhere").mkdir()
    Path("out").symlink_to("elsewhere/real")
    assert fastalign(*argued(name, "--out", "out"))[0] == 0
    assert Path("out").is_symlink() and Path("elsewhere/real").is_file()
    os.chmod("elsewhere/real", 0o640)
    assert fastalign(*argued(name, "--out", "out", "--overwrite"))[0] == 0
    assert Path("out").is_symlink() and stat.S_IMODE(os.stat("elsewhere/real").st_mode) == 0o640
    assert sorted(path.name for path in Path("elsewhere").iterdir()) == ["real"]


@pytest.mark.slow_matrix
@every_command
def test_what_can_be_no_output(name, work):
    os.mkfifo("pipe")
    for path in ("pipe", "/dev/null", "/dev/full"):
        line = refused(*argued(name, "--out", path, "--overwrite"))
        assert path in line and ("must be a file" in line or "must be a folder" in line), line
        assert not stat.S_ISREG(os.stat(path).st_mode)
    Path("folder").mkdir()
    (Path("folder") / "mine").write_text("precious")
    if name in FILES:
        assert "must be a file or absent, it is a folder" in refused(*argued(name, "--out", "folder", "--overwrite"))
    else:
        line = refused(
            *argued(name, "--out", "prompts.txt" if "prompts.txt" not in inputs_of(name) else "scored.parquet")
        )
        assert "folder" in line or "an input" in line
    assert contents(Path("folder")) == {"mine": b"precious"}


@pytest.mark.parametrize("name", FILES)
def test_a_disk_that_is_full_is_named_and_leaves_nothing(name, work, monkeypatch):
    before = contents(work)
    sync = files.sync

    def full(path):
        if ".partial" in path.name and "out" in path.name and "part-" not in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(path)

    monkeypatch.setattr(files, "sync", full)
    assert refused(*argued(name, "--out", "out")) == "fastalign: out: No space left on device\n"
    after = contents(work)
    assert {name: data for name, data in after.items() if not name.startswith("out.parts/")} == before
    monkeypatch.undo()
    os.chdir(work)
    assert fastalign(*argued(name, "--out", "out"))[0] == 0


@pytest.mark.slow_matrix
@every_command
def test_a_folder_that_may_not_be_written(name, work, monkeypatch):
    """Told before a model is loaded."""
    Path("locked").mkdir(mode=0o555)
    access = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    monkeypatch.setattr("fastalign.models.loading.load_causal_lm", lambda *_, **__: pytest.fail("loaded"))
    for out in ("locked/out", "locked/new/out", "prompts.txt/out"):
        line = refused(*argued(name, "--out", out))
        assert f"{out}: cannot be written, " in line and line.endswith((" is read-only\n", " is no folder\n"))


@pytest.mark.parametrize("option", ["eval --html", "eval --figures", "map --plot", "train reward --report"])
def test_and_so_of_what_is_written_beside_it(option, work, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    Path("locked").mkdir()
    name, _, option = option.rpartition(" ")
    line = refused(
        *argued(name, "--held-out", 0.5) if "reward" in name else argued(name), option, "locked/it.html", "--out", "out"
    )
    assert line.startswith("fastalign: locked/it.html: cannot be written, ") and not Path("out").exists()


@pytest.mark.parametrize("name", ["train dpo", "train reward", "train ppo"])
@pytest.mark.parametrize(
    "error",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "[enforce fail at inline_container.cc:672]",
    ],
)
def test_a_disk_that_is_full_while_a_model_is_saved_is_one_line(name, error, work, monkeypatch):
    def full(*arguments, **options):
        raise RuntimeError(error)

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    code, _, err = fastalign(*argued(name, "--out", "out"))
    line = err.splitlines()[-1]
    assert code == 1 and line.startswith("fastalign: out: "), err
    assert line.endswith(("No space left on device", "cannot be written; the disk may be full"))


@pytest.mark.parametrize("name", ["map", "eval", "eval --lam-grid diversity=0:1:3"])
def test_json_goes_to_stdout(name, work):
    code, out, err = fastalign(*argued(name, "--out", "-"))
    assert code == 0 and json.loads(out)["kind"] in ("palette", "report", "lam_grid") and err
    assert "give --out - or --json, not both" in refused(*argued(name, "--out", "-", "--json"))
    assert not Path("-").exists()


@pytest.mark.parametrize("name", ["sample", "score", "select", "soup", "train dpo"])
def test_other_outputs_do_not(name, work):
    assert "out must be a path; - is stdout, for the JSON of map and eval" in refused(*argued(name, "--out", "-"))


@pytest.mark.parametrize("option", ["--html", "--figures"])
def test_what_is_written_beside_the_output_is_held_to_the_same(option, work):
    requested = argued("eval", "--out", "out.json")
    assert "is an input" in refused(*requested, option, "selected.parquet", "--overwrite")
    assert "must be different" in refused(*requested, option, "out.json")
    beside = Path("beside")
    if option == "--html":
        beside.write_text("precious")
    else:
        beside.mkdir()
        (beside / "levels.svg").write_text("precious")
    before = contents(work)
    assert "is not what this command wrote" in refused(*requested, option, beside)
    assert contents(work) == before
    assert fastalign(*requested, option, beside, "--overwrite")[0] == 0
    written = contents(work)
    code, _, err = fastalign(*requested, option, beside)
    assert code == 0 and "already there" in err and contents(work) == written
    (beside if option == "--html" else beside / "levels.svg").write_text("changed")
    assert "is not what this command wrote" in refused(*requested, option, beside)


def test_every_command_that_writes_says_how_to_overwrite():
    import typer

    from fastalign.cli.main import app

    group = typer.main.get_group(app)
    result = {name: one for name, one in group.commands.items() if not hasattr(one, "commands")}
    result |= {f"train {name}": one for name, one in group.commands["train"].commands.items()}
    writing = {name for name, one in result.items() if any(p.name == "out" for p in one.params)}
    assert writing == {name for name, one in result.items() if any(p.name == "overwrite" for p in one.params)}
    # Of several of these; of none.
    assert {name.partition(" --")[0] for name in COMMANDS} == writing - {"demo", "bench"}


def test_a_job_is_its_settings_and_the_content_of_its_inputs(work):
    job = outputs.Job("x", {"a": "prompts.txt", "model": "model0", "hub": "some/name"}, {"k": (1, 2)})
    record = job.record()
    shutil.move("prompts.txt", "moved.txt")
    shutil.copytree("model0", "copied")
    again = outputs.Job("x", {"a": "moved.txt", "model": "copied", "hub": "some/name"}, {"k": [1, 2]}).record()
    assert record == again and outputs.differing(record, again) is None
    assert outputs.differing(record, {**again, "k": [1, 3]}) == "k"
    with pytest.raises(UserError, match=r"^moved.txt: is an input, and cannot be the output$"):
        outputs.claim("moved.txt", outputs.Job("x", {"a": "moved.txt"}), overwrite=True)


@pytest.mark.slow_matrix
@every_command
def test_what_is_printed_as_json(name, work):
    code, out, err = fastalign(*argued(name, "--out", "out", "--json"))
    assert code == 0, err
    result = json.loads(out)  # and nothing else is on stdout
    assert isinstance(result, dict) and result
    again = json.loads(fastalign(*argued(name, "--out", "out", "--json"))[1])  # from what is there
    if name not in ("soup",):  # which tells what it moved
        assert again == result


def test_json_of_info():
    assert json.loads(fastalign("info", "--json")[1])["fastalign"]


def test_an_infeasible_palette_has_a_code_of_its_own(work):
    requested = ["map", "scored.parquet", "--palette", "9,9"]
    code, out, err = fastalign(*requested, "--out", "out")
    assert code == 3 and "infeasible" in out and not err
    assert fastalign(*requested, "--out", "out")[0] == 3  # also of what is there
    assert json.loads(Path("out").read_text())["feasible"] is False
    assert fastalign(*requested, "--out", "out", "--allow-infeasible")[0] == 0
    code, out, _ = fastalign(*requested, "--out", "out", "--json")
    assert code == 3 and json.loads(out)["feasible"] is False
    code, shown, _ = fastalign("select", "scored.parquet", "--palette", "out", "--out", "picked")
    assert code == 0 and "out: infeasible; its λ is for a point just inside" in shown


def test_lines_are_not_folded_where_no_terminal_is(work):
    code, out, _ = fastalign(*argued("pareto", "--out", "a folder with a long name" * 6))
    assert code == 0 and "a folder with a long name" * 6 + "/pareto.html" in out


@pytest.mark.parametrize(
    "requested",
    [
        argued("eval", "--html", "page.html", "--figures", "figures"),
        argued("map", "--plot", "figures"),
        argued("pareto"),
    ],
    ids=["eval", "map", "pareto"],
)
def test_what_an_interrupted_run_left_beside_its_output_is_taken_for_its_own(requested, work, monkeypatch):
    from fastalign.report import figures as plots

    save, saved = plots.save, []

    def interrupted(figure, path):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path)
        save(figure, path)

    with monkeypatch.context() as patch:
        patch.setattr(plots, "save", interrupted)
        assert fastalign(*requested, "--out", "out")[0] == 130
    assert len(saved) == 2
    code, _, err = fastalign(*requested, "--out", "out")
    assert code in (0, 3), err
    assert "already there" in fastalign(*requested, "--out", "out")[2]


def test_two_runs_of_score_into_one_file_do_not_meet(work, monkeypatch):
    from fastalign import rewards
    from fastalign.jobs import align as pipeline

    score = rewards.score

    def meanwhile(*arguments, **options):
        with pytest.raises(UserError, match=r"^out: another run is writing it$"):
            pipeline.score("candidates.parquet", ["readability"], "out", overwrite=True)
        return score(*arguments, **options)

    monkeypatch.setattr(rewards, "score", meanwhile)
    before = set(contents(work))
    pipeline.score("candidates.parquet", ["diversity"], "out")
    assert set(contents(work)) - before == {"out"} and not Path("out.parts").exists()


def test_a_hard_link_of_an_input_s_file_is_no_output(work):
    os.link("model0/model.safetensors", "weights")
    assert "weights: is model0/model.safetensors, of an input" in refused(
        *argued("sample", "--out", "weights", "--overwrite")
    )


def test_an_interrupted_overwriting_leaves_the_old_output_and_mixes_nothing(work, monkeypatch):
    def texts():
        return Candidates.from_parquet("out").texts

    small = ["--batch-size", 2]
    old, new = argued("sample", "--out", "out", *small), argued("sample", "--seed", 1, "--out", "out", *small)
    assert fastalign(*old)[0] == 0 and fastalign(*argued("sample", "--seed", 1, "--out", "other"))[0] == 0
    before, other = texts(), Candidates.from_parquet("other").texts
    write, written = Candidates.to_parquet, []

    def interrupted(self, path):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(Candidates, "to_parquet", interrupted)
        assert fastalign(*new, "--overwrite")[0] == 130
    assert texts() == before and len(list(Path("out.parts").glob("*.parquet"))) == 2
    code, _, err = fastalign(*old)
    assert code == 0 and "already there" in err and texts() == before
    assert "out was made with seed=0, this run has 1" in refused(*new)
    assert "out.parts was made with seed=1, this run has 0" in refused("sample", "--more", 1, "--out", "out")
    code, _, err = fastalign(*new, "--overwrite")
    assert code == 0 and "resuming from the 2 batches" in err
    assert texts() == other and not Path("out.parts").exists()


def test_more_drops_what_another_run_left_unfinished_only_with_overwrite(work, monkeypatch):
    assert fastalign(*argued("sample", "--out", "out"))[0] == 0
    before = Candidates.from_parquet("out").texts
    with monkeypatch.context() as patch:
        write = Candidates.to_parquet
        patch.setattr(
            Candidates, "to_parquet", lambda self, path: write(self, path) if "out.parts" in str(path) else 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            fastalign("sample", "--more", 1, "--out", "out")
    assert "was made with more=1, this run has 2" in refused("sample", "--more", 2, "--out", "out")
    assert fastalign("sample", "--more", 2, "--out", "out", "--overwrite")[0] == 0
    assert [row[:2] for row in Candidates.from_parquet("out").texts] == before
    assert Candidates.from_parquet("out").n == 4 and not Path("out.parts").exists()


@every_command
def test_the_base_of_an_adapter_is_an_input(name, work):
    if not any(word.startswith("model") for word in inputs_of(name)):
        pytest.skip("takes no model")
    Path("adapter").mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "model0"}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    arguments = ["adapter" if word in ("model0", "model1") else word for word in argued(name)]
    before = contents(work)
    assert "is an input" in refused(*arguments, "--out", "model0", "--overwrite")
    assert "lies in model0, an input" in refused(*arguments, "--out", "model0/model.safetensors", "--overwrite")
    assert contents(work) == before


def test_soups_that_are_there_are_reported(work):
    command = argued("soup-front", "--out", "front")
    assert "already there" not in fastalign(*command)[2]
    code, _, err = fastalign(*command)
    assert code == 0 and err == "fastalign: front: 2 soups already there, measured with the same settings\n"
