"""RewardTrainer: TRL's numbers, a known rule learned, several values on one backbone, calibration, one line per
mistake."""

import json
import warnings

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from tiny import tiny_tokenizer

from fastalign import rewards
from fastalign._base.errors import UserError
from fastalign.data import preferences
from fastalign.losses import bradley_terry_loss
from fastalign.report import reward as reports
from fastalign.train import RewardConfig, RewardTrainer
from fastalign.train.reward import pair_loss

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def words():
    """A token for each word of the bundled pairs, so that texts are short and tests are too."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Whitespace()
    texts = [row[side] for row in preferences.bundled(300, rule="length") for side in ("prompt", "chosen", "rejected")]
    seen = dict.fromkeys(word for text in texts for word, _ in split.pre_tokenize_str(text))
    core = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *seen])}, unk_token="<unk>")
    )
    core.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def classifier(tokenizer, outputs=1, seed=0):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        initializer_range=0.05,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        num_labels=outputs,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForSequenceClassification(config)


def settings(folder, cls=RewardConfig, **options):
    fixed = {
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return cls(
        str(folder),
        **{**fixed, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "logging_steps": 1, **options},
    )


PAIRS = [
    {"prompt": "tell me", "chosen": " very good", "rejected": " bad"},
    {"prompt": "tell me a story", "chosen": " the cat sat", "rejected": " no"},
    {"prompt": "why", "chosen": " thank you", "rejected": " the dog ran under the house"},
    {"prompt": "hello", "chosen": " hello world", "rejected": " what"},
] * 6


@pytest.mark.parametrize("options", [{}, {"margin": True, "center_rewards_coefficient": 0.1}])
def test_losses_are_trls(tokenizer, tmp_path, options):
    options = dict(options)
    rows = [{**row, "margin": 0.1 * i} for i, row in enumerate(PAIRS)] if options.pop("margin", False) else PAIRS
    logs = []
    for trainer_class, config_class in ((trl.RewardTrainer, trl.RewardConfig), (RewardTrainer, RewardConfig)):
        args = settings(tmp_path, config_class, learning_rate=1e-2, **options)
        trainer = trainer_class(
            classifier(tokenizer),
            args,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:16]),
            processing_class=tokenizer,
        )
        trainer.train()
        logs.append((trainer.state.log_history, trainer.evaluate()))
    (theirs, their_eval), (ours, our_eval) = logs
    assert len(ours) == len(theirs) == 9 + 2
    for a, b in zip(theirs[:9], ours[:9], strict=True):
        for name in (
            "loss",
            "grad_norm",
            "accuracy",
            "margin",
            "min_reward",
            "mean_reward",
            "max_reward",
            "num_tokens",
        ):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=2e-6), name
    for name in ("eval_loss", "eval_accuracy", "eval_margin", "eval_mean_reward"):
        assert our_eval[name] == pytest.approx(their_eval[name], rel=1e-4, abs=2e-6), name


def test_pair_loss_is_the_mean_over_all_that_is_said():
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 5, 3, dtype=torch.float64)
    preference = torch.tensor([[1, -1, 0], [0, 0, 0], [1, 1, 1], [-2, 0.5, 0], [0, 0, -1.0]])
    margin = torch.rand(5, dtype=torch.float64)
    terms = []
    for i in range(5):
        for j in range(3):
            if sign := preference[i, j].sign().item():
                terms.append(-torch.nn.functional.logsigmoid(sign * (chosen - rejected)[i, j] - margin[i]))
    assert pair_loss(chosen, rejected, preference, margin).item() == pytest.approx(
        torch.stack(terms).mean().item(), abs=1e-12
    )
    one = pair_loss(chosen[:, :1], rejected[:, :1], torch.ones(5, 1), None, 0.3)
    assert one.item() == pytest.approx(bradley_terry_loss(chosen[:, 0], rejected[:, 0], center_coefficient=0.3).item())
    none = pair_loss(chosen.requires_grad_(), rejected, torch.zeros(5, 3))
    none.backward()
    assert none.item() == 0 and not chosen.grad.any()


@pytest.fixture(scope="module")
def learned(words, tmp_path_factory):
    """One backbone, two values with known rules (length, and VADER's sentiment), and what is held out."""
    pytest.importorskip("vaderSentiment")
    tokenizer = words
    folder = tmp_path_factory.mktemp("reward")
    data = {rule: preferences.bundled(1600, rule=rule, seed=seed) for seed, rule in enumerate(("length", "positive"))}
    train, test = [], []
    for name, pairs in data.items():
        parts = pairs.split(0.2, seed=0)
        for rows, part in zip((train, test), parts, strict=True):
            rows += [{**row, "value": name} for row in part]
    args = settings(
        folder / "run",
        values=["length", "positive"],
        learning_rate=5e-3,
        num_train_epochs=4,
        logging_steps=50,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        lr_scheduler_type="cosine",
        warmup_steps=5,
    )
    trainer = RewardTrainer(
        classifier(tokenizer, 2),
        args,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(test),
        tokenizer=tokenizer,
    )
    trainer.train()
    trainer.model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return trainer, test, folder / "model"


def test_known_rules_are_learned(learned):
    trainer, test, _ = learned
    result = trainer.evaluate()
    assert result["eval_accuracy/length"] >= 0.9 and result["eval_accuracy/positive"] >= 0.9, result
    mean = sum(result[f"eval_accuracy/{row['value']}"] for row in test) / len(test)
    assert result["eval_accuracy"] == pytest.approx(mean)
    assert 0 <= result["eval_calibration_error"] < 0.15
    assert any("accuracy/length" in entry for entry in trainer.state.log_history)


def test_the_result_scores_by_rewards(learned):
    trainer, test, folder = learned
    heads = rewards.from_heads(str(folder))
    assert [head.name for head in heads] == ["length", "positive"] and heads[0].text == "plain"
    prompts = [row["prompt"] for row in test]
    sides = [rewards.score(heads, prompts, [row[side] for row in test]) for side in ("chosen", "rejected")]
    result = trainer.predict(trainer.eval_dataset)
    np.testing.assert_allclose(np.stack(sides, 1), result.predictions, atol=1e-5)
    # The second head read nothing of its own: the first told it all.
    forward, calls = heads[0].model.forward, []
    heads[0].model.forward = lambda **inputs: calls.append(1) or forward(**inputs)
    fresh = [prompt + "?" for prompt in prompts[:4]]
    first = heads[1](fresh, ["a"] * 4)
    assert calls == [1]
    heads[0](fresh, ["a"] * 4)
    assert calls == [1] and heads[1](fresh, ["a"] * 4).tolist() == first.tolist()
    with pytest.raises(UserError, match="must have 1 output, got 2; for one of several heads there is from_heads"):
        rewards.from_pairwise(str(folder))
    with pytest.raises(UserError, match="names must name each of the model's 2 outputs once"):
        rewards.from_heads(str(folder), names=["one"])


def test_report(learned, tmp_path):
    trainer, test, _ = learned
    report = trainer.report(settings={"model": "tiny <b>"})
    result = trainer.evaluate()
    for head in report.heads:
        assert head.accuracy == pytest.approx(result[f"eval_accuracy/{head.name}"])
        assert sum(row.count for row in head.reliability) == head.pairs == sum(r["value"] == head.name for r in test)
        assert head.log_loss == pytest.approx(np.logaddexp(0, head.worse - head.better).mean())
    json.dumps(report.to_json(), allow_nan=False)
    pytest.importorskip("matplotlib")
    report.write(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 2 and "tiny &lt;b&gt;" in page and "Calibration error" in page
    report.write(tmp_path / "r.png")
    assert {path.name for path in tmp_path.glob("*.png")} == {"r-scores.png", "r-reliability.png"}
    with pytest.raises(UserError, match="report must end in"):
        report.write(tmp_path / "r.txt")


def test_calibration_by_hand():
    """Eight pairs of margin log 4.2 (p = 4.2 / 5.2), six of them right; two of margin 0, which count half."""
    margin = np.array([np.log(4.2)] * 6 + [-np.log(4.2)] * 2 + [0.0] * 2)[:, None]
    (head,) = reports.build(margin, np.zeros((10, 1)), ["v"]).heads
    assert head.accuracy == pytest.approx(0.7) and head.margin == pytest.approx(0.4 * np.log(4.2))
    assert head.calibration_error == pytest.approx(0.8 * abs(0.75 - 4.2 / 5.2))
    assert [(row.low, row.high, row.count) for row in head.reliability] == [(0.5, 0.55, 2), (0.8, 0.85, 8)]
    (turned,) = reports.build(-margin, np.zeros((10, 1)), ["v"], preference=-np.ones((10, 1))).heads
    assert turned.accuracy == head.accuracy and turned.calibration_error == pytest.approx(head.calibration_error)
    (empty,) = reports.build(margin, margin, ["v"], preference=np.zeros((10, 1))).heads
    assert empty.pairs == 0 and empty.accuracy == 0
    with pytest.raises(UserError, match="chosen must be finite"):
        reports.build(np.full((1, 1), np.nan), np.zeros((1, 1)), ["v"])


def test_one_head_plugs_into_from_pairwise_with_messages(tmp_path):
    chat = tiny_tokenizer(chat=True)
    rows = Dataset.from_list([preferences.as_chat(row) for row in PAIRS])
    args = settings(tmp_path, values=["kind"])
    trainer = RewardTrainer(classifier(chat), args, train_dataset=rows, eval_dataset=rows, processing_class=chat)
    trainer.train()
    model = trainer.model.eval()
    reward = rewards.from_pairwise(model, chat)
    assert reward.text == "chat" and model.config.id2label == {0: "kind"}
    scores = rewards.score(reward, [row["prompt"] for row in PAIRS[:4]], [row["chosen"] for row in PAIRS[:4]])
    np.testing.assert_allclose(scores, trainer.predict(trainer.eval_dataset).predictions[:4, 0], atol=1e-5)
    assert trainer.evaluate(rows)["eval_accuracy"] == trainer.evaluate()["eval_accuracy"]


def test_a_column_for_each_value_and_lora(tokenizer, tmp_path):
    from peft import LoraConfig

    lines = [
        {"kind": 1, "short": -1},
        {"kind": None, "short": 2.5},
        {"kind": 0, "short": 1},
        {"kind": -3, "short": None},
    ]
    rows = Dataset.from_list([{**row, **lines[i % 4]} for i, row in enumerate(PAIRS)])
    args = settings(tmp_path, values=["kind", "short"], learning_rate=1e-2)
    trainer = RewardTrainer(
        classifier(tokenizer, 2),
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]),
    )
    assert trainer.train_dataset[0]["preference"] == [1, -1] and trainer.train_dataset[3]["preference"] == [-1, 0]
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert any("lora" in name for name in moved) and any("score" in name for name in moved)
    assert all("lora" in name or "score" in name for name in moved)


