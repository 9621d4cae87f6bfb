"""GRPOTrainer against TRL's on the same completions: the same losses, metrics and weights; what it adds; what it
refuses."""

import copy
import math
import random

import pytest
import torch
import trl
from datasets import Dataset
from plain_advantages import plain_advantages
from tiny import tiny_folder, tiny_tokenizer
from transformers import AutoModelForCausalLM

from fastalign import UserError
from fastalign.train import GRPOConfig, GRPOTrainer
from fastalign.train.rows import add_row_forward

WORDS = "the quick brown fox jumps over a lazy dog near some quiet river bank".split()
STEPS = 3


def prompts(count=12):
    return [
        {"prompt": " ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(4 + i % 3)), "number": i}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("model"), scale=3.0))


def length(completions, **others):
    return [float(len(text)) for text in completions]


def vowels(completions, number, **others):
    """Nothing to say about every third prompt."""
    return [None if n % 3 == 2 else text.count("e") - 0.3 * n for text, n in zip(completions, number, strict=True)]


def completions_of(prompts, trainer):
    """Random tokens, the same for both trainers; some end, some are cut off."""
    tokenizer = trainer.processing_class
    drawn = random.Random(len(trainer.state.log_history))
    prompt_ids = tokenizer(text=prompts)["input_ids"]
    ids = [[drawn.randrange(5, len(tokenizer)) for _ in range(drawn.randrange(2, 9))] for _ in prompts]
    ids = [row if len(row) == 8 else [*row, tokenizer.eos_token_id] for row in ids]
    return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": [[-1.5] * len(row) for row in ids]}


def trainer(cls, folder, out, *, data=None, model=None, rewards=(length, vowels), more=None, **options):
    config = GRPOConfig if cls is GRPOTrainer else trl.GRPOConfig
    common = {"output_dir": str(out), "report_to": [], "logging_steps": 1, "per_device_train_batch_size": 8}
    common |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, "max_steps": STEPS}
    common |= {"learning_rate": 1e-3, "gradient_checkpointing": False, "per_device_eval_batch_size": 4}
    common |= {"num_generations": 4, "max_completion_length": 8} | options
    return cls(
        model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        list(rewards),
        config(**common),
        train_dataset=Dataset.from_list(data or prompts()),
        processing_class=tiny_tokenizer(),
        **(more or {}),
    )


def logs(trained):
    return [row for row in trained.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "grpo", "beta": 0.1, "scale_rewards": "batch"},
        {"loss_type": "bnpo", "entropy_coef": 0.1},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "gradient_accumulation_steps": 3},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2, "learning_rate": 1e-2},
        {"loss_type": "cispo", "epsilon_high": 1.1, "num_iterations": 2, "learning_rate": 1e-2},
        {"loss_type": "sapo", "num_iterations": 3, "learning_rate": 1e-2, "mask_truncated_completions": True},
        {"loss_type": "luspo", "num_iterations": 2, "learning_rate": 1e-2, "importance_sampling_level": "sequence"},
        {"loss_type": "vespo", "num_iterations": 2, "learning_rate": 1e-2},
        {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.5], "temperature": 0.7},
        {"beta": 0.2, "use_bias_correction_kl": False, "num_iterations": 2, "learning_rate": 1e-2, "delta": 1.5},
        {"off_policy_mask_threshold": 0.1, "num_iterations": 2, "mask_truncated_completions": True},
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "default",
)
def test_every_step_equals_trls(folder, tmp_path, options):
    theirs, ours = (
        trainer(cls, folder, tmp_path, more={"rollout_func": completions_of}, **options)
        for cls in (trl.GRPOTrainer, GRPOTrainer)
    )
    assert ours._packs
    ours.args.max_packed_tokens = 60
    theirs.train()
    ours.train()
    assert len(logs(theirs)) == STEPS
    for a, b in zip(logs(theirs), logs(ours), strict=True):
        names = {name for name, value in a.items() if isinstance(value, float)}
        names -= {"epoch", "step_time", "clip_ratio/low_min", "clip_ratio/high_max", "vespo/phi_seq_mean"}
        names -= {"policy_loss", "entropy_coef"}
        for name in names:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-4), name
    for (name, a), (_, b) in zip(theirs.model.named_parameters(), ours.model.named_parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("given", ["new", "trained"])
def test_lora_takes_its_reference_from_the_model_without_it(folder, tmp_path, given):
    """New adapters: the model without them. Those that the model came with: a frozen copy of them."""
    peft = pytest.importorskip("peft")
    curves = []
    for cls in (trl.GRPOTrainer, GRPOTrainer):
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=given == "new")
        options = {"more": {"rollout_func": completions_of}, "beta": 0.1, "learning_rate": 1e-2}
        if given == "trained":
            torch.manual_seed(1)
            options["model"] = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora)
        else:
            options["more"]["peft_config"] = lora
        t = trainer(cls, folder, tmp_path, **options)
        assert t.ref_model is None
        t.train()
        curves.append([(row["loss"], row["kl"]) for row in logs(t)])
    assert curves[0][0][1] == pytest.approx(0, abs=1e-6) and curves[0][-1][1] > 1e-4
    for ours, theirs in zip(*curves, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_old_log_probabilities_are_the_draws(folder, tmp_path):
    """Two passes over the same completions: with what the sampler recorded, and with a forward pass instead."""
    curves = []
    for forward in (False, True):
        t = trainer(GRPOTrainer, folder, tmp_path, num_iterations=2, learning_rate=1e-2, temperature=0.8)
        if forward:
            look = t._look

            def again(rollouts, mode, t=t, look=look):
                look(rollouts, mode)
                t._fill("old", rollouts, t.model)

            t._look = again
        t.train()
        curves.append([row["loss"] for row in logs(t)])
    assert curves[0] == pytest.approx(curves[1], abs=1e-4) and curves[0][1] != pytest.approx(curves[0][0], abs=1e-3)


def test_padded_rows_and_evaluation_give_the_same(folder, tmp_path):
    result = []
    for share in (True, False):
        t = trainer(GRPOTrainer, folder, tmp_path, share_prompt=share, beta=0.1, max_steps=2)
        assert t._packs == share
        t.train()
        result.append((logs(t), t.evaluate(Dataset.from_list(prompts(3)))))
    (a, evaluated), (b, again) = result
    assert [row["loss"] for row in a] == pytest.approx([row["loss"] for row in b], abs=1e-5)
    for name in ("eval_loss", "eval_reward", "eval_entropy", "eval_rewards/length/mean"):
        assert evaluated[name] == pytest.approx(again[name], abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1},
        {"num_iterations": 2, "learning_rate": 1e-2},
        {"steps_per_generation": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    ],
    ids=str,
)
def test_a_run_resumes_where_it_stopped(folder, tmp_path, options):
    common = {"max_steps": 6, "lr_scheduler_type": "constant", **options}
    whole = trainer(GRPOTrainer, folder, tmp_path / "whole", **common)
    whole.train()
    saves = {"save_strategy": "steps", "save_steps": 3}
    first = trainer(GRPOTrainer, folder, tmp_path / "part", **saves, **common | {"max_steps": 3})
    first.train()
    second = trainer(GRPOTrainer, folder, tmp_path / "part", **saves, **common)
    second.train(resume_from_checkpoint=True)
    assert [row["loss"] for row in logs(second)] == pytest.approx([row["loss"] for row in logs(whole)], abs=1e-5)


