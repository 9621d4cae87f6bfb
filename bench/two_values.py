"""python bench/two_values.py: two values of very different scales under GRPO; writes results/two_values.json and its
figure.

SmolLM2-135M is trained on brevity, minus the characters of a completion (tens), and on VADER's positiveness (below 1),
which a shorter text has less room for and which is given three times the weight: by the sum normalised in its group
("grpo") and by each value normalised before the sum ("gdpo"), three seeds each. Resumable: a finished run is read.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from fastalign.bench.machine import machine

from fastalign._base.files import write_json
from fastalign.data import prompts
from fastalign.jobs.demo import MODEL

HERE = Path(__file__).parent
ADVANTAGES = ("grpo", "gdpo")
VALUES = ("brevity", "positive")
WEIGHTS = (1.0, 3.0)
SEEDS = 3
TOKENS = 24


def brevity(completions: list, **columns: Any) -> list[float]:
    return [-float(len(text if isinstance(text, str) else text[-1]["content"])) for text in completions]


def main() -> None:
    options = arguments()
    content = json.loads(options.out.read_text()) if options.out.exists() else {"runs": []}
    done = {(run["advantage"], run["seed"], run["steps"]) for run in content["runs"]}
    for seed in range(SEEDS):
        for advantage in ADVANTAGES:
            if (advantage, seed, options.steps) not in done:
                curves = train(advantage, seed, options.steps, options.learning_rate)
                content["runs"].append({"advantage": advantage, "seed": seed, "steps": options.steps, **curves})
                content["settings"] = {"learning_rate": options.learning_rate, "tokens": TOKENS, "machine": machine()}
                write_json(options.out, content)
    plot(content["runs"], options.out.with_suffix(".png"))
    for advantage in ADVANTAGES:
        gains = [[gain(run[name]) for name in VALUES] for run in content["runs"] if run["advantage"] == advantage]
        print(advantage, ", ".join(f"{name} {x:+.3g}" for name, x in zip(VALUES, np.mean(gains, axis=0), strict=True)))


def train(advantage: str, seed: int, steps: int, learning_rate: float) -> dict[str, list[float]]:
    """Each value's mean over each step's completions."""
    from datasets import Dataset

    from fastalign.models.loading import load_causal_lm
    from fastalign.train import GRPOConfig, GRPOTrainer

    model, tokenizer = load_causal_lm(MODEL, dtype="float32")
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts.bundled()]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, advantage=advantage, learning_rate=learning_rate, lr_scheduler_type="constant",
            num_generations=8, reward_weights=list(WEIGHTS),
            per_device_train_batch_size=32, max_completion_length=TOKENS, max_steps=steps, logging_steps=1,
            save_strategy="no", report_to=[], use_cpu=True, bf16=False, seed=seed, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = GRPOTrainer(model, [brevity, "positive"], config, Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
    logged = [row for row in trainer.state.log_history if "reward" in row]
    return {name: [row[f"rewards/{name}/mean"] for row in logged] for name in VALUES}


def gain(curve: list[float]) -> float:
    """From the first fifth of the steps to the last."""
    k = max(1, len(curve) // 5)
    return float(np.mean(curve[-k:]) - np.mean(curve[:k]))


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    from fastalign.report.figures import PREDICTED, REALISED, save, style

    colours = {"grpo": PREDICTED, "gdpo": REALISED}
    with style.figure(7.6, 3.1) as figure:
        for axes, name in zip(figure.subplots(1, len(VALUES)), VALUES, strict=True):
            for run in runs:
                curve = np.array(run[name])
                smooth = np.convolve(curve, np.ones(5) / 5, mode="valid")
                label = run["advantage"] if run["seed"] == 0 else None
                axes.plot(
                    np.arange(len(smooth)) + 5, smooth, color=colours[run["advantage"]], linewidth=1.4, label=label
                )
            axes.set_title(f"{name} of a completion")
            axes.set_xlabel("steps")
            axes.legend(frameon=False)
        save(figure, path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "two_values.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
