"""DistillTrainer against a plain float64 reference in which each candidate runs alone; its fixed point; what it
refuses."""

import itertools

import causal_models
import numpy as np
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from tiny import tiny_causal_lm, tiny_folder, tiny_tokenizer
from transformers import AutoModelForCausalLM

from fastalign import UserError
from fastalign.train import DistillConfig, DistillTrainer
from fastalign.train.distill import Candidate
from fastalign.train.distill_data import Encoder

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(count=6):
    """Candidates of several lengths, which share beginnings; weights that do not sum to 1."""
    draw = np.random.default_rng(0)
    made = []
    for i in range(count):
        prompt = draw.integers(5, 300, 4 + 3 * (i % 3)).tolist()
        ids = [draw.integers(5, 300, 2 + (i + j) % 5).tolist() for j in range(4)]
        ids[1] = [*ids[0], *ids[1]]
        made.append({"prompt_ids": prompt, "completion_ids": ids, "weights": draw.exponential(size=4).tolist()})
    return made


def trainer(model, out, data=None, *, more=None, **options):
    common = {"output_dir": str(out), "report_to": [], "logging_steps": 1, "per_device_train_batch_size": 2}
    common |= {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2, "max_steps": 3}
    args = DistillConfig(**common | options)
    data = rows() if data is None else data
    return DistillTrainer(model, args, data, processing_class=tiny_tokenizer(), **more or {})


def logs(trained):
    return [row for row in trained.state.log_history if "loss" in row]


def plain_loss(model, row):
    """-Σ w log π, or half the variance of log w - log π/p0; each candidate run alone."""
    weights, log_probs = torch.tensor(row["weights"], dtype=torch.float64), []
    for ids in row["completion_ids"]:
        logits = model(torch.tensor([[*row["prompt_ids"], *ids]])).logits[0, len(row["prompt_ids"]) - 1 : -1]
        log_probs.append(logits.log_softmax(-1)[range(len(ids)), ids].sum())
    if row.get("ref_logprobs") is None:
        return -(weights / weights.sum()) @ torch.stack(log_probs).double()
    lack = weights.log() - torch.stack(log_probs) + torch.tensor(row["ref_logprobs"], dtype=torch.float64)
    return lack.var(correction=0) / 2


def compared(some=slice(None)):
    """The rows, with the log-probabilities of another model; two candidates of one are equal."""
    draw, made = np.random.default_rng(1), rows()
    for row in made[some]:
        row["ref_logprobs"] = (-5 * len(row["completion_ids"][0]) - draw.exponential(size=4)).tolist()
        row["completion_ids"][3] = row["completion_ids"][2]
    return made