def test_a_run_goes_on_where_it_stopped(tokenizer, tmp_path):
    def run(resume, steps):
        args = settings(tmp_path / "run", max_steps=steps, save_strategy="steps", save_steps=3, learning_rate=1e-2)
        trainer = RewardTrainer(
            classifier(tokenizer), args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer
        )
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = run(None, 6)
    assert run(str(tmp_path / "run" / "checkpoint-3"), 6) == pytest.approx(whole, rel=1e-6)


def test_mistakes(tokenizer, tmp_path):
    def make(rows=PAIRS, outputs=1, tokenizer=tokenizer, **options):
        return RewardTrainer(
            classifier(tokenizer, outputs),
            settings(tmp_path, **options),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )

    tagged = [{**row, "value": "a"} for row in PAIRS]
    bare = tiny_tokenizer()
    bare.pad_token = bare.eos_token = None
    for call, message in [
        (lambda: make([{"prompt": "a", "chosen": "b"}]), "lacks rejected"),
        (lambda: make([PAIRS[0], {**PAIRS[0], "chosen": ""}]), "row 1 has one in chosen"),
        (lambda: make(outputs=2), r"one output per value, 1 \(pairwise\), got 2"),
        (lambda: make(values=["a", "b"]), r"one output per value, 2 \(a, b\), got 1"),
        (lambda: make(values=["a", "a"], outputs=2), "values must be different names"),
        (lambda: make(values=["a", "b"], outputs=2), "must have a column 'value', or one for each of a, b"),
        (
            lambda: make([*tagged, {**PAIRS[0], "value": "c"}], values=["a", "b"], outputs=2),
            "row 24: value must be one of a, b, got 'c'",
        ),
        (lambda: make([{**PAIRS[0], "a": "x", "b": "1"}], values=["a", "b"], outputs=2), "row 0: a must be a number"),
        (lambda: make(max_length=2), "no pair fits in max_length 2 tokens"),
        (lambda: make([preferences.as_chat(PAIRS[0])]), "messages need a tokenizer with a chat template"),
        (lambda: make(tokenizer=bare), "pad token or an eos token"),
        (lambda: RewardTrainer("tiny", tokenizer=tokenizer, processing_class=tokenizer), "the same argument"),
        (
            lambda: RewardTrainer(str(tmp_path / "none"), settings(tmp_path), train_dataset=Dataset.from_list(PAIRS)),
            "no such model folder",
        ),
    ]:
        with pytest.raises((UserError, FileNotFoundError), match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match=r"train: 12 of 24 pairs are longer than max_length 12 tokens"):
        make(max_length=12)


