"""The job of bench_grpo.py's processes: one step of GRPO, rollout and update, of fastalign or of TRL."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any


def job(kind: str, options: dict, folder: str) -> Callable[[], dict]:
    """options: prompts, words (of each), completions (per prompt), new (tokens), at_once (completions trained on),
    steps (1), shape (of `shapes.model_of`)."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=folder, TRL_EXPERIMENTAL_SILENCE="1")
    from fastalign.bench.dpo_job import peak_mb
    from fastalign.bench.shapes import model_of

    model, tokenizer = model_of(options.get("shape"))
    import trl
    from datasets import Dataset

    from fastalign.data.prompts import bundled
    from fastalign.train import GRPOConfig, GRPOTrainer

    draw, words = random.Random(0), " ".join(bundled()).split()
    prompts = [" ".join(draw.choices(words, k=options["words"])) for _ in range(options["prompts"])]
    trainer_class, config = (GRPOTrainer, GRPOConfig) if kind == "fastalign" else (trl.GRPOTrainer, trl.GRPOConfig)
    model.generation_config.eos_token_id = None  # every completion has the same length
    tokenizer.eos_token = "<gh_stars>"  # which is never drawn

    def lengths(completions, **others):
        return [float(len(text)) for text in completions]

    def fixed(prompts: list, trainer: Any) -> dict:
        rows = random.Random(1)
        ids = [[rows.randrange(100, 40000) for _ in range(12)] for _ in prompts]
        scores = [[0.0] * len(row) for row in ids]
        return {"prompt_ids": tokenizer(prompts)["input_ids"], "completion_ids": ids, "logprobs": scores}

    def step(count: int, completions: int, steps: int = 1, **more: Any) -> Any:
        rows, at_once = count * completions, min(count * completions, options["at_once"])
        args = config(
            output_dir=folder, report_to=[], max_steps=steps, logging_steps=1,
            per_device_train_batch_size=at_once, gradient_accumulation_steps=rows // at_once,
            num_generations=completions, max_completion_length=options["new"],
            use_cpu=model.device.type == "cpu", bf16=False, gradient_checkpointing=False, save_strategy="no",
            learning_rate=1e-6, seed=0, disable_tqdm=True,
        )  # fmt: skip
        data = Dataset.from_list([{"prompt": prompt} for prompt in prompts[:count]])
        trainer = trainer_class(model, lengths, args, train_dataset=data, processing_class=tokenizer, **more)
        trainer.train()
        return next(row for row in trainer.state.log_history if "loss" in row)

    known = step(1, 2, rollout_func=fixed)

    def run() -> dict:
        row = step(options["prompts"], options["completions"], options.get("steps", 1))
        return {
            "peak_mb": peak_mb(),
            "known": [known["loss"], known["grad_norm"]],
            "tokens": row["completions/mean_length"],
        }

    return run
