"""Mistakes at the command line: each one line in the command line's words, and nothing left behind."""

import json
import sys
from typing import Annotated

import numpy as np
import pytest
import transformers
import typer
from tiny import tiny_folder, tiny_tokenizer
from typer.testing import CliRunner

from fastalign import UserError, decode, rewards
from fastalign.cli.command import registrar
from fastalign.cli.main import app
from fastalign.decode import Candidates
from fastalign.jobs import ppo as several_values
from fastalign.jobs import preference as jobs
from fastalign.jobs.pairs import preference_pairs
from fastalign.losses.preference import LOSS_TYPES
from fastalign.train import AutoModelForCausalLMWithValueHead
from fastalign.train.dpo import DPOConfig, DPOTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("cat sat", "dog", "fox ran under", "hat")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Files for commands: a model, a classifier and a body without a head, prompts, pairs, scored candidates."""
    root = tmp_path_factory.mktemp("given")
    tiny_folder(root / "model", scale=2.0)
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, num_labels=1, **sizes)
    for name, kind in (
        ("classifier", transformers.LlamaForSequenceClassification),
        ("tagger", transformers.LlamaForTokenClassification),
        ("body", transformers.LlamaModel),
    ):
        kind(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "adapter").mkdir()
    record = {"base_model_name_or_path": str(root / "model"), "peft_type": "LORA", "task_type": "SEQ_CLS"}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(record))
    (root / "prompts.txt").write_text("hello\nthe cat\nwho\nwhy")
    pairs = [{"prompt": f"the {word}", "chosen": " very good", "rejected": " bad"} for word in WORDS]
    (root / "palettes").mkdir()
    (root / "palettes" / "p.json").write_text(
        json.dumps({"kind": "palette", "version": 1, "values": ["x"], "lambda": [1]})
    )
    (root / "messages.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}')
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    texts = [[f"the {word} {i}" for word in WORDS] for i in range(6)]
    empty = [[[] for _ in row] for row in texts]
    length = np.array([[len(text) for text in row] for row in texts], dtype=np.float32)
    whole = Candidates([f"p {i}" for i in range(6)], texts, empty, empty, rewards={"length": length, "short": -length})
    whole.to_parquet(root / "scored.parquet")
    return root


@pytest.fixture
def run(given, tmp_path, monkeypatch):
    """A command in the folder of the files, its output "out" -> (exit code, stderr); and whether it left one."""
    monkeypatch.setenv("FASTALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(given)
    out = tmp_path / "out"

    def of(command, *more):
        result = CliRunner().invoke(app, [*command.split(), *map(str, more), "--out", str(out)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stderr

    of.out = out
    return of


@pytest.fixture
def refused(run):
    def of(command, *more):
        code, err = run(command, *more)
        assert code == 1 and err.startswith("fastalign: ") and err.count("\n") == 1, err
        assert not run.out.exists()
        return err.removeprefix("fastalign: ").rstrip("\n")

    return of


SAMPLE = "sample --prompts prompts.txt -n 2 --max-new-tokens 3"
DPO = "train dpo --data pairs.jsonl"
PPO = "train ppo --data prompts.txt --batch-size 2 --max-new-tokens 3"
REWARD = "train reward --model model --max-steps 2"
ON = "--model model"


@pytest.mark.parametrize("command", [SAMPLE, DPO, f"{PPO} --values diversity --lam 1"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("classifier", "classifier: must be a causal language model, this is a LlamaForSequenceClassification"),
        ("tagger", "tagger: must be a causal language model, this is a LlamaForTokenClassification"),
        ("body", "body: must be a causal language model, there is no lm_head.weight in it"),
        ("adapter", "adapter: must be an adapter of a causal language model, its task_type is SEQ_CLS"),
    ],
)
def test_what_is_no_language_model_is_no_policy(refused, command, model, message):
    assert refused(f"{command} --model {model}") == message


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("classifier", "must be a causal language model, this is a LlamaForSequenceClassification"),
        ("tagger", "must be a causal language model, this is a LlamaForTokenClassification"),
        ("body", "must be a causal language model, a LlamaModel has no head"),
        ("adapter", "must be an adapter of a causal language model, its task_type is SEQ_CLS"),
    ],
)
def test_and_so_where_python_names_it(given, model, message):
    path = given / model
    args = DPOConfig(output_dir=str(given / "none"), report_to=[], bf16=False, use_cpu=True)
    for call in (
        lambda: AutoModelForCausalLMWithValueHead.from_pretrained(path),
        lambda: DPOTrainer(str(path), args=args),
        lambda: DPOTrainer(str(given / "model"), str(path), args=args),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize("command", ["train dpo", "train reward", "train ppo --values diversity --lam 1"])
@pytest.mark.parametrize("wrong", [("--batch-size", 0), ("--learning-rate", 0), ("--save-steps", 0), ("--seed", -1)])
def test_numbers_are_checked_before_data_are_read(refused, command, wrong):
    message = refused(f"{command} --model model --data nobody/nothing", *wrong)
    assert message.startswith((f"{wrong[0]} must be", f"{wrong[0][2:].replace('-', '_')} must be")), message


LAM = [
    ({"lambda": [float("nan"), 1]}, "lambda[0] must be a finite number, got nan"),
    ({"lambda": [1, 1e200]}, "lambda[1] must lie within ±1e+100, got 1e+200"),
    ({"lambda": [1, None]}, "lambda[1] must be a number, got nothing"),
    ({"lambda": [1, "a"]}, "lambda[1] must be a number, got 'a'"),
    ({"lambda": [1]}, "lambda must be a list of 2, one for each value, got [1]"),
    ({}, "lacks 'lambda', which a palette file has; run `fastalign map` again, with --overwrite"),
]


@pytest.mark.parametrize(
    "command",
    [
        *(f"{SAMPLE} -n 16 --method {m}" for m in ("rejection", "adaptive", "particles")),
        PPO,
        "train dpo --data scored.parquet",
        "train reward --data scored.parquet",
    ],
)
@pytest.mark.parametrize(("lam", "message"), LAM)
def test_a_palette_s_lam_is_a_number_for_each_value(refused, command, lam, message, tmp_path):
    palette = tmp_path / "palette.json"
    palette.write_text(
        json.dumps({"kind": "palette", "version": 1, "values": ["diversity", "readability"], "kl": 1.0, **lam})
    )
    assert refused(f"{command} {ON} --palette", palette) == f"{palette}: {message}"


@pytest.mark.parametrize("command", ["train dpo --data scored.parquet", "train reward --data scored.parquet", PPO])
@pytest.mark.parametrize(
    ("lam", "message"),
    [
        ("1", "--lam must have one weight per reward, 2 ({}), got 1"),
        ("1,2,3", "--lam must have one weight per reward, 2 ({}), got 3"),
        ("nan,1", "--lam must be finite, got [nan, 1.0]"),
        ("{0}=inf,{1}=1", "--lam must be finite, got [inf, 1.0]"),
        *(
            (text, f"--lam must be numbers, or name=number each name once, comma-separated, got {text!r}")
            for text in ("", ",", "1,,1", "a,1", "=1", "length=", "length=1,length=2", "length=1,2")
        ),
    ],
)
def test_lam_on_the_command_line_is_a_number_for_each_value(refused, command, lam, message):
    names = ["diversity", "readability"] if command == PPO else ["length", "short"]
    values = ["--values", ",".join(names)] if command == PPO else []
    lam = lam.format(*names) if "{" in lam else lam
    assert refused(f"{command} {ON} --lam", lam, *values) == (
        message.format(", ".join(names)) if "{}" in message else message
    )


@pytest.mark.parametrize("lam", [[float("nan"), 1.0], [1.0], ["a", 1], None, [[1.0, 1.0]]])
def test_and_so_in_python(given, lam):
    values = ["diversity", "readability"]
    calls = [
        lambda: preference_pairs(given / "scored.parquet", lam=lam, seed=0),
        lambda: several_values.train_ppo(str(given / "model"), ["a"], values, lam, given / "none"),
    ]
    if lam is not None:  # of these it is optional
        drawing = {"n": 2, "lam": lam, "max_new_tokens": 2, "seed": 0}
        for draw, more in (
            (decode.best_of, {}),
            (decode.speculative_rejection, {}),
            (decode.particles, {"checkpoints": [1]}),
        ):
            calls.append(lambda draw=draw, more=more: draw(str(given / "model"), ["a"], values, **drawing, **more))
    for call in calls:
        with pytest.raises(UserError, match=r"^lam must "):
            call()
    assert not (given / "none").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{SAMPLE} {ON} --max-new-tokens 0", "--max-new-tokens must be an integer, at least 1, got 0"),
        (f"{SAMPLE} {ON} -n 0", "-n must be an integer, at least 1, got 0"),
        (f"{SAMPLE} {ON} --limit 0", "--limit must be at least 1, got 0"),
        (f"{SAMPLE} {ON} --chat-template-arg x", "--chat-template-arg must be name=value, each name once, got 'x'"),
        (f"{DPO} {ON} --learning-rate nan", "--learning-rate must be positive, got nan"),
        (f"{DPO} {ON} --epochs inf", "--epochs must be positive, got inf"),
        (f"{DPO} {ON} --log-steps 0", "--log-steps must be an integer, at least 1, got 0"),
        (f"{DPO} {ON} --max-steps 0", "--max-steps must be an integer, at least 1, got 0"),
        (f"{DPO} {ON} --seed -1", "--seed must be an integer, at least 0, got -1"),
        (f"{DPO} {ON} --chat", "--chat needs a chat template, and the model's tokenizer has none"),
        (f"{DPO} {ON} --loss-type ,", f"--loss-type must be of {', '.join(LOSS_TYPES)}, at least one, got none"),
        (f"{DPO} {ON} --loss-type ipo,nope", f"--loss-type must be of {', '.join(LOSS_TYPES)}, at least one, got nope"),
        (f"{DPO} {ON} --resume", "OUT: there is nothing to resume; leave out --resume to begin"),
        (f"{PPO} {ON} --values diversity --lam 1 --init-kl-coef nan",
         "--init-kl-coef must be at least 0 and finite, got nan"),
        (f"{PPO} {ON} --values diversity --lam 1 --kl-target 0", "--kl-target must be positive and finite, got 0.0"),
        (f"{PPO} {ON} --values diversity --lam 1 --seed -1", "--seed must be an integer, at least 0, got -1"),
        (f"{PPO} {ON} --values diversity --lam 1 --max-steps 0", "--max-steps must be an integer, at least 1, got 0"),
        (
            f"{PPO} {ON} --values diversity --lam 1 --mini-batch-size 3",
            "--batch-size must be a multiple of --mini-batch-size · --gradient-accumulation-steps = 3 · 1 = 3, got 2",
        ),
        (f"{REWARD} --data pairs.jsonl --center nan", "--center must be a finite number, got nan"),
        (f"{REWARD} --data pairs.jsonl --held-out nan", "--held-out must be at least 0 and below 1, got nan"),
        (f"{REWARD} --data pairs.jsonl --lam 1",
         "give --lam or --palette with a scored file only: pairs.jsonl contains pairs"),
        (f"{REWARD} --data scored.parquet",
         "give --lam or --palette to make pairs from a scored file, which scored.parquet is"),
        (
            f"{REWARD} --data scored.parquet --values length,humor",
            "--values must be rewards that the file carries (length, short), got humor",
        ),
        (f"{REWARD} --data scored.parquet --values ,",
         "--values must be names, comma-separated, at least one, got ','"),
        (
            f"{REWARD} --data scored.parquet --values length --lam 1,1",
            "give --values, a head for each, or --lam or --palette, for one head, not both",
        ),
        (
            "soup model model --weights 0.5,0.2",
            "--weights of a linear soup must sum to 1, got 0.7 (--normalize divides by the sum, --no-normalize keeps "
            "them)",
        ),
        (f"{SAMPLE} {ON} --column text",
         "--column must be left out for prompts.txt: its prompts are texts without columns, got 'text'"),
        (
            f"{PPO} {ON} --values diversity --lam 1 --split test",
            "--split must be left out for prompts.txt: it is no data set of the hub, got 'test'",
        ),
        (f"{SAMPLE} {ON} --max-new-tokens 9999",
         "prompt 0 is too long: 3 tokens + 9999 new exceed the model's context of 256"),
        ("map scored.parquet --quantile 2", "--quantile must lie between 0 and 1, got 2.0"),
        ("map scored.parquet --quantile nan", "--quantile must lie between 0 and 1, got nan"),
        ("map scored.parquet --palette rest=q101", "--palette must ask for quantiles from q0 to q100, got 'q101'"),
        (
            "map scored.parquet --palette palettes/p.json",
            "--palette must be levels, such as length=mean+1sd, got the file palettes/p.json: palette files go to "
            "`fastalign select`, `eval`, `pareto`, `sample` and `train`, as --palette",
        ),
        ("pareto scored.parquet --quantile 0.5,2", "--quantile must lie between 0 and 1, got 2.0"),
        ("pareto scored.parquet --n-lambda 0", "--n-lam must be at least 1, got 0"),
        ("soup model model --weights 0.5,,0.5", "--weights must be numbers, comma-separated, got '0.5,,0.5'"),
        ("soup model model --weights nan,1", "--weights must be finite numbers, got [nan, 1.0]"),
        ("soup model --extract --base model", "give --rank, or --energy, the share of the difference to keep"),
        (
            "soup --recipe palettes/p.json",
            "palettes/p.json: a recipe may have 'base', 'chat_template', 'dtype', 'force', 'grid', "
            "'max_shard_size', 'memory_limit', 'method', 'models', 'normalize', 'pad_to_multiple_of', 'parameters', "
            "'sidecar_from', 'tokenizer', 'weights', got 'kind'",
        ),
        (
            "soup-front model classifier --prompts prompts.txt --rewards diversity --grid 2",
            'config.json: architectures must be the same in all models, is ["LlamaForCausalLM"] in model and '
            '["LlamaForSequenceClassification"] in classifier',
        ),
        ("map scored.parquet", "give either --palette or --quantile"),
        (
            "map scored.parquet --quantile 0.5 --values nope",
            "--values must be rewards of the candidates (length, short), one at least, got nope",
        ),
        (
            "select scored.parquet --palette palettes/p.json",
            "palettes/p.json: has a target for x, but the rewards are length, short",
        ),
        ("select scored.parquet --palette palettes", "palettes: must be a file, this is a folder"),
        (f"{SAMPLE} {ON} -n {2**63}", f"-n must be an integer, in 1..2^63-1, got {2**63}"),
        (
            f"{SAMPLE} {ON} --chat-template-arg a=1 --no-chat",
            "a is an argument of chat templates, and none is used here",
        ),
        (
            "sample --prompts messages.jsonl -n 2 --model none/such/model --no-chat",
            "prompt 0 is a conversation, which needs a chat template: --no-chat leaves it out",
        ),
        (
            "sample --prompts scored.parquet --model none/such/model --column x",
            "scored.parquet: must have a column 'x', got prompt_id, candidate_id, prompt, text, token_ids, logprobs, "
            "reward:length, reward:short",
        ),
        ("score scored.parquet --rewards diversity,diversity", "--rewards must be different, got diversity, diversity"),
        (f"{DPO} {ON} --pairs-per-prompt 0", "--pairs-per-prompt must be an integer, at least 1, got 0"),
        (
            "train dpo --data scored.parquet --lam 1,0 --palette palettes/p.json --model model",
            "give either --lam or --palette",
        ),
        (f"{PPO} {ON} --values diversity", "give --lam, a weight for each value, or --palette"),
        (f"{PPO} {ON} --lam 1", "give --values, the rewards to train on, or --lam by name"),
        (
            f"{REWARD} --data pairs.jsonl --values a,b",
            "pairs.jsonl: must have a column 'value', or one for each value, lacks a, b",
        ),
        (f"{REWARD} --data pairs.jsonl --report page.txt", "--report must end in .html, .png or .svg, got 'page.txt'"),
        (f"{REWARD} --data none.jsonl --lam 1", "none.jsonl: no such file"),
        ("sample --prompts prompts.txt --model vllm:m --backend reference",
         "--backend reference is for models that fastalign runs: leave it out for vllm:m"),
        ("demo --seed -1", "--seed must be an integer, in 0..2^64-1, got -1"),
    ],
)  # fmt: skip
def test_in_the_command_line_s_words(refused, run, command, message):
    assert refused(command) == message.replace("OUT", str(run.out))


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("a/batch_size/b: no such file", "a/batch_size/b: no such file"),
        ("my_batch_size and batch_sizes", "my_batch_size and batch_sizes"),
        ("use force, or batch_size 3", "use force, or --rows 3"),
        ("force=True or force=False", "--force or no --force"),
        ("force needs sync=False", "--force needs --no-sync"),
    ],
)
def test_a_parameter_s_name_is_distinguished_from_other_words(message, text):
    lone = typer.Typer()

    @registrar(lone)("example")
    def show(
        batch_size: Annotated[int, typer.Option("--rows", "--batch_size")] = 1,
        force: Annotated[bool, typer.Option("--force")] = False,
        sync: Annotated[bool, typer.Option("--sync/--no-sync")] = True,
    ) -> None:
        raise UserError(message)

    assert CliRunner().invoke(lone, []).stderr == f"fastalign: {text}\n"


def test_a_reward_model_of_a_scored_file_by_each_value_or_by_lam(run):
    code, err = run(f"{REWARD} --data scored.parquet --values length,short --learning-rate 1e-2")
    assert code == 0, err
    heads = rewards.from_heads(str(run.out))
    assert [head.name for head in heads] == ["length", "short"]
    pairs = jobs.read_pairs("scored.parquet", values=["length", "short"])
    assert len(pairs) == 12 and pairs.settings["pairs"]["values"] == ["length", "short"]
    first, second = pairs[0], pairs[6]
    assert (first["value"], second["value"]) == ("length", "short")
    assert first["chosen"] == second["rejected"] == "the fox ran under 0"
    code, err = run(f"{REWARD} --data scored.parquet --lam length=2 --overwrite")
    assert code == 0, err
    assert rewards.from_pairwise(str(run.out)).name == "pairwise"


@pytest.mark.parametrize("answer", ["y", "n"])
def test_nothing_to_resume_asks_at_a_terminal(run, answer, monkeypatch):
    import fastalign.cli.command as commands

    requested = []
    monkeypatch.setattr(commands, "_ask", lambda question: requested.append(question) or answer == "y")
    code, err = run(f"{REWARD} --data pairs.jsonl --resume")
    assert requested == [f"{run.out}: there is nothing to resume; begin a run?"]
    assert code == (answer == "n") and run.out.exists() == (answer == "y"), err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sample --prompts prompts.txt -n 0", "-n must be an integer, at least 1, got 0"),
        ("sample --prompts prompts.txt --temperature -1", "temperature must be at least 0 (0 is greedy), got -1.0"),
        ("sample --prompts prompts.txt --top-p 2", "--top-p must lie in (0, 1], got 2.0"),
        ("sample --prompts prompts.txt --min-p nan", "--min-p must lie in [0, 1], got nan"),
        ("sample --prompts prompts.txt --dtype int8",
         "dtype must be 'auto', 'float32', 'bfloat16', 'float16' or 'float64', got 'int8'"),
        ("score none.parquet --rewards nope", "unknown reward 'nope'; available: "),
        ("soup-front model model --prompts none.txt --rewards nope", "unknown reward 'nope'; available: "),
        ("soup-front model model --prompts none.txt --rewards diversity --top-p 0",
         "--top-p must lie in (0, 1], got 0.0"),
        ("soup-front model model --prompts none.txt --rewards diversity --device tpu",
         "device must be 'auto', 'cpu', "),
        *((f"{command} {option} ,", f"{option} must be names, comma-separated, at least one, got ','")
          for command, option in (
            ("score none.parquet", "--rewards"), ("map none.parquet --quantile 0.5", "--values"),
            ("pareto none.parquet", "--values"), ("soup-front model model --prompts none.txt", "--rewards"),
        )),
    ],
)  # fmt: skip
def test_what_costs_nothing_to_check_comes_first(refused, monkeypatch, command, message):
    """Before files are read or torch is imported."""
    for heavy in ("fastalign.jobs.align", "fastalign.decode", "fastalign.soup", "fastalign.report.pareto", "torch"):
        if "map" not in command and "pareto" not in command:
            monkeypatch.setitem(sys.modules, heavy, None)  # to import it is an error
    assert message in refused(command + (" --model none" if command.startswith("sample") else ""))


@pytest.mark.parametrize("option", ["--prompts", "--values"])
def test_no_text_is_no_name(refused, option):
    command = ["sample --model model", "map scored.parquet --quantile 0.5"][option == "--values"]
    assert f"{option} must be " in refused(command, option, "")


def test_a_tilde_is_the_home_folder(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    requested = ["map", "scored.parquet", "--quantile", "0.5", "--allow-infeasible", "--out", "~/palette.json"]
    result = CliRunner().invoke(app, requested)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "palette.json").is_file()


@pytest.mark.parametrize("fault", [TypeError, ValueError, KeyError, RuntimeError, ImportError])
def test_a_fault_of_ours_shows_its_traceback(fault):
    lone = typer.Typer()

    @registrar(lone)("x")
    def broken() -> None:
        raise fault("len() of a number")

    result = CliRunner().invoke(lone, [])
    assert type(result.exception) is fault
    assert result.stderr == "fastalign: this is a bug in fastalign; please report it with the traceback below\n"