def test_a_model_by_name_gets_a_new_head(tokenizer, tmp_path):
    from tiny import tiny_folder

    folder = tiny_folder(tmp_path / "model")
    args = settings(tmp_path / "run", values=["a", "b"], max_steps=1)
    rows = Dataset.from_list([{**row, "value": "ab"[i % 2]} for i, row in enumerate(PAIRS)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer = RewardTrainer(str(folder), args, train_dataset=rows)
    assert trainer.model.config.num_labels == 2 and trainer.model.score.weight.shape[0] == 2
    trainer.train()
    assert np.isfinite(trainer.state.log_history[0]["loss"])


@pytest.mark.parametrize("names", [("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids")])
def test_pairs_that_are_tokenized_already(tokenizer, tmp_path, names):
    def losses(data):
        args = RewardConfig(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        )
        one = RewardTrainer(
            classifier(tokenizer), args, train_dataset=Dataset.from_list(data), processing_class=tokenizer
        )
        one.train()
        return [row["loss"] for row in one.state.log_history if "loss" in row]

    rows = [{"chosen": f"the cat sat {i}", "rejected": "a dog" + " ran" * i, "margin": 0.1 * i} for i in range(4)]
    ids = [
        {"margin": row["margin"]}
        | {
            name: tokenizer(row[side] + "</s>")["input_ids"]
            for name, side in zip(names, ("chosen", "rejected"), strict=True)
        }
        for row in rows
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL's, of the older names
        assert losses(ids) == losses(rows)
