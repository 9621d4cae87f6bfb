"""`fastalign train distill | dpo | grpo | ppo | reward` as a user types them, on tiny models; resumption, and one line
for each mistake."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from tiny import tiny_folder
from turns import on_its_day
from typer.testing import CliRunner

from fastalign import rewards
from fastalign._base.errors import UserError
from fastalign.cli.main import app
from fastalign.data import preferences
from fastalign.decode import Candidates
from fastalign.jobs import ppo as several_values
from fastalign.jobs import run as runs
from fastalign.models.loading import load_causal_lm

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [
    "tell me a story",
    "why",
    "hello world",
    "who sat on the mat",
    "write a review",
    "what is good",
    "thank you",
    "no",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTALIGN_CACHE", str(tmp_path / "cache"))


def fastalign(*arguments):
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.stdout.split()), result.stderr  # lines are folded at the terminal's width


def refused(*arguments):
    code, _, err = fastalign(*arguments)
    assert code == 1, err
    assert err.startswith("fastalign: ") and err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"), scale=2.0)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("chat"), chat=True, scale=2.0)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    texts = [[f"the {word} {i}" for word in ("cat sat", "dog", "fox ran under", "hat")] for i in range(len(PROMPTS))]
    empty = [[[] for _ in row] for row in texts]
    length = np.array([[len(text) for text in row] for row in texts])
    whole = Candidates(PROMPTS, texts, empty, empty, rewards={"length": length, "short": -0.5 * length})
    path = tmp_path_factory.mktemp("scored") / "scored.parquet"
    whole.to_parquet(path)
    return path


def run(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def drawn(model, tmp_path_factory):
    """Candidates of the model itself, with rewards."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    few = ["-n", 4, "--max-new-tokens", 6]
    run("sample", "--model", model, "--prompts", folder / "prompts.txt", *few, "--out", folder / "c.parquet")
    run("score", folder / "c.parquet", "--rewards", "diversity,readability", "--out", folder / "s.parquet")
    return folder / "s.parquet"


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": p, "chosen": " very good", "rejected": " bad, " + p} for p in PROMPTS]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def score_by_length(name="long", sign=1.0):
    return rewards.from_function(lambda prompts, texts: np.array([sign * len(t) for t in texts], np.float32), name=name)


@pytest.fixture(autouse=True)
def known_rewards():
    from fastalign.rewards import registry

    for name, sign in (("long", 1.0), ("brief", -1.0)):
        rewards.register(name, lambda name=name, sign=sign: score_by_length(name, sign), replace=True)
    yield
    for name in ("long", "brief"):
        registry._entries.pop(name)
        registry._instances.pop(name, None)


