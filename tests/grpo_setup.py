"""What the tests of GRPO train on: prompts, rewards, completions, and a trainer of ours or of TRL's."""

import random

import torch
import trl
from datasets import Dataset
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from fastalign.train import GRPOConfig, GRPOTrainer

WORDS = "the quick brown fox jumps over a lazy dog near some quiet river bank".split()
STEPS = 3


def prompts(count=12):
    return [
        {"prompt": " ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(4 + i % 3)), "number": i}
        for i in range(count)
    ]


def length(completions, **others):
    return [float(len(text)) for text in completions]


def vowels(completions, number, **others):
    """Nothing to say about every third prompt."""
    return [None if n % 3 == 2 else text.count("e") - 0.3 * n for text, n in zip(completions, number, strict=True)]


def completions_of(prompts, trainer):
    """Random tokens, the same for both trainers and for any number of processes; some end, some are cut off."""
    tokenizer, ids = trainer.processing_class, []
    first = trainer.accelerator.process_index * len(prompts)
    for place, prompt in enumerate(prompts, first):
        drawn = random.Random(f"{len(trainer.state.log_history)} {place} {prompt}")
        row = [drawn.randrange(5, len(tokenizer)) for _ in range(drawn.randrange(2, 9))]
        ids.append(row if len(row) == 8 else [*row, tokenizer.eos_token_id])
    log_probs = [[-1.5] * len(row) for row in ids]
    return {"prompt_ids": tokenizer(text=prompts)["input_ids"], "completion_ids": ids, "logprobs": log_probs}


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
        **{"train_dataset": Dataset.from_list(data or prompts()), "processing_class": tiny_tokenizer(), **(more or {})},
    )


def logs(trained):
    return [row for row in trained.state.log_history if "loss" in row]
