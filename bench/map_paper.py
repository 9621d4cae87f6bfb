"""python -m bench.map_paper --data FILE: every palette of the MAP paper (arXiv 2410.19198) on its authors' rewards.

FILE is an .npz with `values` (the columns' names) and one (n, m) array of rewards per model. For each palette HHH-q:
the verdict, λ, KL, effective sample size and time of this solver, beside 150 Adam steps on log λ in float32 (what the
paper runs), scipy's L-BFGS-B and cvxpy with Clarabel. Then what a decoder can do with N samples per prompt: picking one
of N moves the policy by at most log N − (N−1)/N nats, so no rule for picking reaches a palette whose least KL is
larger. The joint dual may also reweight the prompts, which a decoder cannot: its KL is a lower bound on what a decoder
needs, and so is the N given here.

Writes results/map_paper.json, its figures (fronts and palettes in pairs of the values that HHH asks for, the λ region,
effective sample sizes) and MAP_PAPER.md beside this file.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from itertools import combinations
from pathlib import Path

import numpy as np
from fastalign.bench.machine import machine
from fastalign.bench.map_peers import adam, cvxpy_clarabel, residual, scipy_lbfgsb

from fastalign._base.errors import UserError
from fastalign._base.files import atomic_write, write_json
from fastalign.palette import held_out, quantile_palette, solve, standard_errors
from fastalign.report import figures as plots
from fastalign.report.study import study

QUANTILES = (50, 60, 70, 80, 90, 99)
ASKED = ("humor", "helpful", "harmless")
SAMPLES = (4, 16, 64, 256, 1024)
BUDGET_SECONDS = 4  # of a solver's repetitions, which an infeasible palette may use up at once


def best_of_kl(n: float) -> float:
    """The most that picking one of n samples can move a policy, in nats (Beirami et al., arXiv 2401.01879)."""
    return float(np.log(n) - (n - 1) / n)


def samples_for(kl: float) -> int:
    """The least N with log N − (N−1)/N ≥ kl."""
    low, high = 1, 2
    while best_of_kl(high) < kl:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if best_of_kl(middle) < kl else (low, middle)
    return 1 if kl <= 0 else high


def reach(rewards: np.ndarray, palette: np.ndarray, n: int, limit: float) -> float:
    """The largest t, up to `limit`, for which mean + t (palette − mean) needs no more KL than one of n samples
    gives."""
    mean = rewards.mean(axis=0, dtype=np.float64)
    low, high = 0.0, limit
    for _ in range(4):  # 33 palettes at a time
        ts = np.linspace(low, high, 33)
        result = solve(rewards, mean + ts[:, None] * (palette - mean))
        within = result.feasible & (result.kl <= best_of_kl(n))
        last = int(np.flatnonzero(within).max(initial=0))
        low, high = ts[last], ts[min(last + 1, 32)]
    return float(low)


def lp_slack(rewards: np.ndarray, palette: np.ndarray) -> float:
    """max t such that some mixture of the samples reaches palette + t in every value, by linear programming."""
    from scipy.optimize import linprog

    n, m = rewards.shape
    result = linprog(
        np.r_[np.zeros(n), -1.0],
        A_ub=np.c_[-(rewards.astype(np.float64) - palette).T, np.ones(m)],
        b_ub=np.zeros(m),
        A_eq=[[1.0] * n + [0.0]],
        b_eq=[1.0],
        bounds=[(0, None)] * n + [(None, None)],
        method="highs",
    )
    return -float(result.fun)


def timed(call) -> tuple[object, float]:
    """What the call returns and its median milliseconds, a first call that warms up apart."""
    call()
    began, times, result = time.perf_counter(), [], None
    while not times or (len(times) < 15 and time.perf_counter() - began + times[-1] < BUDGET_SECONDS):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return result, 1e3 * statistics.median(times)


def peer(name: str, call, rewards: np.ndarray, palette: np.ndarray) -> dict:
    """A peer's λ, its KKT residual and its time; or its error message."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            lam, ms = timed(lambda: call(rewards, palette))
    except Exception as error:  # solvers report failure in different ways
        return {"ms": None, "lambda": None, "residual": None, "says": f"{type(error).__name__}: {error}"[:200]}
    if lam is None or not np.isfinite(lam).all():
        return {"ms": ms, "lambda": None, "residual": None, "says": "no solution" if lam is None else "NaN"}
    with np.errstate(all="ignore"):
        left = residual(rewards, palette, np.asarray(lam, dtype=float))
    return {"ms": ms, "lambda": [float(x) for x in lam], "residual": left if np.isfinite(left) else None, "says": ""}


def row(rewards: np.ndarray, values: list[str], q: int) -> dict:
    palette = quantile_palette(rewards, q / 100, values=[values.index(name) for name in ASKED])
    actual, ms = timed(lambda: solve(rewards, palette))
    wide = rewards.astype(np.float64)
    result = {
        "palette": palette.tolist(),
        "feasible": bool(actual.feasible),
        "lp_slack": lp_slack(rewards, palette),
        "scaling": actual.scaling,
        "nearest": None if actual.nearest is None else actual.nearest.tolist(),
        "ms": ms,
        "passes": int(actual.iterations),
        "peers": {
            "Adam, 150 steps": peer("adam", adam, rewards, palette),
            "L-BFGS-B": peer("lbfgsb", scipy_lbfgsb, wide, palette),
            "cvxpy + Clarabel": peer("cvxpy", cvxpy_clarabel, rewards, palette),
        },
    }
    if actual.feasible:
        errors, apart = standard_errors(rewards, actual.lam), held_out(rewards, palette)
        result |= {
            "lambda": actual.lam.tolist(),
            "lambda_error": errors.lam.tolist(),
            "kl": float(actual.kl),
            "ess": float(actual.ess),
            "nearly_infeasible": bool(actual.nearly_infeasible),
            "kkt_residual": float(actual.kkt_residual),
            "duality_gap": float(actual.duality_gap),
            "held_out_met": int(apart.met.sum()),
            "samples_needed": samples_for(actual.kl),
        }
    limit = 1.0 if actual.feasible else actual.scaling
    result["reach"] = {str(n): reach(rewards, palette, n, limit) for n in SAMPLES}
    return result


