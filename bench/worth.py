"""python bench/worth.py: are estimates for many candidates from a few correct? Twenty real cases; writes
results/worth.json.

SmolLM2-135M on the bundled prompts, scored with real rewards. A palette is solved on a pilot, the first n candidates of
some prompts, which also gives the estimate for N candidates (`decode.worth`); the measured value is that of the last N
of all prompts, which the pilot has not seen. --candidates: a file of `fastalign sample`, in place of drawing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from fastalign import palette, rewards
from fastalign._base.files import write_json
from fastalign.data import prompts
from fastalign.decode import Candidates, Sampler, effective_sample_size, worth
from fastalign.jobs.demo import MODEL

ASKED = (
    {"positive": 0.7, "harmless": 0.7, "coherence": 0.7},
    {"positive": 0.8},
    {"harmless": 0.8},
    {"coherence": 0.9},
    {"diversity": 0.6, "readability": 0.8},
)  # quantiles
NAMES = ("positive", "harmless", "coherence", "diversity", "readability")
PILOTS = ((0.5, 16), (0.5, 32), (1.0, 32), (1.0, 64))  # share of the prompts, candidates


def main() -> None:
    options = arguments()
    if options.candidates:
        drawn = Candidates.from_parquet(options.candidates, kind="candidates")
    else:
        sampler = Sampler.from_pretrained(MODEL, dtype="float32")
        drawn = sampler.sample(prompts.bundled(options.prompts), n=512, max_new_tokens=16, seed=0, show_progress=True)
    R = rewards.score(list(NAMES), *drawn.pairs(), show_progress=True).reshape(len(drawn.prompts), drawn.n, len(NAMES))
    many, cases = drawn.n // 2, []
    for requested in ASKED:
        columns = [NAMES.index(name) for name in requested]
        for share, n in PILOTS:
            some = R[:: round(1 / share), :n, columns]
            lam = solved(some, list(requested.values()))
            result = worth(some, lam)
            low, high = result.at(many, prompts=len(R))
            measured = float(effective_sample_size(R[:, -many:, columns], lam).mean())
            cases.append({
                "quantiles": requested, "lambda": lam.tolist(), "prompts": result.prompts, "n": n, "N": many,
                "low": low, "high": high, "measured": measured, "inside": bool((low or 1.0) <= measured <= high),
                "below": bool(low is not None and measured < low), "told": result.tell(many, prompts=len(R)),
            })  # fmt: skip
            print(f"{', '.join(requested)}: measured {measured:.1f}: {result.tell(many, prompts=len(R))}")
    inside, below = (sum(case[name] for case in cases) for name in ("inside", "below"))
    print(f"{inside} of {len(cases)} inside, {below} below")
    write_json(
        options.out,
        {
            "kind": "worth",
            "model": MODEL,
            "prompts": len(R),
            "candidates": drawn.n,
            "inside": inside,
            "below": below,
            "cases": cases,
        },
    )


def solved(some: np.ndarray, quantiles: list[float]) -> np.ndarray:
    """λ of the palette of these quantiles; if that is infeasible, of a point just inside, as in `fastalign map`."""
    flat = np.ascontiguousarray(some.reshape(-1, some.shape[2]))
    groups = np.repeat(np.arange(len(some)), some.shape[1])
    requested = np.array([np.quantile(flat[:, j], q) for j, q in enumerate(quantiles)])
    result = palette.solve(flat, requested, groups=groups)
    if not result.feasible:
        before = flat.mean(axis=0, dtype=np.float64)
        result = palette.solve(flat, before + 0.9 * (result.nearest - before), groups=groups)
    return result.lam


def arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--candidates", type=Path)
    options.add_argument("--prompts", type=int, default=16)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "worth.json")
    return options.parse_args()


if __name__ == "__main__":
    main()