def test_dpo_from_a_scored_file_and_its_palette(model, scored, tmp_path):
    palette = tmp_path / "palette.json"
    palette.write_text(json.dumps({"kind": "palette", "values": ["short"], "lambda": [2.0]}))
    out = tmp_path / "out"
    code, stdout, err = fastalign("dpo", "--data", scored, "--palette", palette, "--model", model, "--out", out,
                                "--learning-rate", "1e-2", "--batch-size", 4, "--epochs", 4, "--beta", "0.5",
                                "--precompute-ref")  # fmt: skip
    assert code == 0 and "8 steps on 8 pairs" in stdout and "tokens/s" in err
    rows = [row for row in log(out) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and rows[-1]["loss"] < 0.5
    assert rows[-1]["rewards/accuracies"] == 1.0 and rows[-1]["tokens_per_second"] > 0
    result = json.loads((out / "result.json").read_text())
    assert result["accuracy"] == 1.0 and result["settings"]["beta"] == 0.5
    assert not (out / "checkpoints").exists()
    trained, tokenizer = load_causal_lm(out)
    before, _ = load_causal_lm(model)
    # λ on "short" alone: the dog is the shortest of each prompt's four, the fox the longest.
    text = tokenizer("why the dog 1", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert trained(text, labels=text).loss < before(text, labels=text).loss
    assert "give --lam or --palette with a scored file only" in refused(
        "dpo", "--data", "bundled", "--lam", "1", "--model", model, "--out", out
    )


def test_dpo_lora_and_losses_on_messages(chat_model, pairs, tmp_path):
    out = tmp_path / "out"
    code, stdout, _ = fastalign("dpo", "--data", pairs, "--model", chat_model, "--out", out, "--lora-r", 2,
                              "--max-steps", 2, "--loss-type", "ipo, sft", "--learning-rate", "1e-2")  # fmt: skip
    assert code == 0 and "2 steps" in stdout
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    trained, _ = load_causal_lm(out)
    before, _ = load_causal_lm(chat_model)
    moved = [
        name
        for (name, a), b in zip(trained.state_dict().items(), before.state_dict().values(), strict=True)
        if not torch.equal(a, b)
    ]
    assert moved and all("q_proj" in name or "v_proj" in name for name in moved)


def test_reward_from_pairs_to_scores(model, pairs, tmp_path):
    out, page = tmp_path / "reward", tmp_path / "r.html"
    code, stdout, _ = fastalign("reward", "--data", pairs, "--model", model, "--out", out, "--learning-rate", "1e-2",
                              "--epochs", 6, "--batch-size", 4, "--held-out", 0.25, "--report", page)  # fmt: skip
    assert code == 0 and "on 2 held-out pairs" in stdout
    reward = rewards.from_pairwise(str(out))
    better, worse = rewards.score(reward, [PROMPTS[0]] * 2, [" very good", " bad, why"])[:, 0]
    assert better > worse and reward.text == "plain"
    assert "<svg" in page.read_text()
    report = json.loads((out / "report.json").read_text())
    assert report["values"][0]["pairs"] == 2 and report["values"][0]["reliability"]
    # and straight on as a value of PPO
    result = several_values.read_values([str(out), "long"])
    assert [value.name for value in result] == ["pairwise", "long"]


def test_reward_with_several_heads_and_lora(chat_model, tmp_path):
    data, out = tmp_path / "pairs.csv", tmp_path / "reward"
    rows = preferences.PreferencePairs(
        [
            {"prompt": p, "chosen": "very good", "rejected": "bad " + p, "kind": 1, "brief": -1 if i % 2 else None}
            for i, p in enumerate(PROMPTS)
        ]
    )
    rows.to_parquet(data.with_suffix(".parquet"))
    code, stdout, _ = fastalign("reward", "--data", data.with_suffix(".parquet"), "--values", "kind,brief", "--model",
                              chat_model, "--out", out, "--lora-r", 2, "--learning-rate", "1e-2", "--center", "0.01",
                              "--held-out", 0.5)  # fmt: skip
    assert code == 0 and "kind" in stdout and "brief" in stdout
    heads = several_values.read_values([f"{out}#brief", str(out) + "#kind"])
    assert [head.name for head in heads] == ["brief", "kind"] and heads[0].text == "chat"
    assert np.isfinite(rewards.score(heads, PROMPTS, PROMPTS)).all()
    with pytest.raises(UserError, match="has no head 'other', it has kind, brief"):
        several_values.read_values([f"{out}#other"])


def loss_of(scored, lam):
    """-Σ w log p0 of a scored file's candidates by what their sampler recorded, the mean over the prompts."""
    whole = Candidates.from_parquet(scored, kind="scored")
    weights = np.exp(whole.reward_array(list(lam)) @ np.array(list(lam.values())))
    log_probs = np.array([[sum(one) for one in row] for row in whole.logprobs])
    return float(-(weights / weights.sum(1, keepdims=True) * log_probs).sum(1).mean())


def test_distill_a_scored_file_and_its_palette(model, drawn, tmp_path):
    palette, out = tmp_path / "palette.json", tmp_path / "out"
    palette.write_text(json.dumps({"kind": "palette", "values": ["diversity"], "lambda": [3.0]}))
    given = ["distill", drawn, "--palette", palette, "--model", model, "--out", out]
    code, stdout, err = fastalign(*given, "--batch-size", 8, "--epochs", 6, "--learning-rate", "1e-2")
    assert code == 0 and "6 steps on 32 candidates of 8 prompts, ESS " in stdout and "tokens/s" in err
    rows = [row for row in log(out) if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(loss_of(drawn, {"diversity": 3.0}), rel=1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"] and 1 <= rows[0]["ess"] <= 4 and rows[0]["num_tokens"] > 32
    result = json.loads((out / "result.json").read_text())
    assert result["loss"]["first"][0] == rows[0]["loss"] and result["loss"]["last"][0] == rows[-1]["loss"]
    assert result["ess"] == pytest.approx(rows[0]["ess"]) and result["settings"]["learning_rate"] == 0.01
    load_causal_lm(out)
    assert not (out / "checkpoints").exists() and "another model" not in err


@pytest.mark.parametrize("lora", [[], ["--lora-r", 2]], ids=["whole", "lora"])
@pytest.mark.parametrize("chat", [[], ["--no-chat"]], ids=["template", "text"])
def test_distilling_begins_where_the_candidates_were_drawn(chat_model, chat, lora, tmp_path):
    """The prompts are those that the sampler saw, of text and of messages, with the chat template or without it."""
    prompts, scored, out = tmp_path / "prompts.jsonl", tmp_path / "s.parquet", tmp_path / "out"
    prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in PROMPTS[:4]))
    if not chat:
        messages = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "the"}]  # to be continued
        with prompts.open("a") as file:
            file.write("\n" + json.dumps({"prompt": messages}))
    few = ["--model", chat_model, "--prompts", prompts, "-n", 3, "--max-new-tokens", 6]
    run("sample", *few, *chat, "--out", tmp_path / "c.parquet")
    run("score", tmp_path / "c.parquet", "--rewards", "diversity", "--out", scored)
    given = ["distill", scored, "--lam", 2, "--model", chat_model, "--out", out, "--batch-size", 8, *lora]
    assert fastalign(*given)[0] == 0
    first = log(out)[0]
    assert first["loss"] == pytest.approx(loss_of(scored, {"diversity": 2.0}), rel=1e-4)
    assert first["learning_rate"] == (1e-4 if lora else 1e-5)


