"""python bench/spend_less.py: what speculative rejection and particles reach for the tokens they draw, against
best-of-N.

SmolLM2-135M on the bundled prompts and the demo's rewards. N whole candidates per prompt are drawn once, and their
beginnings scored. Dropped candidates are best-of-N's own, truncated, so these scores give every schedule's exact
outcome. One schedule and one set of particles are then really run, timed, and compared with it. Best-of-k, k < N, shows
what the same tokens reach without these methods. Writes spend_less.json and spend_less.png.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
from fastalign.bench.machine import machine

from fastalign import rewards
from fastalign._base.files import write_json
from fastalign.data import prompts
from fastalign.decode import Sampler, best_of_curve, particles, speculative_rejection
from fastalign.jobs.demo import MODEL, REWARDS, TOP_P
from fastalign.report import figures as plots
from fastalign.report.figures import style

KEEPS = (0.25, 0.35, 0.5, 0.7)
# as shares of max_new_tokens
SCHEDULES = ((1 / 8,), (1 / 4,), (1 / 2,), (1 / 8, 1 / 4), (1 / 4, 1 / 2), (1 / 8, 1 / 4, 1 / 2), (1 / 4, 1 / 2, 3 / 4))
TILT = 1.5  # of the particles, in nats per standard deviation of each value


def main() -> None:
    options = arguments()
    sampler = Sampler.from_pretrained(MODEL, dtype="float32")
    chosen = prompts.bundled(options.prompts)
    n, new = options.n, options.max_new_tokens
    job = {"n": n, "max_new_tokens": new, "top_p": TOP_P, "seed": options.seed}
    sampler.sample(chosen, **{**job, "n": 2, "max_new_tokens": 2})  # pages in the weights
    began = time.perf_counter()
    drawn = sampler.sample(chosen, **job)
    seconds = {"best_of": time.perf_counter() - began}
    ages = sorted({round(share * new) for shares in SCHEDULES for share in shares})
    scored = {age: score(sampler, drawn, age) for age in (*ages, new)}
    seconds["scoring whole candidates once"] = scored[new][1]
    scored = {age: values for age, (values, _) in scored.items()}
    whole = scored[new]
    lengths = np.array([[len(ids) for ids in row] for row in drawn.token_ids])
    sd = whole.std((0, 1))
    aims = {name: np.eye(len(REWARDS))[i] / sd[i] for i, name in enumerate(REWARDS)} | {"all three": 1 / sd}
    curves = []
    for name, lam in aims.items():
        at = {age: values @ lam for age, values in scored.items()}
        mean, best = at[new].mean(), at[new].max(1).mean()

        def gain(reached, mean=mean, best=best):
            return float((reached - mean) / (best - mean))

        points = []
        for shares in SCHEDULES:
            checkpoints = [round(share * new) for share in shares]
            for keep in KEEPS:
                reached, tokens = replay(at, lengths, checkpoints, keep, new)
                points.append(
                    {
                        "checkpoints": checkpoints,
                        "keep": keep,
                        "reached": float(reached.mean()),
                        "gain": gain(reached.mean()),
                        "tokens": float(tokens / lengths.sum()),
                    }
                )
        ks = sorted({max(1, round(n * share)) for share in np.linspace(0.05, 1, 20)})
        plain = best_of_curve(at[new][..., None], np.ones(1), ks)
        curves.append(
            {
                "value": name,
                "lambda": lam.tolist(),
                "mean": float(mean),
                "best_of_n": float(best),
                "rejection": points,
                "best_of_k": [
                    {"k": k, "gain": gain(v), "tokens": k / n}
                    for k, v in zip(ks, plain.values[:, 0].tolist(), strict=True)
                ],
                # How well a beginning's score predicts the whole text's, within a prompt.
                "correlation": {age: correlation(at[age], at[new]) for age in ages},
            }
        )
        say(curves[-1])
    result = {
        "machine": machine(),
        "settings": {"model": MODEL, "rewards": REWARDS, "prompts": len(chosen), **job, "tokens": int(lengths.sum())},
        "curves": curves,
    }
    write_json(options.out / f"{options.name}.json", result)  # the rest takes minutes more
    result["run"] = run(sampler, chosen, job, 1 / sd, scored, lengths, options, seconds)
    result["seconds"] = {name: round(taken, 1) for name, taken in seconds.items()}
    write_json(options.out / f"{options.name}.json", result)
    plots.save(figure(result), options.out / f"{options.name}.png")
    print(result["seconds"], result["run"], sep="\n")


def score(sampler, drawn, age: int) -> tuple[np.ndarray, float]:
    """(P, N, m) rewards of the candidates' first `age` tokens, and the seconds that took."""
    texts = [sampler.text.continuation([], ids[:age]) for row in drawn.token_ids for ids in row]
    began = time.perf_counter()
    values = rewards.score(list(REWARDS), drawn.pairs()[0], texts).astype(np.float64)
    return values.reshape(len(drawn.prompts), drawn.n, -1), time.perf_counter() - began


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of scores (P, N) within prompts, over all prompts."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    return float((a * b).sum() / math.sqrt((a**2).sum() * (b**2).sum() + 1e-30))


