"""The commands as a user types them: the whole chain, resumption, and one line for each mistake."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import typer
from commands import fastalign, refused
from fastalign.bench.tables import figures
from tiny import tiny_folder
from turns import on_its_day
from typer.testing import CliRunner

from fastalign import rewards
from fastalign._base import files
from fastalign.backend import use_backend
from fastalign.cli import main as cli
from fastalign.cli.main import app
from fastalign.decode import Candidates
from fastalign.decode.shared_prompt import SharedPromptEngine
from fastalign.models import Verdict


def test_a_command_alone_is_what_it_is_among_the_others():
    group = typer.main.get_group(app)
    for name in group.commands:
        alone, among = (
            CliRunner().invoke(one, [name, "--help"], prog_name="fastalign") for one in (cli._only(name), app)
        )
        assert (alone.exit_code, alone.stdout) == (0, among.stdout), name
    assert cli._only("--help") is cli._only("sup") is cli._only(None) is app


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt number {i} of some words\n" for i in range(6)))
    return path


@pytest.fixture
def sampling(model, prompts, tmp_path):
    settings = ["--model", model, "--prompts", prompts, "-n", 8, "--max-new-tokens", 12, "--batch-size", 16]
    return ["sample", *settings, "--out", tmp_path / "candidates.parquet"]


@pytest.fixture
def scored(sampling, tmp_path):
    assert fastalign(*sampling)[0] == 0
    path = tmp_path / "scored.parquet"
    assert (
        fastalign("score", tmp_path / "candidates.parquet", "--rewards", "diversity,readability", "--out", path)[0] == 0
    )
    return path


def test_the_whole_chain(scored, tmp_path):
    assert sorted(path.name for path in tmp_path.iterdir()) == ["candidates.parquet", "prompts.txt", "scored.parquet"]
    whole = Candidates.from_parquet(scored)
    levels = whole.reward_array().reshape(-1, 2).mean(0) + 0.1 * whole.reward_array().reshape(-1, 2).std(0)
    text = f"diversity={levels[0]},readability={levels[1]}"
    code, out, _ = fastalign("map", scored, "--palette", text, "--out", tmp_path / "palette.json")
    assert code == 0 and "KKT residual" in out
    solution = json.loads((tmp_path / "palette.json").read_text())
    assert solution["feasible"] and solution["kind"] == "palette"
    assert (np.array(solution["levels"]) >= levels - 1e-6).all() and (np.array(solution["lambda"]) >= 0).all()
    chosen = ["select", scored, "--palette", tmp_path / "palette.json", "--k", 3]
    assert fastalign(*chosen, "--out", tmp_path / "selected.parquet")[0] == 0
    assert fastalign(*chosen, "--out", tmp_path / "again.parquet")[0] == 0
    picked = Candidates.from_parquet(tmp_path / "selected.parquet", kind="selected")
    assert picked.texts == Candidates.from_parquet(tmp_path / "again.parquet").texts  # a seed reproduces
    assert all(text in row for row, texts in zip(whole.texts, picked.texts, strict=True) for text in texts)
    evaluated = ["eval", scored, "--selected", tmp_path / "selected.parquet", "--palette", tmp_path / "palette.json"]
    code, out, _ = fastalign(
        *evaluated,
        "--out",
        tmp_path / "eval.json",
        "--html",
        tmp_path / "report.html",
        "--figures",
        tmp_path / "figures",
    )
    assert code == 0 and "realised" in out
    assert {path.name for path in (tmp_path / "figures").iterdir()} >= {
        "histograms.svg",
        "histograms.png",
        "pareto.svg",
    }
    assert json.loads((tmp_path / "eval.json").read_text())
    assert "<html" in (tmp_path / "report.html").read_text()


def test_an_infeasible_palette_is_reported_and_the_nearest_solved_for(scored, tmp_path):
    code, out, _ = fastalign("map", scored, "--palette", "0.99,5.0", "--out", tmp_path / "palette.json")
    assert out.index("infeasible") < out.index("to draw them: fastalign sample --more")
    solution = json.loads((tmp_path / "palette.json").read_text())
    assert code == 3 and "infeasible" in out and not solution["feasible"]
    assert solution["nearest"][1] < 5.0 and np.isfinite(solution["lambda"]).all()
    np.testing.assert_array_less(np.array(solution["solved_for"]) - 1e-6, np.array(solution["levels"]))
    first, second = solution["values"]
    shown = fastalign("map", scored, "--palette", f"{first}=9,rest=free", "--out", tmp_path / "free.json")[1]
    nearest = shown.partition("nearest ")[2].partition(". λ")[0]
    assert nearest.startswith(f"{first}=") and second not in nearest


def test_an_interrupted_run_keeps_its_batches_and_resumes_to_the_same_file(sampling, tmp_path, monkeypatch):
    # A trial has prompts of its own.
    monkeypatch.setattr("fastalign.decode.sampler.supports", lambda model: Verdict(True))
    fastalign(*sampling)
    out = tmp_path / "candidates.parquet"
    expected = Candidates.from_parquet(out)
    out.unlink()
    drawn, prefill = [], SharedPromptEngine.prefill

    def interrupted(self, prompts):
        if len(drawn) + len(prompts) > 5:  # of six: some are finished by then
            raise KeyboardInterrupt
        drawn.extend(prompts)
        return prefill(self, prompts)

    monkeypatch.setattr(SharedPromptEngine, "prefill", interrupted)
    code, _, err = fastalign(*sampling)
    assert code == 130 and "the same command resumes" in err and err.count("\n") == 1
    finished = len(list((tmp_path / "candidates.parquet.parts").glob("part-*")))
    assert not out.exists() and 1 <= finished <= 5
    assert "was made with seed=0, this run has 1" in refused(*sampling, "--seed", 1)
    again = []
    monkeypatch.setattr(
        SharedPromptEngine, "prefill", lambda self, prompts: again.extend(prompts) or prefill(self, prompts)
    )
    code, _, err = fastalign(*sampling)
    assert code == 0 and f"{out}: resuming from the {finished} batches" in err
    assert len(again) == len(expected.prompts) - finished  # what was finished is not drawn again
    result = Candidates.from_parquet(out)
    assert result.texts == expected.texts
    for row, other in zip(result.logprobs, expected.logprobs, strict=True):
        for a, b in zip(row, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert not (tmp_path / "candidates.parquet.parts").exists()
    monkeypatch.setattr(SharedPromptEngine, "prefill", interrupted)
    code, _, err = fastalign(*sampling)  # finished: nothing is drawn
    assert code == 0 and f"{out}: already there, with the same settings" in err


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(number, code, id=number.name, marks=on_its_day(f"signal: {number.name}"))
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143))
    ],
)
def test_a_real_interrupt_signal(number, code, model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a prompt, the {i}th\n" for i in range(400)))
    out = tmp_path / "c.parquet"
    command = [sys.executable, "-m", "fastalign", "sample", "--model", model, "--prompts", prompts]
    command += ["-n", "8", "--max-new-tokens", "24", "--batch-size", "8", "--out", out]
    # A suite that was started in the background ignores Ctrl-C, and so do its children.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    parts = tmp_path / "c.parquet.parts"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("part-*"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    err = process.communicate()[1]
    assert process.returncode == code, err
    assert "Traceback" not in err and "interrupted" in err
    assert len(list(parts.glob("part-*.parquet"))) >= 2 and not list(parts.glob(".*partial")) and not out.exists()


def test_a_full_disk_is_one_line_and_leaves_no_half_file(scored, tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(files, "_sync", full)
    assert "No space left on device" in refused("map", scored, "--quantile", 0.5, "--out", tmp_path / "palette.json")
    assert not list(tmp_path.glob("*palette*")) and not list(tmp_path.glob(".*partial"))


def test_mistakes_are_one_line(sampling, scored, model, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    out = ["--out", tmp_path / "x"]
    requested = ["sample", "--model", model, "--prompts"]
    assert "contains no prompts" in refused(*requested, empty, *out)
    assert "no such prompt file" in refused(*requested, tmp_path / "none.txt", *out)
    assert "no such model folder" in refused("sample", "--model", tmp_path / "none", "--prompts", "bundled", *out)
    assert "n must be an integer, at least 1, got 0" in refused(*sampling[:-2], *out, "-n", 0)
    assert "no such file" in refused("score", tmp_path / "none.parquet", "--rewards", "positive", *out)
    assert "elephant" in refused("score", tmp_path / "candidates.parquet", "--rewards", "elephant", *out)
    assert "palette must have 2 levels (diversity, readability), got 3" in refused(
        "map", scored, "--palette", "1,2,3", *out
    )
    assert "must name each of" in refused("map", scored, "--palette", "diversity=1,humor=2", *out)
    assert "palette must be numbers" in refused("map", scored, "--palette", "diversity=high,readability=1", *out)
    assert "either --palette or --quantile" in refused("map", scored, *out)
    assert "--quantile must lie between 0 and 1" in refused("map", scored, "--quantile", 1.5, *out)
    assert "rewards of the candidates" in refused("map", scored, "--quantile", 0.5, "--values", "humor", *out)
    assert "must be a fastalign scored file" in refused("map", tmp_path / "candidates.parquet", "--quantile", 0.5, *out)
    assert "contains no candidates" in refused("map", empty, "--quantile", 0.5, *out)
    assert "must be a fastalign palette file" in refused("select", scored, "--palette", _json(tmp_path), *out)
    whole = Candidates.from_parquet(scored)
    whole.rewards["diversity"] = np.full_like(whole.rewards["diversity"], np.nan)
    whole.to_parquet(tmp_path / "nan.parquet")
    assert "rewards must be finite, got nan" in refused("map", tmp_path / "nan.parquet", "--quantile", 0.5, *out)
    assert not (tmp_path / "x").exists()


def _json(folder):
    path = folder / "other.json"
    path.write_text('{"kind": "report"}')
    return path


@pytest.mark.parametrize(
    "command", ["demo", "sample", "score", "map", "select", "eval", "pareto", "soup", "bench", "info"]
)
def test_help_has_an_example(command):
    code, out, _ = fastalign(command, "--help")
    assert code == 0 and f"Example: fastalign {command}" in out


@on_its_day("bench")
def test_bench_writes_results_and_a_table(tmp_path, monkeypatch):
    assert fastalign("bench", "gae and 64", "--out", tmp_path)[0] == 0
    (result,) = json.loads((tmp_path / "bench.json").read_text())["benchmarks"]
    ratio = result["extra_info"]["ratio"]["Python loop over time"]["p50"]
    assert result["stats"]["median"] > 0 and f"**{figures(ratio)} ×**" in (tmp_path / "table.md").read_text()
    assert "exists; --overwrite measures again" in refused("bench", "gae", "--out", tmp_path)
    monkeypatch.setattr("fastalign.cli.bench.find_spec", lambda name: None)
    assert "pip install 'fastalign[bench]'" in refused("bench", "--out", tmp_path / "other")


def test_bench_knows_its_names_from_collection_alone(tmp_path):
    message = refused("bench", "elephant", "--out", tmp_path / "other")
    assert (
        "names must be losses, sampling, map, training, decode, soup or match a benchmark (pytest's -k), got 'elephant'"
        in message
    )
    assert not (tmp_path / "other").exists()


def test_info_tells_what_runs():
    code, out, _ = fastalign("info")
    assert code == 0
    description = rewards.available()["implicit"].description
    assert "[model=TUNED" in description  # brackets that are no markup
    for word in ("CPU backend", " linear_token_logprobs,", "map_statistics", "vaderSentiment", "positive", description):
        assert word in out
    with use_backend("reference"):
        assert "CPU backend  reference (FASTALIGN_BACKEND)" in fastalign("info")[1]


def test_the_command_line_s_warnings_are_one_line_each(monkeypatch, capsys):
    import warnings

    from fastalign.cli.command import warn_in_one_line

    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards
    warn_in_one_line()
    for file, expected in (
        (cli.__file__, "fastalign: two lines, \\x1b[31mred\n"),
        ("other.py", "other.py:3: RuntimeWarning: two lines,\n \x1b[31mred\n"),
    ):
        text = warnings.formatwarning(RuntimeWarning("two lines,\n \x1b[31mred"), RuntimeWarning, file, 3, "")
        assert text == expected


def test_more_candidates_are_those_of_a_larger_run(sampling, tmp_path, monkeypatch):
    out = tmp_path / "candidates.parquet"
    fastalign(*sampling)
    assert fastalign(*sampling[:-1], tmp_path / "whole.parquet", "-n", 14)[0] == 0
    whole, first = Candidates.from_parquet(tmp_path / "whole.parquet"), Candidates.from_parquet(out)
    assert [row[:8] for row in whole.texts] == first.texts  # a candidate does not depend on how many there are
    with monkeypatch.context() as patch:
        patch.setattr("fastalign.decode.sampler.supports", lambda model: Verdict(True))
        prefill, drawn = SharedPromptEngine.prefill, []

        def interrupted(self, prompts):
            if len(drawn) + len(prompts) > 5:
                raise KeyboardInterrupt
            drawn.extend(prompts)
            return prefill(self, prompts)

        patch.setattr(SharedPromptEngine, "prefill", interrupted)
        assert fastalign("sample", "--out", out, "--more", 6, "--batch-size", 16)[0] == 130
    assert Candidates.from_parquet(out).texts == first.texts
    code, shown, err = fastalign("sample", "--out", out, "--more", 6)
    assert code == 0 and "resuming from" in err and "6 prompts × 14 candidates" in shown
    added = Candidates.from_parquet(out)
    assert added.texts == whole.texts and added.settings == whole.settings
    assert "already there" in fastalign(*sampling, "-n", 14)[2]
    assert "--more must be at least 1, got 0" in refused("sample", "--out", out, "--more", 0)
    assert "no such file" in refused("sample", "--out", tmp_path / "none", "--more", 2)


def test_quiet_shows_results_and_errors_alone(tmp_path):
    rows = [{"prompt": f"p{i}", "response": f"r{j}", "a": i + j, "b": j * j} for i in range(4) for j in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["map", tmp_path / "rows.jsonl", "--quantile", 0.6, "--out", tmp_path / "p.json"]
    code, shown, err = fastalign(*command, "--quiet")
    assert code == 0 and "a" in shown and "KL" in shown and "candidates" not in shown and err == ""
    assert "candidates" in fastalign(*command, "--overwrite")[1]
    assert "already there" in fastalign(*command)[2] and fastalign(*command, "--quiet")[2] == ""
    assert "quantile must lie between" in refused(*command[:-1], tmp_path / "q.json", "--quantile", 2, "--quiet")


def test_python_callers_get_the_notes_by_logging(tmp_path, caplog):
    from fastalign._base import outputs

    with caplog.at_level("INFO", logger="fastalign"):
        outputs.say("a note")
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("fastalign", "a note")]


def test_more_is_refused_beside_what_it_does_not_go_by(tmp_path):
    """Every option but those of where, how fast and how it is told."""
    kept = {"out", "more", "resume", "overwrite", "device", "batch_size", "memory_limit", "as_json", "quiet", "help"}
    words = {"method": "rejection", "backend": "vllm", "palette": "p.json", "chat_template_arg": "a=b"}
    command = typer.main.get_group(app).commands["sample"]
    options = {one.name: one for one in command.params}
    assert kept - {"help"} < set(options) and len(options) > 25
    for name, one in options.items():
        if name not in kept:
            value = [] if getattr(one, "is_flag", False) else [words.get(name, "1")]
            line = refused("sample", "--out", tmp_path / "out", "--more", 2, one.opts[0], *value)
            assert line.endswith(f"own model, prompts and settings: leave out {one.opts[0]}\n"), line
    line = refused("sample", "--out", tmp_path / "out", "--more", 2, "--candidates", 4, "--seed", 0)
    assert line.endswith(": leave out -n, --seed\n")
    assert "no such file" in refused("sample", "--out", tmp_path / "none", "--more", 2, "--quiet")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--device", "tpu"], "device must be 'auto', 'cpu', 'cuda' or 'cuda:<n>', got 'tpu'"),
        (["--dtype", "int8"], "dtype must be 'auto', 'float32', 'bfloat16', 'float16' or 'float64', got 'int8'"),
        (["--ray", "bogus"], "--ray must be 'auto', 'local' or an address, host:port, got 'bogus'"),
        (["--ray", "auto", "--workers", 0], "--workers must be at least 1, got 0"),
        (["--worker-cpus", -1], "--worker-cpus must be at least 0, got -1.0"),
        (["--worker-gpus", 0], "workers are Ray's: give --ray auto or --ray ADDRESS with them"),
        (["--batch-size", 0], "--batch-size must be at least 1, got 0"),
        (["--memory-limit", "much"], "--memory-limit must be a size"),
    ],
)
def test_what_cannot_be_is_refused_though_the_output_is_there(sampling, wrong, message):
    assert fastalign(*sampling)[0] == 0
    assert message in refused(*sampling, *wrong)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("knobs", [["--batch-size", 1], ["--memory-limit", "1MB"]])
def test_a_stopped_run_resumes_in_less_memory(sampling, tmp_path, monkeypatch, shared, knobs):
    monkeypatch.setattr("fastalign.decode.sampler.supports", lambda model: Verdict(shared, "" if shared else "so"))
    assert fastalign(*sampling[:-1], tmp_path / "whole.parquet")[0] == 0
    write, written = Candidates.to_parquet, []

    def killed(self, path):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(Candidates, "to_parquet", killed)
        assert fastalign(*sampling)[0] == 130
    code, _, err = fastalign(*sampling, *knobs)
    assert code == 0 and "resuming from the 2 batches" in err, err
    whole, result = (Candidates.from_parquet(tmp_path / name) for name in ("whole.parquet", "candidates.parquet"))
    assert result.texts == whole.texts and result.settings["sampling"] == whole.settings["sampling"]
    assert "already there" in fastalign(*sampling)[2]
