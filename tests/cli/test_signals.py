"""Ctrl-C, SIGTERM and SIGKILL in the middle of the commands that take long: one line, what is done is kept, and the
same command goes on to what an uninterrupted one gives."""

import json
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import signalled
import torch
from tiny import tiny_folder
from typer.testing import CliRunner

from fastalign._base.errors import Terminated
from fastalign.cli.main import app
from fastalign.decode import Candidates
from fastalign.jobs.stopping import Stopping

pytestmark = pytest.mark.usefixtures("one_thread")

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
TRAINING = ("dpo", "reward", "ppo")
STEPS = 6


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The commands without their outputs, and where each is interrupted."""
    root = tmp_path_factory.mktemp("given")
    os.environ["FASTALIGN_CACHE"] = str(root / "cache")
    models = [tiny_folder(root / f"model{seed}", seed=seed, scale=2.0) for seed in range(2)]
    prompts, pairs = root / "prompts.txt", root / "pairs.jsonl"
    words = "cat dog fox hat mat house story review".split()
    prompts.write_text("".join(f"tell me of the {word}\n" for word in words))
    rows = [{"prompt": f"the {word}", "chosen": " very good " + word, "rejected": " bad"} for word in words]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    drawing = ["--prompts", prompts, "-n", 4, "--max-new-tokens", 8]
    training = ["--model", models[0], "--learning-rate", "1e-2", "--save-steps", 2]
    on_pairs = [*training, "--data", pairs, "--batch-size", 2, "--max-steps", STEPS]
    sample = ["sample", "--model", models[0], *drawing, "--batch-size", 8]
    assert CliRunner().invoke(app, [*map(str, sample), "--out", str(root / "c.parquet")]).exit_code == 0
    values = ["--values", "readability,diversity", "--lam", "1,1"]
    part, log = "fastalign.decode.candidates.Candidates.to_parquet", "fastalign.jobs.run.Run.log"
    return {
        "sample": (sample, part, 3),
        "score": (["score", root / "c.parquet", "--rewards", "diversity"], "fastalign.rewards.score", 1),
        "soup": (
            ["soup", *models, "--weights", "0.3,0.7", "--max-shard-size", "30kB"],
            "fastalign._base.work_folder.WorkFolder.made",
            3,
        ),
        "soup-front": (["soup-front", *models, *drawing, "--rewards", "diversity", "--grid", 3], part, 2),
        # The third step's log; at two steps a log, what it tells of the third step is still to come when the fourth
        # ends.
        "dpo": (["train", "dpo", *on_pairs], log, 3),
        "reward": (["train", "reward", *on_pairs, "--held-out", 0.25, "--log-steps", 4], log, 1),
        "ppo": (
            ["train", "ppo", *training, *values, "--data", prompts, "--batch-size", 4, "--max-new-tokens", 4,
             "--epochs", 3],
            log,
            3,
        ),
    }  # fmt: skip


def done(arguments, out):
    result = CliRunner().invoke(app, [*map(str, arguments), "--out", str(out)])
    assert result.exit_code == 0, result.output
    return result.stderr


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """What a command gives that nobody interrupts, made once."""
    made, root = {}, tmp_path_factory.mktemp("whole")

    def of(name):
        if name not in made:
            done(given[name][0], root / name)
            made[name] = content(name, root / name)
        return made[name]

    return of


def content(name, out):
    if name in ("sample", "score"):
        result = Candidates.from_parquet(out, kind=("candidates", "scored"))
        return result.texts, result.logprobs, {reward: x.tolist() for reward, x in result.rewards.items()}
    if name == "soup-front":
        return json.loads((out / "soups.json").read_text())
    files = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    assert files
    if name == "soup":
        return files
    rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    seen = ("step", "loss", "accuracy", "margin", "rewards/margins", "score", "kl", "loss/policy", "loss/value")
    return files, [{key: row[key] for key in seen if key in row} for row in rows if {"loss", "score"} & row.keys()]


@pytest.mark.slow_matrix
@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("name", ["sample", "score", "soup", "soup-front", *TRAINING])
def test_an_interrupted_command_run_again_gives_what_one_gives_that_was_not(name, number, given, whole, tmp_path):
    arguments, at, call = given[name]
    out = tmp_path / "out"
    log = tmp_path / "stderr"
    code = signalled.run([*arguments, "--out", out], log, at=at, call=call, number=number)
    message = log.read_text()
    assert code == CODES[number], message
    assert "Traceback" not in message
    lines = [line for line in message.splitlines() if line.startswith("fastalign: ")]
    if number == signal.SIGKILL:
        assert not lines
    elif name in TRAINING:
        (kept,) = (path for path in (out / "checkpoints").iterdir() if path.is_dir())
        step = {"dpo": 4, "reward": 2, "ppo": 3}[name]  # transformers logs after a step's end
        assert int(kept.name.rpartition("-")[2]) == step
        assert lines == [
            "fastalign: stopping after the current step; a second signal stops at once",
            f"fastalign: {out}: stopped; the same command resumes from {kept}",
        ]
    else:
        kept = "" if name == "score" else " are kept, and the same command resumes from them"
        assert len(lines) == 1 and lines[0].startswith("fastalign: interrupted") and lines[0].endswith(kept)
    assert name == "soup-front" or not (out.is_file() or list(out.glob("*.safetensors")))
    again = done(arguments, out)
    if name in ("sample", "dpo") or (name in TRAINING and number != signal.SIGKILL):
        assert "resuming from" in again
    assert content(name, out) == whole(name)
    beside = {path.name for path in tmp_path.iterdir()} - {"out", "stderr"}
    assert not beside and not (out / "checkpoints").exists()


@pytest.mark.parametrize("name", TRAINING)
def test_a_second_signal_ends_training_at_once(name, given, whole, tmp_path):
    arguments, at, _ = given[name]
    out, log = tmp_path / "out", tmp_path / "stderr"
    call = 2 if name == "reward" else 4  # logged as the step ends, before it is saved
    code = signalled.run([*arguments, "--out", out], log, at=at, call=call, number=signal.SIGTERM, times=2)
    (kept,) = (path for path in (out / "checkpoints").iterdir() if path.is_dir())
    assert code == 143 and int(kept.name.rpartition("-")[2]) == 2
    assert log.read_text().endswith(f"fastalign: {out}: stopped; the same command resumes from {kept}\n")
    assert "resuming from" in done([*arguments, "--resume"], out)
    assert content(name, out) == whole(name)


@pytest.mark.parametrize("name", TRAINING)
def test_stopped_after_the_last_step_it_goes_on_with_saving(name, given, whole, tmp_path):
    arguments, at, _ = given[name]
    out = tmp_path / "out"
    call = 3 if name == "reward" else STEPS
    code = signalled.run([*arguments, "--out", out], tmp_path / "e", at=at, call=call, number=signal.SIGINT)
    assert code == 130 and not list(out.glob("*.safetensors"))
    assert f"{STEPS} steps" not in done(arguments, out)
    assert content(name, out) == whole(name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("name", TRAINING)
def test_stopped_before_training_begins_nothing_stays(name, number, given, tmp_path):
    out, log = tmp_path / "out", tmp_path / "stderr"
    at = "fastalign.jobs.run.Run.begin"
    code = signalled.run([*given[name][0], "--out", out], log, at=at, call=1, number=number)
    assert code == CODES[number] and not out.exists()
    assert log.read_text() == f"fastalign: {out}: stopped before its first checkpoint\n"


def test_all_processes_stop_at_one_step():
    """Whichever of them had the signal, and though another had none."""
    alone = SimpleNamespace(num_processes=1)
    three = SimpleNamespace(num_processes=3, device="cpu", gather=lambda mine: torch.cat([mine, torch.tensor([0, 15])]))
    with Stopping() as stopping:
        assert not stopping.requested(alone)
        assert stopping.requested(three) and stopping.requested(alone)
        with pytest.raises(Terminated):
            stopping.end()


def test_handlers_are_put_back_and_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN), signal.getsignal(signal.SIGINT)
    try:
        with Stopping():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
            assert CliRunner().invoke(app, ["info"]).exit_code == 0
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before[0])
    with Stopping():
        pass
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_in_another_thread_no_signal_is_caught():
    seen = []

    def work():
        with Stopping() as stopping:
            seen.append(
                (CliRunner().invoke(app, ["info"]).exit_code, stopping.requested(SimpleNamespace(num_processes=1)))
            )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0, False)]
