"""GRPOTrainer against TRL's on the same completions: the same losses, metrics and weights; what it adds; what it
refuses."""

import random

import pytest
import torch
import trl
from datasets import Dataset
from tiny import tiny_folder, tiny_tokenizer
from transformers import AutoModelForCausalLM

from fastalign.train import GRPOConfig, GRPOTrainer

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