def draw(model: str, rewards: np.ndarray, values: list[str], folder: Path) -> None:
    """The λ region and the fronts of one model, as the paper's figures have them: all samples tilted together."""
    requested = [values.index(name) for name in ASKED]
    palettes = {f"HHH-{q}": quantile_palette(rewards, q / 100, values=requested) for q in QUANTILES}
    figures = study(values, rewards[None], joint=True, palettes=palettes, n_lam=600).figures(
        list(combinations(requested, 2))
    )
    for name in ("front", "region", "ess"):
        for suffix in ("svg", "png"):
            plots.save(figures[name], folder / f"map_paper_{model}_{name}.{suffix}")


def table(models: dict[str, dict], values: list[str]) -> list[str]:
    names = list(next(iter(next(iter(models.values())).values()))["peers"])
    lines = [
        "# The MAP paper's palettes, solved",
        "",
        "Written by `python -m bench.map_paper`; do not edit. λ in the order " + ", ".join(values) + ".",
        "",
        "| model | palette | reachable | LP slack | λ | KL | ESS | time | " + " | ".join(names) + " |",
        "| --- " * (8 + len(names)) + "|",
    ]
    for model, rows in models.items():
        for q, r in rows.items():
            if r["feasible"]:
                lam = ", ".join("0" if x == 0 else f"{x:.3f}" for x in r["lambda"])
                flag = " (few samples)" if r["nearly_infeasible"] else ""
                own = f"yes | {r['lp_slack']:+.3f} | {lam} | {r['kl']:.2f} | {r['ess']:,.0f}{flag}"
            else:
                own = f"no, up to {r['scaling']:.1%} of the way | {r['lp_slack']:+.3f} | | | "
            peers = []
            for each in r["peers"].values():
                left = "" if each["residual"] is None else f"residual {each['residual']:.0e}"
                ratio = "" if each["ms"] is None else f"{each['ms'] / r['ms']:,.0f} × the time, "
                peers.append(ratio + (each["says"] or left))
            lines.append(f"| {model} | HHH-{q} | {own} | {r['ms']:.2f} ms | " + " | ".join(peers) + " |")
    lines += [
        "",
        "## What a decoder can reach",
        "",
        "Each prompt's answer picked from N samples: the share of the way from the mean to the palette that N allows "
        "at",
        "most, and the least N that could reach all of it. Both are bounds in the decoder's favour (see the source).",
        "",
        "| model | palette | KL needed | N needed, at least | e^KL | " + " | ".join(f"N = {n}" for n in SAMPLES) + " |",
        "| --- " * (5 + len(SAMPLES)) + "|",
    ]
    for model, rows in models.items():
        for q, r in rows.items():
            need = (
                f"{r['kl']:.2f} | {r['samples_needed']} | {np.exp(r['kl']):.1f}"
                if r["feasible"]
                else "out of reach | | "
            )
            lines.append(
                f"| {model} | HHH-{q} | {need} | " + " | ".join(f"{t:.0%}" for t in r["reach"].values()) + " |"
            )
    lines += ["", "## Fronts and λ", ""]
    lines += [
        f"![{model}: {name}](results/map_paper_{model}_{name}.png)" for model in models for name in ("front", "region")
    ]
    here = machine()
    return [
        *lines,
        "",
        f"Measured on {here['processor']}, {here['threads']} threads, {here['isa']}, {here['date']}.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.map_paper", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the .npz of rewards")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of map_paper.json")
    arguments = parser.parse_args()
    if not arguments.data.is_file():
        raise SystemExit(f"{arguments.data}: no such file")
    with np.load(arguments.data, allow_pickle=False) as data:
        values = [str(v) for v in data["values"]]
        rewards = {k: data[k] for k in data.files if data[k].ndim == 2}
    if not set(ASKED) <= set(values):
        raise UserError(f"{arguments.data} must have the values {', '.join(ASKED)}, got {', '.join(values)}")
    models: dict[str, dict] = {}
    for model, x in rewards.items():
        models[model] = {}
        for q in QUANTILES:
            result = models[model][str(q)] = row(x, values, q)
            verdict = f"KL {result['kl']:.2f}, ESS {result['ess']:,.0f}" if result["feasible"] else "infeasible"
            print(f"{model} HHH-{q}: {verdict}, {result['ms']:.2f} ms", flush=True)
        draw(model, x, values, arguments.out)
    write_json(
        arguments.out / "map_paper.json", {"machine": machine(), "results": [], "values": values, "models": models}
    )
    with atomic_write(arguments.out.parent / "MAP_PAPER.md") as beside:
        beside.write_text("\n".join(table(models, values)), encoding="utf-8")


if __name__ == "__main__":
    main()