def replay(at, lengths, checkpoints: list[int], keep: float, new: int) -> tuple[np.ndarray, int]:
    """What speculative rejection picks from these candidates: scores (P,), and the tokens it draws."""
    reached, tokens = [], 0
    for p, length in enumerate(lengths):
        racing, drawn = np.arange(len(length)), length.copy()
        for age in checkpoints:
            order = racing[np.argsort(-at[age][p, racing], kind="stable")]
            racing, out = np.split(order, [math.ceil(keep * len(order))])
            drawn[out] = np.minimum(drawn[out], age)
        tokens += int(drawn.sum())
        reached.append(at[new][p, drawn == length].max())
    return np.array(reached), tokens


def run(sampler, chosen, job, lam, scored, lengths, options, seconds) -> dict:
    """A real run of one schedule and one set of particles, for all three values."""
    new = job["max_new_tokens"]
    at = {age: values @ lam for age, values in scored.items()}
    mean, best = at[new].mean(), at[new].max(1).mean()
    checkpoints = [new // 4, new // 2]
    began = time.perf_counter()
    result = speculative_rejection(
        sampler, chosen, list(REWARDS), lam=lam, checkpoints=checkpoints, keep=options.keep, **job
    )
    seconds["rejection, scoring included"] = time.perf_counter() - began
    expected, tokens = replay(at, lengths, checkpoints, options.keep, new)
    reached = result.rewards.astype(np.float64) @ lam
    if result.tokens != tokens or abs(reached - expected).max() > 1e-3:
        raise AssertionError(
            f"the run drew {result.tokens} tokens and reached {reached}, the replay {tokens} and {expected}"
        )
    few = {**job, "n": max(4, round(job["n"] * options.particles))}
    began = time.perf_counter()
    swarm = particles(
        sampler, chosen, list(REWARDS), lam=TILT * lam, checkpoints=[new // 4, new // 2, 3 * new // 4], **few
    )
    seconds["particles, scoring included"] = time.perf_counter() - began
    scores = swarm.candidates.reward_array(REWARDS).astype(np.float64) @ lam
    return {
        "rejection": {
            "checkpoints": checkpoints,
            "keep": options.keep,
            "gain": float((reached.mean() - mean) / (best - mean)),
            "tokens": result.tokens / int(lengths.sum()),
        },
        "particles": {
            "n": few["n"],
            "tilt": TILT,
            "tokens": swarm.tokens / int(lengths.sum()),
            "best_gain": float((scores.max(1).mean() - mean) / (best - mean)),
            "mean_gain": float((swarm.values @ lam - mean) / (best - mean)),
            "resampled": float(swarm.resampled.mean()),
        },
    }


def say(curve: dict) -> None:
    good = [point for point in curve["rejection"] if point["gain"] >= 0.95]
    least = min(good, key=lambda point: point["tokens"], default=None)
    plain = next(point["tokens"] for point in curve["best_of_k"] if point["gain"] >= 0.95)
    print(
        f"{curve['value']}: 95 % of the gain with {least}; plain best-of-k with {plain:.2f} of the tokens", flush=True
    )


def figure(result: dict):
    """Gain by tokens for each goal: best-of-k, every schedule, and the real runs."""
    n = result["settings"]["n"]
    with style.figure(10, 7.2) as page:
        axes = page.subplots(2, 2, sharex=True, sharey=True)
        for ax, curve in zip(axes.flat, result["curves"], strict=True):
            ax.axhspan(95, 110, 0, 0.5, color=plots.GRID, zorder=0, label="the bar: 95 % for half the tokens")
            points = [(100 * p["tokens"], 100 * p["gain"]) for p in curve["best_of_k"]]
            ax.plot(*zip(*points, strict=True), color=plots.BEFORE, label="best of k whole candidates")
            for keep, marker in zip(KEEPS, "ov^s", strict=True):
                points = [(100 * p["tokens"], 100 * p["gain"]) for p in curve["rejection"] if p["keep"] == keep]
                ax.scatter(
                    *zip(*points, strict=True),
                    marker=marker,
                    s=26,
                    color=plots.PREDICTED,
                    label=f"rejection, keep {keep}",
                )
            if curve["value"] == "all three":
                swarm = result["run"]["particles"]
                ax.scatter(
                    100 * swarm["tokens"],
                    100 * swarm["best_gain"],
                    marker="*",
                    s=110,
                    color=plots.TARGET,
                    label=f"best of {swarm['n']} particles",
                )
            ax.set_title(curve["value"], fontsize=11)
            ax.set_xlim(0, 100)
            ax.set_ylim(60, 110)
        for ax in axes[1]:
            ax.set_xlabel(f"tokens drawn, % of best-of-{n}'s")
        for ax in axes[:, 0]:
            ax.set_ylabel(f"gain over the mean, % of best-of-{n}'s")
        handles, labels = axes.flat[-1].get_legend_handles_labels()
        page.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return page


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="spend_less", help="of the two files")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--keep", type=float, default=0.5, help="of the schedule that is run")
    parser.add_argument("--particles", type=float, default=0.5, help="as a share of n")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