@pytest.mark.slow_matrix
@pytest.mark.parametrize("share", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("given", [rows(), compared(), compared(slice(2, 4))], ids=["weights", "refs", "refs of some"])
def test_one_step_equals_a_plain_float64_reference(given, kind, share, tmp_path):
    """All six prompts, in three batches and in parts of at most 30 tokens, less than one prompt's candidates take."""
    model, before = (causal_models.build(kind, torch.float64) for _ in range(2))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    t = trainer(
        model, tmp_path, given, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant",
        max_steps=1, gradient_accumulation_steps=3, share_prompt=share, max_packed_tokens=30,
    )  # fmt: skip
    assert t._packs == share
    t.train()
    loss = sum(plain_loss(before, row) for row in given) / 6
    loss.backward()
    (logged,) = logs(t)
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for (name, ours), p in zip(t.model.named_parameters(), before.parameters(), strict=True):
        if p.grad is not None:
            # Some norms compute in float32.
            assert (p.data - ours.data - p.grad).norm() < 1e-5 * p.grad.norm() + 1e-7, name
    weights = [np.array(row["weights"]) / sum(row["weights"]) for row in given]
    assert logged["ess"] == pytest.approx(np.mean([1 / (w**2).sum() for w in weights]))
    lengths = [len(ids) for row in given for ids in row["completion_ids"]]
    assert logged["completions/mean_length"] == pytest.approx(np.mean(lengths))
    assert logged["num_tokens"] == sum(lengths) + sum(len(row["prompt_ids"]) for row in given)


def test_a_candidate_of_weight_0_and_one_drawn_twice_change_nothing(tmp_path):
    """Weights count by their ratios, candidates by what they are."""
    plain = [{**row, "weights": [0.5, 0.25, 0.25, 0.0]} for row in rows()]
    twice = [{**row, "completion_ids": [*row["completion_ids"][:3], row["completion_ids"][0]]} for row in rows()]
    curves = []
    unweighted = [{**row, "weights": None} for row in twice]
    for data in (plain, unweighted, Dataset.from_list([{**row, "weights": [2.0] * 4} for row in twice])):
        t = trainer(tiny_causal_lm(dtype=torch.float32, scale=3.0), tmp_path, data)
        t.train()
        curves.append([row["loss"] for row in logs(t)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-6) and curves[2] == curves[1]
    assert logs(t)[0]["ess"] == pytest.approx(4)  # of the candidates as given


@pytest.mark.parametrize("refs", [False, True], ids=["weights", "refs"])
def test_it_converges_to_the_tilted_law(refs, tmp_path):
    """All sequences of two letters, weighted by p0 exp(λR), or by exp(λR) beside log p0: π becomes p_λ."""
    config = transformers.LlamaConfig(
        vocab_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight *= 20
    every = list(itertools.product(range(3), repeat=2))

    @torch.no_grad()
    def law():
        logits = model.eval()(torch.tensor([[3, *ids] for ids in every])).logits.log_softmax(-1)
        return np.exp([float(row[0, a] + row[1, b]) for row, (a, b) in zip(logits, every, strict=True)])

    start = law()
    reward = np.array([a - 1.5 * b + 2.0 * (a == b) for a, b in every])
    wanted = start * np.exp(0.8 * reward)
    wanted /= wanted.sum()
    assert abs(start - wanted).max() > 0.1
    row = {"prompt_ids": [3], "completion_ids": [list(ids) for ids in every], "weights": wanted.tolist()}
    if refs:
        row |= {"weights": np.exp(0.8 * reward).tolist(), "ref_logprobs": np.log(start).tolist()}
    t = trainer(model, tmp_path, [row], learning_rate=3e-2, max_steps=150)
    t.train()
    entropy = 0.0 if refs else -(wanted * np.log(wanted)).sum()  # the loss is the KL to p_λ beyond it
    assert logs(t)[-1]["loss"] == pytest.approx(entropy, abs=5e-3)
    reached = law()
    if refs:
        reached /= reached.sum()  # candidates are only compared with each other: the fourth letter is left to the model
    assert abs(reached - wanted).max() < 0.01


@pytest.mark.parametrize("chat", [False, True], ids=["text", "messages"])
def test_texts_are_encoded_as_in_trls_dpo(chat, tmp_path):
    tokenizer = tiny_tokenizer(chat=chat)
    pairs = [{"prompt": "the cat", "chosen": " sat on", "rejected": " ran"}]
    if chat:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        pairs = [{k: [{"role": roles[k], "content": text}] for k, text in pair.items()} for pair in pairs]
    options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": []}
    theirs = trl.DPOTrainer(
        tiny_causal_lm(tokenizer, dtype=torch.float32), tiny_causal_lm(tokenizer, dtype=torch.float32),
        args=trl.DPOConfig(**options), train_dataset=Dataset.from_list(pairs), processing_class=tokenizer,
    ).train_dataset[0]  # fmt: skip
    row = {"prompt": pairs[0]["prompt"], "completions": [" sat on", " ran"]}
    ours = Encoder(tokenizer, {})(row)
    assert ours.prompt == theirs["prompt_ids"]
    assert ours.completions == [theirs["chosen_ids"], theirs["rejected_ids"]]
    assert tokenizer.eos_token_id in ours.completions[0] and ours.weights == [0.5, 0.5]
    drawn = Encoder(tokenizer, {})({"prompt": row["prompt"], "completion_ids": [[7, 8], [9]]})
    assert drawn.prompt == theirs["prompt_ids"] and drawn.completions == [[7, 8], [9]]  # no end token is added


def test_a_run_resumes_where_it_stopped(tmp_path):
    common = {"max_steps": 6, "lr_scheduler_type": "constant", "gradient_accumulation_steps": 2}
    folder = tiny_folder(tmp_path / "model", scale=3.0)
    whole = trainer(str(folder), tmp_path / "whole", **common)
    whole.train()
    saves = {"save_strategy": "steps", "save_steps": 3}
    trainer(str(folder), tmp_path / "part", **saves, **common | {"max_steps": 3}).train()
    second = trainer(str(folder), tmp_path / "part", **saves, **common)
    second.train(resume_from_checkpoint=True)
    for name in ("loss", "num_tokens"):
        assert [row[name] for row in logs(second)] == pytest.approx([row[name] for row in logs(whole)], abs=1e-5)


def test_mixed_precision_does_not_round_the_weights(tmp_path):
    t = trainer(tiny_causal_lm(dtype=torch.float32, scale=3.0), tmp_path, bf16=True)
    log_probs = torch.tensor([[-3.1415, -2.7182], [-1.4142, 0.0]])
    part = [Candidate([5], [6, 7], w) for w in (0.3, 0.7)]
    with t.compute_loss_context_manager():
        loss = t._loss(lambda rows: {"log_probs": log_probs}, part, 1.0)
    assert loss.item() == pytest.approx(0.3 * (3.1415 + 2.7182) + 0.7 * 1.4142, rel=1e-6)
    t.train()
    assert logs(t)[0]["loss"] > 0


@pytest.mark.parametrize("data", [rows(3), compared()[:3]], ids=["weights", "refs"])
def test_evaluation_and_adapters(data, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_causal_lm(scale=3.0)
    expected = sum(plain_loss(model, row) for row in data).item() / 3
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    t = trainer(
        model, tmp_path, more={"eval_dataset": data, "peft_config": adapters}, per_device_eval_batch_size=2,
        eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    assert t.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    t.train()
    after = [row["eval_loss"] for row in t.state.log_history if "eval_loss" in row][-1]
    assert after < expected
    moved = {name for name, p in t.model.named_parameters() if p.requires_grad}
    assert moved and all("lora_" in name for name in moved)


def test_a_loss_that_is_nan_stops_before_a_weight_changes(tmp_path):
    model = tiny_causal_lm(dtype=torch.float32, scale=3.0)
    t = trainer(model, tmp_path)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(UserError, match=r"step 1: the loss is nan; .* no checkpoint was kept"):
        t.train()


GOOD = {"prompt_ids": [5, 6], "completion_ids": [[7], [8, 9]], "weights": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [1.0, -1.0]}, r"weights\[1\] must be at least 0, got -1"),
        ({"weights": [float("nan"), 1.0]}, r"weights\[0\] must be a finite number, got nan"),
        ({"weights": [1.0, float("inf")]}, r"weights\[1\] must be a finite number, got inf"),
        ({"weights": [0.0, 0.0]}, "weights must not all be 0"),
        ({"weights": [1.0]}, "weights must be one per candidate, 2, got 1"),
        ({"weights": 3}, "weights must be one per candidate, 2, got 3"),
        ({"ref_logprobs": [-1.0]}, "ref_logprobs must be one per candidate, 2, got 1"),
        ({"ref_logprobs": -1.0}, "ref_logprobs must be one per candidate, 2, got -1.0"),
        ({"ref_logprobs": [-1.0, float("-inf")]}, r"ref_logprobs\[1\] must be a finite number, got -inf"),
        ({"ref_logprobs": [-1.0, -1.0], "weights": [0.0, 1.0]}, r"weights\[0\] must be above 0 beside .*got 0"),
        ({"ref_logprobs": [-1.0], "completion_ids": [[7]], "weights": None}, "ref_logprobs need at least two .* 1$"),
        ({"completion_ids": []}, r"completion_ids must be a list of at least one candidate, got \[\]"),
        ({"completion_ids": [[7], []]}, r"completion_ids\[1\] must have at least one token, got none"),
        ({"completion_ids": [[7], [0.5]]}, r"completion_ids\[1\] must be a list of token ids, integers"),
        ({"completion_ids": [[7], [320]]}, "token ids must be below 320, the vocabulary, got 320"),
        ({"completion_ids": [[7], [8] * 255]}, r"prompt and completion must fit the model's 256 tokens, got 2 \+ 255"),
        ({"completion_ids": None}, "must have a prompt or prompt_ids, and completions or completion_ids, got prompt_"),
        ({"prompt_ids": None}, "must have a prompt or prompt_ids, and completions or completion_ids, got completion"),
        ({"prompt": "x"}, "must have a prompt or prompt_ids, and"),
        ({"completion_ids": None, "completions": ["a", "b"]}, "prompt_ids need completion_ids, got completions"),
        ({"prompt_ids": None, "prompt": [{"content": "x"}]}, "prompt message 0 must have a role and a content"),
        ({"prompt_ids": None, "prompt": ""}, "prompt must have at least one token, got ''"),
        ({"prompt_ids": None, "prompt": "x", "completion_ids": None, "completions": ["a", 3]},
         r"completions\[1\] must be text, got 3"),
    ],
)  # fmt: skip
def test_a_row_that_is_wrong_is_named_before_training(change, message, tmp_path):
    wrong = {**GOOD, **change}
    with pytest.raises(UserError, match=f"^train_dataset row 1: {message}") as caught:
        trainer(tiny_causal_lm(), tmp_path, [GOOD, wrong])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^eval_dataset row 0: "):
        trainer(tiny_causal_lm(), tmp_path, [GOOD], more={"eval_dataset": [wrong]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel=True is not supported by DistillTrainer, only False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported"),
        ({"max_packed_tokens": 0}, "max_packed_tokens must be an integer, at least 1, or None, got 0"),
    ],
)
def test_options_that_are_not_supported(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        trainer(tiny_causal_lm(), tmp_path, **options)


@pytest.mark.parametrize("data", [[], "rows.jsonl", iter([GOOD])])
def test_data_sets_have_rows_and_a_length(data, tmp_path):
    with pytest.raises(UserError, match="train_dataset must be a data set of known length, of at least one row, got"):
        trainer(tiny_causal_lm(), tmp_path, data)


def test_a_row_is_an_object(tmp_path):
    with pytest.raises(UserError, match=r"row 1: must be an object with the columns prompt, .* got 'the cat'"):
        trainer(tiny_causal_lm(), tmp_path, [GOOD, "the cat"])


def test_a_model_by_name_and_its_tokenizer(tmp_path):
    folder = tiny_folder(tmp_path / "model", chat=True, scale=3.0)
    t = DistillTrainer(str(folder), DistillConfig(str(tmp_path), use_cpu=True, report_to=[]), [GOOD])
    assert isinstance(t.model, type(AutoModelForCausalLM.from_pretrained(folder)))
    with pytest.raises(UserError, match="args must be a DistillConfig, got TrainingArguments"):
        DistillTrainer(str(folder), transformers.TrainingArguments(str(tmp_path), use_cpu=True), [GOOD])