def test_distill_rows_of_a_file(chat_model, tmp_path):
    """Texts, with weights; the same prompts as messages."""
    rows = [{"prompt": text, "completions": [" yes", " no"], "weights": [2, 1]} for text in PROMPTS[:4]]
    said = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    losses = []
    for name, content in (("text", rows), ("messages", said)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
        out = tmp_path / name
        code, stdout, err = fastalign("distill", tmp_path / f"{name}.jsonl", "--model", chat_model, "--out", out)
        assert code == 0 and "1 step on 8 candidates of 4 prompts, ESS 1.8" in stdout and "another model" not in err
        losses.append(log(out)[0]["loss"])
    assert losses[0] == losses[1]


def test_candidates_of_another_model_are_said_to_be(chat_model, drawn, tmp_path):
    given = ["distill", drawn, "--lam", "diversity=1", "--model", chat_model, "--out", tmp_path / "out"]
    code, _, err = fastalign(*given)
    assert code == 0 and f"{drawn}: its candidates were drawn from another model, " in err


PPO = ["--batch-size", 4, "--max-new-tokens", 6, "--learning-rate", "1e-3"]


def test_ppo_on_two_values_by_the_classic_options(model, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("\n".join(PROMPTS))
    code, stdout, err = fastalign(
        "ppo", "--lam_list", "1.0,0.25", "--value_list", "long,brief", "--model_name", model, "--data_name", prompts,
        "--save_path", out, "--learning_rate", "1e-3", "--batch_size", 4, "--mini_batch_size", 2, "--nepoch", 2,
        "--max-new-tokens", 6,
    )  # fmt: skip
    assert code == 0 and "4 steps" in stdout and "long" in stdout and "tokens/s" in err
    rows = log(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["values"]["long"] == -row["values"]["brief"]
        assert row["score"] == pytest.approx(0.75 * row["values"]["long"], rel=1e-5)
        assert row["tokens_per_second"] > 0 and "kl" in row
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and rows[-1]["kl"] != 0
    result = json.loads((out / "result.json").read_text())
    assert result["values"]["long"]["first"][0] == rows[0]["values"]["long"] and result["steps"] == 4
    load_causal_lm(out)  # what the other commands read
    assert (out / "value_head" / "model.safetensors").is_file() and not (out / "checkpoints").exists()


def test_ppo_follows_its_weights(model, tmp_path):
    """The same start, opposite weights: the length of responses goes opposite ways."""
    last = {}
    for lam in ("1,0", "0,1"):
        out = tmp_path / lam
        code, _, _ = fastalign("ppo", "--values", "long,brief", "--lam", lam, "--model", model, "--out", out,
                               "--max-steps", 25, "--limit", 16, "--batch-size", 16, "--max-new-tokens", 8,
                               "--learning-rate", "5e-3", "--init-kl-coef", "0.01")  # fmt: skip
        assert code == 0
        rows = log(out)
        last[lam] = np.mean([row["values"]["long"] for row in rows[-5:]]) - np.mean(
            [row["values"]["long"] for row in rows[:3]]
        )
    assert last["1,0"] - last["0,1"] > 2, last


GRPO = ["--num-generations", 2, "--batch-size", 4, "--max-new-tokens", 6, "--learning-rate", "1e-3"]


def test_grpo_on_two_values(model, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("\n".join(PROMPTS))
    code, stdout, err = fastalign(
        "grpo", "--values", "long,brief", "--lam", "long=1,brief=0.25", "--model", model, "--prompts", prompts, "--out",
        out, *GRPO, "--advantage", "gdpo", "--beta", "0.1", "--epochs", 2,
    )  # fmt: skip
    assert code == 0 and "long" in stdout and "KL" in stdout and "tokens/s" in err
    rows = [row for row in log(out) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(PROMPTS) + 1))
    for row in rows:
        long, brief = row["rewards/long/mean"], row["rewards/brief/mean"]
        assert long == -brief and row["reward"] == pytest.approx(0.75 * long, rel=1e-5)
    result = json.loads((out / "result.json").read_text())
    assert result["values"]["long"]["first"][0] == rows[0]["rewards/long/mean"] and result["steps"] == len(rows)
    assert result["tokens_per_second"] > 0 and all(row.get("tokens_per_second", 1) > 0 for row in log(out))
    load_causal_lm(out)
    assert not (out / "checkpoints").exists()


def test_grpo_lora_palette_and_chat(chat_model, tmp_path):
    palette, out = tmp_path / "palette.json", tmp_path / "out"
    palette.write_text(json.dumps({"kind": "palette", "values": ["brief", "long"], "lambda": [0.5, 1.5]}))
    given = ["--palette", palette, "--model", chat_model, "--out", out, *GRPO, "--limit", 4, "--lora-r", 2]
    code, _, _ = fastalign("grpo", *given)
    assert code == 0 and (out / "adapter" / "adapter_model.safetensors").is_file()
    assert log(out)[0]["reward"] == pytest.approx(log(out)[0]["rewards/long/mean"], rel=1e-5)
    load_causal_lm(out)


def test_ppo_lora_palette_and_chat(chat_model, tmp_path):
    palette, out = tmp_path / "palette.json", tmp_path / "out"
    palette.write_text(json.dumps({"kind": "palette", "values": ["brief", "long"], "lambda": [0.5, 1.5]}))
    code, _, _ = fastalign(
        "ppo", "--palette", palette, "--model", chat_model, "--out", out, *PPO, "--limit", 8, "--lora-r", 2
    )
    assert code == 0 and (out / "adapter" / "adapter_model.safetensors").is_file()
    assert log(out)[0]["score"] == pytest.approx(log(out)[0]["values"]["long"], rel=1e-5)
    load_causal_lm(out)


def test_ppo_on_film_reviews(model, tmp_path, monkeypatch):
    import datasets

    seen = []
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, split: datasets.Dataset.from_list(
            [{"text": f"the cat {i} sat on a big red mat and then ran", "label": 1} for i in range(4)]
        ),
    )
    rewards.register(
        "spy",
        lambda: rewards.from_function(lambda p, r: seen.extend(p) or np.zeros(len(p), np.float32), name="spy"),
        replace=True,
    )
    try:
        code, _, _ = fastalign(
            "ppo",
            "--values",
            "spy,long",
            "--lam",
            "spy=1,long=1",
            "--model",
            model,
            "--data",
            "imdb",
            "--out",
            tmp_path / "o",
            *PPO,
        )
        assert code == 0 and set(seen) == {f"the cat {i} sat on a big red" for i in range(4)}
    finally:
        rewards.registry._entries.pop("spy")
        rewards.registry._instances.pop("spy", None)


def same(a, b):
    first, second = load_causal_lm(a)[0].state_dict(), load_causal_lm(b)[0].state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=on_its_day(f"ranks: train {kind}")) for kind in ("dpo", "distill")]
)
def test_two_processes_train_as_one(kind, model, pairs, drawn, tmp_path):
    """torchrun of the command: the log of one process with the same pairs, or prompts, a step."""
    given = {"dpo": ["dpo", "--data", pairs], "distill": ["distill", drawn, "--lam", "diversity=1"]}[kind]
    requested = [*given, "--model", model, "--learning-rate", "1e-2", "--max-steps", 3]
    assert fastalign(*requested, "--batch-size", 4, "--out", tmp_path / "one")[0] == 0
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "fastalign",
    ]
    done = subprocess.run(
        [*torchrun, "train", *map(str, requested), "--batch-size", "2", "--out", tmp_path / "two"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for name in ("loss", "grad_norm", "num_tokens", "rewards/margins" if kind == "dpo" else "ess"):
        expected = [row[name] for row in one if name in row]
        assert len(expected) == 3 and [row[name] for row in two if name in row] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=on_its_day(f"killed: train {kind}")) for kind in ("dpo", "ppo", "grpo", "distill")],
)
def test_killed_and_resumed_is_the_run_that_was_not(kind, model, pairs, drawn, tmp_path):
    """SIGKILL in the middle; --resume gives the same losses and the same weights."""
    if kind in ("dpo", "distill"):
        given = {"dpo": ["dpo", "--data", pairs], "distill": ["distill", drawn, "--lam", "diversity=1"]}[kind]
        requested = [*given, "--model", model, "--learning-rate", "1e-2", "--batch-size", 2, "--epochs", 3]
        requested += ["--save-steps", 2]
    else:
        requested = [kind, "--values", "readability,diversity", "--lam", "1,1", "--model", model, "--save-steps", 2]
        more = [*PPO, "--limit", 12, "--epochs", 4] if kind == "ppo" else [*GRPO, "--limit", 8, "--epochs", 3]
        requested += more if kind == "ppo" else [*more, "--num-iterations", 3, "--max-steps", 12]
    assert fastalign(*requested, "--out", tmp_path / "whole")[0] == 0
    out = tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "train", *map(str, requested), "--out", str(out)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 200
    while not (out / "log.jsonl").exists() or len(log(out)) < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0].decode()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (out / "checkpoints").is_dir() and not (out / "model.safetensors").exists()
    assert "was made with seed=0, this run has 1" in refused(*requested, "--out", out, "--seed", 1)
    assert fastalign(*requested, "--out", out, "--resume")[0] == 0
    key = "score" if kind == "ppo" else "loss"
    result, expected = (
        [(row["step"], row[key]) for row in log(folder) if key in row] for folder in (out, tmp_path / "whole")
    )
    assert result == expected and len(result) == 12
    assert same(out, tmp_path / "whole") and not (out / "checkpoints").exists()


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """A LoRA of the model, far from nothing."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(load_causal_lm(model)[0], LoraConfig(r=2, task_type="CAUSAL_LM"))
    wrapped.peft_config["default"].base_model_name_or_path = str(model)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=draw) * 0.3)
    path = tmp_path_factory.mktemp("adapter") / "lora"
    wrapped.save_pretrained(path)
    return path


@pytest.mark.slow_matrix
@pytest.mark.parametrize("lora", [[], ["--lora-r", 2]], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["dpo", "ppo", "grpo", "distill"])
def test_an_adapter_is_merged_and_trained(kind, lora, adapter, model, pairs, drawn, tmp_path):
    given = {
        "distill": [drawn, "--lam", "diversity=1", "--batch-size", 4],
        "dpo": ["--data", pairs, "--batch-size", 2],
        "ppo": ["--values", "readability", "--lam", 1, *PPO, "--limit", 12],
        "grpo": ["--values", "readability", "--lam", 1, *GRPO, "--limit", 12, "--beta", 0.1],
    }[kind]
    steps = [*given, *lora, "--model", adapter, "--max-steps", 2]
    code, _, err = fastalign(kind, *steps, "--learning-rate", "1e-12", "--out", tmp_path / "still")
    assert code == 0 and f"{adapter}: an adapter, is merged into its base before training\n" in err
    before = load_causal_lm(adapter)[0].merge_and_unload().state_dict()
    still = load_causal_lm(tmp_path / "still")[0].state_dict()
    for name, x in before.items():
        torch.testing.assert_close(still[name], x, rtol=1e-5, atol=1e-6)
    first = log(tmp_path / "still")[0]
    if kind != "distill":
        assert abs(first["loss"] - np.log(2) if kind == "dpo" else first["kl"]) < 1e-3  # from what was given
    assert fastalign(kind, *steps, "--learning-rate", "1e-2", "--out", tmp_path / "out")[0] == 0
    after = load_causal_lm(tmp_path / "out")[0].state_dict()
    assert sum(not torch.equal(after[name], x) for name, x in before.items()) > 3
    assert not (tmp_path / "out" / "adapter").exists()  # it would be one of a model without a name


@pytest.mark.parametrize("kind", ["dpo", "ppo", "grpo", "distill"])
def test_a_disk_without_room_for_the_model_is_reported_first(kind, model, pairs, drawn, tmp_path, monkeypatch):
    value = ["--values", "readability", "--lam", 1]
    given = {"dpo": ["--data", pairs], "ppo": [*value, *PPO], "grpo": [*value, *GRPO]}
    given = (given | {"distill": [drawn, "--lam", "diversity=1"]})[kind]
    usage = type(runs.shutil.disk_usage("/"))(10**9, 10**9 - 5, 5)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: usage)
    line = refused(kind, *given, "--model", model, "--out", tmp_path / "out")
    assert line.startswith(f"fastalign: {tmp_path / 'out'}: the model needs ") and "the disk has 5 B free" in line
    assert not (tmp_path / "out").exists()


def test_a_language_model_is_no_reward_model(model, tmp_path):
    line = refused("ppo", "--values", model, "--lam", 1, *PPO, "--model", model, "--out", tmp_path / "out")
    assert "must be a sequence classifier, there is no score.weight in it" in line


# The command, with a pause at each logged step, so that a signal comes in the middle.
SLOW = """
import sys, time, torch
torch.set_num_threads(1)
from fastalign.jobs import run
write = run.Run.log
run.Run.log = lambda self, row: (write(self, row), time.sleep(0.25))
sys.argv[0] = "fastalign"
from fastalign.cli.main import main
main()
"""


def test_mistakes_are_one_line(model, chat_model, scored, pairs, tmp_path):
    out = ["--out", tmp_path / "x"]
    on = ["--model", model, *out]
    dpo, ppo, grpo, reward = (["dpo", "--data"], ["ppo", *on], ["grpo", *on], ["reward", "--data"])
    empty, long = tmp_path / "empty.jsonl", tmp_path / "long.jsonl"
    empty.write_text('{"prompt": "a", "chosen": "b", "rejected": ""}')
    long.write_text(json.dumps({"prompt": "hello " * 50, "chosen": "b", "rejected": "c"}))
    candidates = tmp_path / "candidates.parquet"
    Candidates(["p"], [["a", "b"]], [[[], []]], [[[], []]]).to_parquet(candidates)
    for command in (dpo, reward):
        assert "rejected must not be empty" in refused(*command, empty, *on)
        assert "no such file of pairs" in refused(*command, tmp_path / "none.csv", *on)
        assert "row 0: a prompt must be shorter than --max-length, 16 tokens" in refused(
            *command, long, *on, "--max-length", 16
        )
        assert "no such model folder" in refused(*command, pairs, "--model", tmp_path / "none", *out)
        assert "got kind 'candidates'" in refused(*command, candidates, *on)
        assert "--learning-rate must be positive" in refused(*command, pairs, *on, "--learning-rate", 0)
        assert "--batch-size must be an integer, at least 1" in refused(*command, pairs, *on, "--batch-size", 0)
        assert "--lora-r must be an integer, at least 1" in refused(*command, pairs, *on, "--lora-r", 0)
        assert "chat needs a chat template" in refused(*command, pairs, *on, "--chat")
        assert "give --lam or --palette to make pairs" in refused(*command, scored, *on)
    assert "elephant" in refused(*dpo, pairs, *on, "--loss-type", "elephant")
    assert "rewards that the file carries" in refused(*dpo, scored, *on, "--lam", "humor=1")
    assert "one weight per reward, 2" in refused(*dpo, scored, *on, "--lam", "1")
    assert "lam must be numbers, or name=number" in refused(*dpo, scored, *on, "--lam", "high")
    assert "give either --lam or --palette" in refused(*dpo, scored, *on, "--lam", "1,1", "--palette", empty)
    assert "must be a fastalign palette file" in refused(*dpo, scored, *on, "--palette", _json(tmp_path))
    assert "--held-out must be at least 0" in refused(*reward, pairs, *on, "--held-out", 1)
    assert "report needs held-out pairs" in refused(*reward, pairs, *on, "--held-out", 0, "--report", "r.html")
    assert "must have a column 'value', or one for each value, lacks a, b" in refused(
        *reward, pairs, *on, "--values", "a,b"
    )
    for command in (ppo, grpo):
        assert "unknown reward 'elephant'" in refused(*command, "--values", "elephant", "--lam", "1")
        assert "lam must have one weight per reward, 2 (long, brief)" in refused(
            *command, "--values", "long,brief", "--lam", "1"
        )
        assert "lam must weigh each of long once" in refused(*command, "--values", "long", "--lam", "brief=1")
        assert "lam must not be all zero" in refused(*command, "--values", "long", "--lam", "0")
        assert "give --lam" in refused(*command, "--values", "long")
        assert "give --values" in refused(*command, "--lam", "1")
    requested = [*ppo, "--values", "long", "--lam", "1"]
    assert "multiple of --mini-batch-size" in refused(*requested, "--batch-size", 4, "--mini-batch-size", 3)
    assert "dataset must have at least --batch-size" in refused(*requested, "--limit", 2, "--batch-size", 4)
    assert "must fit the model's 256 tokens" in refused(*requested, "--max-new-tokens", 300)
    assert "no such prompt file" in refused(*requested, "--data", tmp_path / "none.txt")
    assert "limit must be at least 1" in refused(*requested, "--limit", 0)
    asked = [*grpo, "--values", "long", "--lam", "1"]
    assert "--num-generations must be at least 2 and divide the 4 completions" in refused(
        *asked, "--batch-size", 4, "--num-generations", 3
    )
    assert "--prompts must be at least 2, for the 4 completions of a step, got 1" in refused(
        *asked, "--batch-size", 4, "--num-generations", 2, "--limit", 1
    )
    assert "--temperature must be a positive finite number, got 0.0" in refused(*asked, "--temperature", 0)
    assert "must leave room for a prompt in the model's context of 256" in refused(*asked, "--max-new-tokens", 300)
    assert "advantage must be one of" in refused(*asked, "--advantage", "elephant")
    assert "--loss-type must be one of" in refused(*asked, "--loss-type", "elephant")
    assert "--beta must be at least 0" in refused(*asked, "--beta", -1)
    assert "must be a folder, this is a file" in refused(
        "ppo", "--model", model, "--out", pairs, "--values", "long", "--lam", "1"
    )


def test_mistakes_of_distill_are_one_line(model, scored, drawn, pairs, tmp_path):
    given = ["--model", model, "--out", tmp_path / "x"]
    rows = tmp_path / "rows.jsonl"

    def says(row, message, *more):
        rows.write_text(json.dumps({"prompt": "a", "completions": [" b"]}) + "\n" + json.dumps(row))
        assert message in refused("distill", rows, *given, *more)

    says(
        {"prompt": "a", "completions": ["b"], "weights": [-1]}, f"{rows}: row 1: weights[0] must be at least 0, got -1"
    )
    says({"prompt": "a", "completions": []}, f"{rows}: row 1: completions must be a list of at least one candidate")
    says({"prompt": "hi " * 300, "completions": ["b"]}, "row 1: prompt and completion must fit the model's 256 tokens")
    says({"prompt": "a", "completions": ["b"]}, "give --lam or --palette with a scored file only", "--lam", 1)
    says({"prompt": "a", "completions": ["b"]}, "chat needs a chat template", "--chat")
    says({"prompt": [{"role": "user", "content": "a"}], "completion_ids": [[5]]}, "needs a chat template")
    assert "row 0: must have a prompt or prompt_ids, and" in refused("distill", pairs, *given)
    assert "no such file of rows" in refused("distill", tmp_path / "none.jsonl", *given)
    assert "give --lam or --palette to weigh the candidates" in refused("distill", drawn, *given)
    assert "give either --values and --lam, or --palette" in refused(
        "distill", drawn, *given, "--lam", "1,1", "--palette", _json(tmp_path)
    )
    assert "one weight per reward, 2 (diversity, readability)" in refused("distill", drawn, *given, "--lam", 1)
    assert "one weight per reward, 1 (diversity)" in refused(
        "distill", drawn, *given, "--values", "diversity", "--lam", "1,1"
    )
    assert "must be rewards of the candidates" in refused("distill", drawn, *given, "--values", "humor", "--lam", "1")
    assert "completion_ids[0] must have at least one token" in refused("distill", scored, *given, "--lam", "1,1")
    assert "--learning-rate must be positive" in refused("distill", drawn, *given, "--lam", "1,1", "--learning-rate", 0)
    assert "--batch-size must be an integer" in refused("distill", drawn, *given, "--lam", "1,1", "--batch-size", 0)
    assert not (tmp_path / "x").exists()


def _json(folder):
    path = folder / "other.json"
    path.write_text('{"kind": "report"}')
    return path


@pytest.mark.parametrize("command", ["distill", "dpo", "grpo", "ppo", "reward"])
def test_help_has_an_example(command):
    code, out, _ = fastalign(command, "--help")
    assert code == 0 and f"Example: fastalign train {command}" in out


def test_the_log_forgets_what_comes_after_the_checkpoint(tmp_path):
    run = runs.Run(tmp_path / "out", {"a": 1}, resume=False)
    run.begin(0)
    for step in (1, 2, 3):
        run.log({"step": step, "x": float("nan") if step == 2 else 0.5})
    with run.logs.open("a") as file:
        file.write('{"step": 4, "x"')
    (run.checkpoints / "step").mkdir(parents=True)
    os.close(run._lock)  # as of a killed run
    (run.checkpoints / "step-00000002").mkdir()
    (run.checkpoints / "step-00000002" / "state.json").touch()
    runs.Run(tmp_path / "out", {"a": 1}, resume=True).begin(2)
    assert [json.loads(line) for line in run.logs.read_text().splitlines()] == [{"step": 1, "x": 0.5}, {"step": 2}]


def ended(out, settings, text, **options):
    with runs.Run(out, settings, resume=False, **options) as run:
        run.begin(0)
        run.log({"step": 1})
        (out / "model.safetensors").write_text(text)
        return run.finish({"steps": 1})


@pytest.mark.parametrize("killed", [True, False])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_an_ended_run_is_kept_until_what_overwrites_it_has_ended(tmp_path, killed, checkpoint):
    out = tmp_path / "out"
    first = ended(out, {"a": 1}, "first")
    over = runs.Run(out, {"a": 2}, resume=False, overwrite=True)

    def half():
        over.begin(0)
        over.log({"step": 1})
        if checkpoint:
            (over.checkpoints / "step-00000001").mkdir(parents=True)
            (over.checkpoints / "step-00000001" / "state.json").touch()

    if killed:
        half()
        os.close(over._lock)
    else:
        with pytest.raises(KeyboardInterrupt), over:
            half()
            raise KeyboardInterrupt
    if checkpoint:
        assert runs.Run(out, {"a": 2}, resume=False).resumes
    assert runs.Run(out, {"a": 1}, resume=False).result == first
    assert log(out) == [{"step": 1}] and not (out / "previous").exists() and not over.checkpoints.exists()
    second = ended(out, {"a": 3}, "second", overwrite=True)
    assert runs.Run(out, {"a": 3}, resume=False).result == second and not (out / "previous").exists()


def test_other_processes_wait_until_an_ended_run_is_put_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = ended(out, {"a": 1}, "first")
    over = runs.Run(out, {"a": 2}, resume=False, overwrite=True)
    over.begin(0)
    os.close(over._lock)  # killed
    result, ranks = {}, {"MainThread": True, "other": False}
    monkeypatch.setattr(runs, "is_main", lambda: ranks[threading.current_thread().name])
    other = threading.Thread(target=lambda: result.update(r=runs.Run(out, {"a": 1}, resume=False).result), name="other")
    other.start()
    other.join(0.3)
    assert other.is_alive() and not result
    assert runs.Run(out, {"a": 1}, resume=False).result == first
    other.join(10)
    assert result["r"] == first


def test_how_the_reference_is_held_is_no_setting(tmp_path):
    """Earlier versions wrote it into run.json."""
    for had in ({"precompute_ref": True}, {}):
        with runs.Run(tmp_path / "out", {"a": 1}, resume=False) as run:
            run.begin(0)
            record = json.loads((run.out / "run.json").read_text())
            (run.out / "run.json").write_text(json.dumps({**record, "settings": {**record["settings"], **had}}))
            (run.checkpoints / "checkpoint-1").mkdir(parents=True, exist_ok=True)
            (run.checkpoints / "checkpoint-1" / "trainer_state.json").write_text("{}")
        assert runs.Run(tmp_path / "out", {"a": 1}, resume=False).resumes


def test_two_runs_into_one_folder(tmp_path):
    with runs.Run(tmp_path / "out", {"a": 1}, resume=False) as run:
        run.begin(0)
        with pytest.raises(UserError, match="another run is writing it"):
            runs.Run(tmp_path / "out", {"a": 1}, resume=False).begin(0)
    ended(tmp_path / "over", {"a": 1}, "first")
    with runs.Run(tmp_path / "over", {"a": 2}, resume=False, overwrite=True) as run:
        run.begin(0)
        # Nor is the ended one put back while it is overwritten.
        with pytest.raises(UserError, match="another run is writing it"):
            runs.Run(tmp_path / "over", {"a": 1}, resume=False)
        assert (tmp_path / "over" / "previous").is_dir() and run.finish({"steps": 1})["steps"] == 1


def test_a_finished_run_removes_its_checkpoints_and_nothing_else(tmp_path):
    run = runs.Run(tmp_path / "out", {}, resume=False)
    run.begin(0)
    for name in ("checkpoint-12", "step-00000003", ".step-00000004.77.partial", "mine", "checkpoint-best"):
        (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / name / "file").touch()
    run.finish({})
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["checkpoint-best", "mine"]


def test_summary_of_a_run():
    rows = [{"values": {"v": float(i)}, "kl": i / 10, "tokens_per_second": 10.0} for i in range(40)]
    result = several_values.summary(rows, ["v"])
    se = np.std(range(4), ddof=1) / 2
    assert result["values"]["v"] == {"first": [1.5, pytest.approx(se)], "last": [37.5, pytest.approx(se)]}
    assert result["kl"] == pytest.approx(3.75)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_curves_for_tensorboard(model, pairs, tmp_path):
    assert (
        fastalign(
            "ppo", "--values", "long", "--lam", "1", "--model", model, "--out", tmp_path / "p", *PPO, "--limit", 8
        )[0]
        == 0
    )
    assert fastalign("dpo", "--data", pairs, "--model", model, "--out", tmp_path / "d")[0] == 0
    for name in ("p", "d"):
        assert list((tmp_path / name / "runs").rglob("events.out.tfevents*"))
