"""python bench/align_palettes.py: does `fastalign align` hold palettes on prompts that it has not seen? Writes
results/align_palettes.json and its figure.

SmolLM2-135M, three values, 200 prompts of which half are held out, another half for every palette. Palettes are drawn
inside of what reweighting reaches, with ten effective candidates per prompt or more. All of them are decoded; the first
few are trained as well, by each method on the same budget: distill, grpo with λ steered, grpo with the λ of the
candidates, and TRL's way, equal weights. Candidates are drawn and scored once. Resumable: the rows of --out are kept,
those of another machine too, and a job that was broken off goes on in --work.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from fastalign.bench.machine import machine

from fastalign._base.files import write_json
from fastalign.data import prompts
from fastalign.decode import Candidates, estimate
from fastalign.jobs.align import methods, steps
from fastalign.jobs.align.budget import Budget
from fastalign.jobs.align.job import Job, align
from fastalign.jobs.align.split import split
from fastalign.jobs.demo import MODEL
from fastalign.jobs.grpo import train_grpo
from fastalign.jobs.settings import ENDLESS
from fastalign.report.proof import MISSED

HERE = Path(__file__).parent
NAMES = ("positive", "harmless", "coherence")
TOKENS = 24
CANDIDATES = 48
ESS = (10.0, 24.0)  # of the pool's candidates, at the palettes' λ


def unsteered(job: Job, out: Path, left: Budget) -> float:
    """GRPO with the λ that the candidates gave."""
    return methods.grpo(job, out, left, steered=False)


def equal_weights(job: Job, out: Path, left: Budget) -> float:
    """GRPO as TRL's defaults have it, on the plain sum of the values."""
    result = train_grpo(
        job.model.name, job.train, NAMES, [1.0] * len(NAMES), out, batch_size=64, max_steps=ENDLESS,
        learning_rate=job.settings["learning_rate"] or 1e-3, lora_r=methods.RANK, max_new_tokens=TOKENS,
        dtype=job.settings["dtype"], seed=job.seed, until=left.spent, show_progress=True,
    )  # fmt: skip
    return result["tokens"]


TRAINED = {"distill": "distill", "grpo": "grpo", "grpo unsteered": unsteered, "equal weights": equal_weights}
METHODS = {"decode": "decode", **TRAINED}


def main() -> None:
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    words = {one["palette"]: one["words"] for one in rows}
    finished = [(one["method"], one["palette"], one["settings"]) for one in rows]
    budgeted = {name: getattr(options, name) for name in ("budget", "learning_rate", "dtype")}
    jobs = [("decode", i, {"dtype": "float32"}) for i in range(options.palettes)]
    jobs += [(method, i, budgeted) for i in range(options.trained) for method in options.methods.split(",")]
    left = [job for job in jobs if job not in finished]
    pool = drawn(options.work / "pool.parquet") if left else None
    for method, i, settings in left:
        words.setdefault(i, palette(pool, i))
        out = options.work / f"{method.replace(' ', '-')}-{i}"
        result = run(pool, words[i], out, i, how=METHODS[method], **settings)
        rows = [one for one in rows if (one["method"], one["palette"]) != (method, i)]
        rows.append({**row(method, i, words[i], result), "settings": settings, "machine": place()})
        write(options, rows)


def place() -> str:
    now = machine()
    return f"{now['processor']}, {now['threads']} threads, torch {now['versions']['torch']}, {now['date']}"


