"""Numbers that are none: refused where they come with the data, and a training that meets one stops before it changes
a weight."""

import json
import math

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from ppo_setup import rollouts, snapshot
from ppo_setup import trainer as ppo_trainer
from tiny import tiny_causal_lm, tiny_tokenizer

from fastalign import UserError
from fastalign.train import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

NAN, INF = float("nan"), float("inf")
PAIRS = [
    {"prompt": "the cat", "chosen": " sat", "rejected": " ran"},
    {"prompt": "a dog", "chosen": " saw", "rejected": " was"},
    {"prompt": "who is", "chosen": " big", "rejected": " red"},
    {"prompt": "tell me", "chosen": " yes", "rejected": " no"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTALIGN_CACHE", str(tmp_path / "cache"))


def classifier(tokenizer, outputs=1):
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, num_labels=outputs, **sizes)
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(config)


def trainer(kind, data, out, *, values=None, model=None, eval_data=None, **options):
    tokenizer = tiny_tokenizer()
    common = {"output_dir": str(out), "report_to": [], "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False}
    common |= {"save_strategy": "no", "disable_tqdm": True, "max_steps": 4, "learning_rate": 1e-3, "seed": 1} | options
    more = {"train_dataset": data, "eval_dataset": eval_data, "processing_class": tokenizer}
    if kind == "dpo":
        model = model or tiny_causal_lm(tokenizer, dtype=torch.float32, scale=3.0)
        reference = None if hasattr(data, "num_rows") else tiny_causal_lm(tokenizer, dtype=torch.float32)
        return DPOTrainer(model, reference, args=DPOConfig(gradient_checkpointing=False, **common), **more)
    model = model or classifier(tokenizer, len(values or [0]))
    return RewardTrainer(model, args=RewardConfig(values=values, gradient_checkpointing=False, **common), **more)


def with_column(name, values):
    return [{**row, name: value} for row, value in zip(PAIRS, values, strict=True)]


@pytest.mark.parametrize("kind", ["dpo", "reward"])
@pytest.mark.parametrize("column", ["margin", "weight"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset", "eval_dataset['b']"])
def test_numbers_of_a_data_set_are_finite(kind, column, value, where, tmp_path):
    bad, good = (Dataset.from_list(with_column(column, [0.5, 1.0, x, 0.0])) for x in (value, 1.0))
    evals = {"b": bad} if "b" in where else bad if "eval" in where else None
    with pytest.raises(UserError) as caught:
        trainer(kind, bad if where == "train_dataset" else good, tmp_path, eval_data=evals)
    assert str(caught.value) == f"{where} row 2: {column} must be a finite number, got {value}"


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_no_pair_weighs_less_than_nothing(kind, tmp_path):
    data = Dataset.from_list(with_column("weight", [0.5, 0.0, -1.0, 1.0]))
    with pytest.raises(UserError) as caught:
        trainer(kind, data, tmp_path)
    assert str(caught.value) == "train_dataset row 2: weight must be at least 0, got -1"


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_a_margin_that_is_null_is_0_and_a_weight_is_not(kind, tmp_path):
    losses = []
    for nothing in (None, 0.0):
        one = trainer(
            kind, Dataset.from_list(with_column("margin", [0.5, nothing, 1.0, nothing])), tmp_path, logging_steps=1
        )
        one.train()
        losses.append([row["loss"] for row in one.state.log_history if "loss" in row])
    assert losses[0] == losses[1] and all(map(math.isfinite, losses[0]))
    with pytest.raises(UserError, match="train_dataset row 1: weight must be a number, got nothing"):
        trainer(kind, Dataset.from_list(with_column("weight", [0.5, None, 1.0, None])), tmp_path)


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_a_stream_of_pairs_is_checked_as_it_comes(kind, tmp_path):
    data = IterableDataset.from_generator(lambda: iter(with_column("margin", [0.5, 1.0, NAN, 0.0])))
    with pytest.raises(UserError, match="margin must be a finite number, got nan"):
        trainer(kind, data, tmp_path).train()


@pytest.mark.parametrize("value", [NAN, INF])
def test_what_values_say_is_finite(value, tmp_path):
    data = Dataset.from_list([{**row, "a": 1.0, "b": value if i == 1 else -1.0} for i, row in enumerate(PAIRS)])
    with pytest.raises(UserError, match="row 1: b must be a number"):
        trainer("reward", data, tmp_path, values=["a", "b"])


def words(trainer_, row):
    """Tokens of one row's chosen completion that no other row has."""
    data = trainer_.train_dataset
    others = {
        t
        for i in range(len(data))
        if i != row
        for c in ("prompt_ids", "chosen_ids", "rejected_ids")
        if c in data.column_names
        for t in data[i][c]
    }
    return [t for t in data[row]["chosen_ids"] if t not in others]


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_a_loss_that_is_nan_stops_with_its_row(kind, tmp_path):
    one = trainer(kind, Dataset.from_list(PAIRS), tmp_path, save_strategy="steps", save_steps=1)
    with torch.no_grad():
        one.model.get_input_embeddings().weight[words(one, 2)[0]] = NAN
    with pytest.raises(UserError) as caught:
        one.train()
    message, step = str(caught.value), one.state.global_step
    assert message.startswith(f"step {step + 1}: the loss is nan on rows ") and "\n" not in message
    assert 2 in map(int, message.partition("on rows ")[2].partition(";")[0].split(", "))
    kept = f"checkpoint-{step}" if step else "no checkpoint was kept before"
    assert kept in message


@pytest.mark.slow_matrix
@pytest.mark.parametrize("kind", ["dpo", "reward"])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_gradient_that_is_none_changes_no_weight(kind, max_grad_norm, value, tmp_path):
    one = trainer(kind, Dataset.from_list(PAIRS), tmp_path, max_grad_norm=max_grad_norm, gradient_accumulation_steps=2)
    norm = next(p for name, p in one.model.named_parameters() if "norm" in name)
    norm.register_hook(lambda grad: grad * value)
    before = snapshot(one.model)
    with pytest.raises(
        UserError, match=r"step 1: the gradient's norm is (nan|inf) on rows 0, 1, 2, 3; .*no checkpoint"
    ):
        one.train()
    assert all(torch.equal(x, before[name]) for name, x in one.model.named_parameters())


def test_ppo_stops_at_a_value_that_is_none():
    one = ppo_trainer(optimizer="adam", rate=1e-3)
    with torch.no_grad():
        one.policy.v_head.summary.weight[0, 0] = NAN
    before = snapshot(one.policy)
    with pytest.raises(UserError, match=r"step 1: the value is nan on rows 0, 1, 2, 3; training stops"):
        one.step(*rollouts())
    assert all(torch.equal(x, before[name]) for name, x in one.policy.named_parameters() if not x.isnan().any())


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_ppo_stops_at_a_gradient_that_is_none(max_grad_norm, tmp_path):
    one = ppo_trainer(max_grad_norm=max_grad_norm, ppo_epochs=2, mini_batch_size=2)
    one.save_checkpoint(tmp_path)
    calls = []
    one.policy.v_head.summary.bias.register_hook(
        lambda grad: grad * (NAN if (calls.append(0) or len(calls)) == 3 else 1)
    )
    with pytest.raises(UserError, match=r"step 1: the gradient's norm is nan on rows \d, \d; .*step-00000000"):
        one.step(*rollouts())
    assert len(calls) == 3 and all(p.isfinite().all() for p in one.policy.parameters())


def test_the_command_ends_with_1_and_saves_nothing(tmp_path, monkeypatch):
    from tiny import tiny_folder
    from typer.testing import CliRunner

    from fastalign.cli.main import app

    folder = tiny_folder(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    monkeypatch.setattr(trl.DPOTrainer, "training_step", lambda *args, **kwargs: torch.tensor(NAN))
    command = ["train", "dpo", "--data", tmp_path / "pairs.jsonl", "--model", folder, "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, [*map(str, command), "--no-chat"])
    assert result.exit_code == 1 and "step 1: the loss is nan" in result.stderr + result.stdout
    assert not list((tmp_path / "out").glob("*.safetensors"))
