"""python -m bench.map_scaling: the time of one solve from a thousand samples to ten million, six values.

Writes results/map_scaling.json, map_scaling.svg and .png beside this file; the figure compares the times with a
straight line: a solve's cost is linear in the number of samples.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
from fastalign.bench.machine import machine
from fastalign.bench.map_peers import samples

from fastalign._base.files import write_json
from fastalign.palette import quantile_palette, solve
from fastalign.report import figures as plots

COUNTS = [round(10**e) for e in np.arange(3, 7.01, 0.5)]


def median_ms(rewards: np.ndarray, palette: np.ndarray) -> tuple[float, int]:
    solve(rewards, palette)
    times = []
    for _ in range(9):
        began = time.perf_counter()
        result = solve(rewards, palette)
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times), int(result.iterations)


def main() -> None:
    whole, rows = samples(COUNTS[-1], 6), []
    for n in COUNTS:
        rewards = np.ascontiguousarray(whole[:n])
        ms, passes = median_ms(rewards, quantile_palette(rewards, 0.7, values=[0, 1, 2]))
        rows.append({"n": n, "ms": ms, "passes": passes})
        print(f"n = {n:>10,}: {ms:9.3f} ms, {passes} passes", flush=True)
    out = Path(__file__).parent / "results"
    write_json(out / "map_scaling.json", {"machine": machine(), "results": [], "solves": rows})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    n, ms = np.array(COUNTS, dtype=float), np.array([row["ms"] for row in rows])
    axes.loglog(n, ms, "o-", color="#0072B2", label="solve, six values")
    axes.loglog(n, ms[-1] * n / n[-1], "--", color="#D55E00", label="proportional to n")
    axes.set(xlabel="samples n", ylabel="milliseconds")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    for suffix in ("svg", "png"):
        plots.save(figure, Path(__file__).parent / "results" / f"map_scaling.{suffix}")


if __name__ == "__main__":
    main()