def drawn(path: Path) -> Candidates:
    """The pool, scored."""
    lines = (HERE / "align_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    every = [*prompts.bundled(), *(json.loads(line)["prompt"] for line in lines)]
    options: dict[str, Any] = {"n": CANDIDATES, "max_new_tokens": TOKENS, "seed": 0, "dtype": "float32"}
    steps.sample(MODEL, every, path, **options, show_progress=True)
    return steps.score(path, NAMES, path.with_name("scored.parquet"), show_progress=True)


def palette(pool: Candidates, i: int) -> str:
    """Levels of a random λ at which the candidates are worth a random number of effective ones."""
    rng = np.random.default_rng(i)
    grid = pool.reward_array(NAMES)
    toward = np.abs(rng.normal(size=len(NAMES))) / grid.reshape(-1, len(NAMES)).std(axis=0)
    wanted, low, high = rng.uniform(*ESS), 0.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        enough = estimate(grid, middle * toward, warn=False).ess[0] > wanted
        low, high = (middle, high) if enough else (low, middle)
    levels = estimate(grid, low * toward, warn=False).values[0]
    return ", ".join(f"{name}>={level:.4f}" for name, level in zip(NAMES, levels, strict=True))


def run(pool: Candidates, words: str, out: Path, seed: int, **options: Any) -> dict[str, Any]:
    """One job, with the pool's scored candidates in place."""
    begun = (out / "job.json").exists()
    if not begun:
        for part, indices in zip(("train", "heldout"), split(pool.prompts, 0.5, seed), strict=True):
            (out / part).mkdir(parents=True, exist_ok=True)
            one = Candidates(
                *([getattr(pool, name)[i] for i in indices] for name in ("prompts", "texts", "token_ids", "logprobs")),
                settings={"sampling": {"n": pool.n}},
            )
            one.to_parquet(out / part / "candidates.parquet")
            rewards = pool.reward_array(NAMES)[indices].reshape(-1, len(NAMES))
            one.with_rewards(NAMES, rewards).to_parquet(out / part / "scored.parquet")
    return align(
        MODEL, pool.prompts, NAMES, words, out, candidates=CANDIDATES, max_new_tokens=TOKENS, seed=seed,
        overwrite=not begun, show_progress=True, texts_per_prompt=4, **options,
    )  # fmt: skip


def row(method: str, i: int, words: str, result: dict[str, Any]) -> dict[str, Any]:
    verdicts = {name: x["verdict"] for name, x in result["values"].items()}
    met = result["feasible"] and not any(verdict.startswith(MISSED) for verdict in verdicts.values())
    print(f"{method} {i}: {words}: {verdicts}", flush=True)
    kept = ("how", "feasible", "values", "lam", "kl", "ess", "n", "perplexity", "fell", "cost")
    return {"method": method, "palette": i, "words": words, "met": met, **{name: result.get(name) for name in kept}}


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    hits = {
        method: [
            sum(one["met"] for one in rows if one["method"] == method),
            sum(one["method"] == method for one in rows),
        ]
        for method in METHODS
    }
    settings = {"candidates": CANDIDATES, "tokens": TOKENS, "values": NAMES}
    write_json(options.out, {"settings": settings, "met": hits, "rows": rows})
    plot(rows, options.out.with_suffix(".png"))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """By how many standard errors each value lies beyond its level, by method."""
    from fastalign.report.figures import REALISED, TARGET, style

    known = [method for method in METHODS if any(one["method"] == method for one in rows)]
    with style.figure(7.6, 1.0 + 0.6 * len(known)) as figure:
        axes = figure.add_subplot()
        for y, method in enumerate(known):
            mine = [one for one in rows if one["method"] == method and one["feasible"]]
            x = [(v["realised"] - v["asked"]) / v["se"] for one in mine for v in one["values"].values()]
            jitter = np.random.default_rng(0).uniform(-0.16, 0.16, len(x))
            colours = [REALISED if value >= -2 else TARGET for value in x]
            axes.scatter(np.clip(x, -12, 12), y + jitter, s=14, c=colours, linewidths=0)
        axes.axvline(0, color=TARGET, linewidth=1.1)
        axes.axvline(-2, color=TARGET, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(known)), known)
        axes.invert_yaxis()
        axes.set_xlabel("standard errors beyond the level asked for, on held-out prompts (dotted: still within error)")
        figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--palettes", type=int, default=30)
    parser.add_argument("--trained", type=int, default=8)
    parser.add_argument("--budget", default="10m", help="of each training, as in `fastalign align`")
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--dtype", default="bfloat16", help="of the trained models")
    parser.add_argument("--methods", default=",".join(TRAINED))
    parser.add_argument("--work", type=Path, default=Path("out/align_palettes"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "align_palettes.json")
    options = parser.parse_args()
    if unknown := set(options.methods.split(",")) - set(TRAINED):
        parser.error(f"--methods must be of {', '.join(TRAINED)}; got {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    main()