def test_a_reward_that_raises_loses_nothing(folder, tmp_path):
    calls = []

    def fails(completions, trainer_state, **others):
        calls.append(trainer_state.global_step)
        if len(calls) == 5:
            raise ZeroDivisionError("the reward's own")
        return [float(len(text)) for text in completions]

    common = {"max_steps": 6, "save_strategy": "steps", "save_steps": 100, "lr_scheduler_type": "constant"}
    whole = trainer(GRPOTrainer, folder, tmp_path / "whole", rewards=[length], **common)
    whole.train()
    first = trainer(GRPOTrainer, folder, tmp_path / "part", rewards=[fails], **common)
    with pytest.raises(ZeroDivisionError, match="the reward's own"):
        first.train()
    assert (tmp_path / "part" / "checkpoint-4").is_dir()
    second = trainer(GRPOTrainer, folder, tmp_path / "part", rewards=[fails], **common)
    second.train(resume_from_checkpoint=True)
    assert calls == [0, 1, 2, 3, 4, 4, 5]
    assert [row["loss"] for row in logs(second)] == pytest.approx([row["loss"] for row in logs(whole)], abs=1e-5)


@pytest.mark.parametrize("how", ["grpo", "batch", "dr_grpo", "rloo", "gdpo", "rank"])
def test_one_update_equals_a_plain_float64_reference(folder, tmp_path, how):
    seen = {}

    def remember(prompts, completions, completion_ids, **others):
        seen.update(prompts=prompts, ids=completion_ids, length=length(completions))
        seen["vowels"] = vowels(completions, others["number"])
        return seen["length"]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    t = trainer(
        GRPOTrainer, folder, tmp_path, model=model, rewards=[remember, vowels], advantage=how, max_steps=1, optim="sgd",
        learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant", gradient_accumulation_steps=2,
        max_packed_tokens=50,
    )  # fmt: skip
    t.train()
    said = ([math.nan if x is None else x for x in seen[name]] for name in ("length", "vowels"))
    scores = list(zip(*said, strict=True))
    groups = plain_advantages([scores[i : i + 4] for i in range(0, len(scores), 4)], [1.0, 1.0], how)
    advantages = [x for group in groups for x in group]
    loss, tokens = 0.0, sum(map(len, seen["ids"]))
    for prompt, ids, advantage in zip(seen["prompts"], seen["ids"], advantages, strict=True):
        first = t.processing_class(prompt)["input_ids"]
        row = torch.tensor([[*first, *ids]])
        log_probs = before(row).logits[0, len(first) - 1 : -1].log_softmax(-1)[range(len(ids)), ids]
        loss = loss - ((log_probs - log_probs.detach()).exp() * advantage).sum() / tokens
    loss.backward()
    assert logs(t)[0]["loss"] == pytest.approx(float(loss), abs=1e-6)
    for (name, ours), p in zip(t.model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p.data - ours.data, p.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_a_copy_of_a_model_that_scores_rows_runs_its_own_weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    for _ in range(2):  # as for two trainers, one after the other
        add_row_forward(model)
    twin = copy.deepcopy(model)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(ids).logits
        for p in model.parameters():
            p.zero_()
        torch.testing.assert_close(twin(ids).logits, expected)


def test_training_twice_begins_again(folder, tmp_path):
    t = trainer(GRPOTrainer, folder, tmp_path, max_steps=2, num_iterations=2, learning_rate=0.0)
    curves = []
    for _ in range(2):
        t.train()
        curves.append([row["loss"] for row in logs(t)])
    assert curves[0] == curves[1]


def test_an_evaluation_batch_has_whole_groups(folder, tmp_path):
    t = trainer(GRPOTrainer, folder, tmp_path, per_device_eval_batch_size=6)
    with pytest.raises(UserError, match=r"a multiple of num_generations_eval = 4 .* got 6: set per_device_eval_batch"):
        t.evaluate(Dataset.from_list(prompts(3)))
