"""The job of bench_dpo.py's processes: one training run, from the trainer's construction to its end."""

from __future__ import annotations

import copy
import os
import random
import resource
from collections.abc import Callable


def peak_mb() -> float:
    """The peak of this process. getrusage's figure may be that of a larger parent, VmHWM is not."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def job(kind: str, options: dict, folder: str) -> Callable[[], dict]:
    """Of the trainer of fastalign or of TRL: what it takes and finds. options: lora, shape (`shapes.model_of`), pairs
    (24), the trainer's."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=folder)
    from fastalign.bench.shapes import model_of

    shape = options.pop("shape", None)
    model, tokenizer = model_of(shape)
    reference = None if shape is None else copy.deepcopy(model)  # by its name none could be loaded
    os.environ["FASTALIGN_CACHE"] = folder  # an earlier run's cache is not used
    import trl
    from datasets import Dataset

    from fastalign.data.prompts import bundled
    from fastalign.train import DPOConfig, DPOTrainer

    tokenizer.padding_side = "right"
    draw, words = random.Random(0), " ".join(bundled()).split()

    def text(n):
        return " ".join(draw.choices(words, k=n))

    pairs = [
        {"prompt": text(96), "chosen": " " + text(draw.randint(24, 64)), "rejected": " " + text(draw.randint(24, 64))}
        for _ in range(options.pop("pairs", 24))
    ]
    lora = None
    if options.pop("lora", False):
        from peft import LoraConfig

        lora = LoraConfig(
            r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        )
    trainer_class, config = (DPOTrainer, DPOConfig) if kind == "fastalign" else (trl.DPOTrainer, trl.DPOConfig)
    args = config(
        output_dir=folder, report_to=[], num_train_epochs=1, logging_steps=1, per_device_train_batch_size=4,
        use_cpu=model.device.type == "cpu", bf16=False, gradient_checkpointing=False, save_strategy="no",
        learning_rate=1e-5, seed=0, disable_tqdm=True, **options,
    )  # fmt: skip

    def run() -> dict:
        trainer = trainer_class(
            model, reference, args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer,
            peft_config=lora,
        )  # fmt: skip
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return {"peak_mb": peak_mb(), "losses": losses}

    return run
