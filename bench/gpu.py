"""The GPU kernels, and whole jobs, on a real GPU: correctness, speed, share of the hardware's limits, and peers.

    python bench/gpu.py [OP ...] [--out FOLDER] [--rounds N] [--minutes M] [--dry-run]

Every case is first checked against the float64 reference; then ours and the installed peers are timed in turn
with the device's own events (a cache-sized buffer is cleared before each call); calls so short that Python's launches
fill them are also timed as CUDA graphs. Writes gpu.json and gpu.md after each case, which name the device, driver and
versions; a run on the same goes on where the last one ended. The first case of every op comes first, the head's before
all. Without a GPU it says so and exits 0; --dry-run lists there what it would measure.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fastalign.bench import gpu_common, gpu_jobs
from fastalign.bench.gpu_common import KernelCase
from fastalign.bench.tables import quantiles

import fastalign
from fastalign._base.files import atomic_write, write_json

PACKAGES = (
    "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-attn",
    "flashinfer-python", "vllm",
)  # fmt: skip
SHORT = 0.2  # ms
CACHE_BYTES = 256 << 20  # more than any second-level cache: no call profits from the previous one


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help="kernels and jobs to measure; all by default")
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"), help="folder of the results")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each, in turn")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after that time")
    parser.add_argument("--dry-run", action="store_true", help="list the cases in order and measure nothing")
    options = parser.parse_args(argv)
    wanted = in_order([(op, case) for op, case in every() if not options.ops or op in options.ops])
    if not wanted:
        parser.error(f"no kernel is named {', '.join(options.ops)}")
    if options.dry_run:
        print("\n".join(plan(wanted)))
        return 0
    if not torch.cuda.is_available():
        print("no GPU here (torch.cuda.is_available() is False): nothing measured")
        return 0
    began, where = time.monotonic(), machine()
    everything = earlier(options.out / "gpu.json", where) or {
        "machine": where,
        "ceilings": {"bytes_per_s": copy_rate(), "flops_per_s": product_rate()},
        "results": [],
    }
    results = everything["results"]
    done = {(one["op"], one["name"]) for one in results}
    for op, case in wanted:
        if (op, case.name) in done or time.monotonic() - began > 60 * options.minutes:
            continue
        results.append({"op": op, **measure(case, options.rounds, everything["ceilings"])})
        print(line(results[-1]), flush=True)
        write_json(options.out / "gpu.json", everything)
        with atomic_write(options.out / "gpu.md") as path:
            path.write_text(table(everything))
    wrong = [f"{one['op']}: {one['name']}: {one['error']}" for one in results if one["error"]]
    print(f"{options.out / 'gpu.md'}: {len(results)} cases, {len(wrong)} wrong")
    for text in wrong:
        print(text, file=sys.stderr)
    return 1 if wrong else 0


def every() -> list[tuple[str, KernelCase]]:
    """(op, case) of the kernels and the jobs."""
    return [*gpu_common.cases(), *gpu_jobs.cases()]


def in_order(wanted: list[tuple[str, KernelCase]]) -> list[tuple[str, KernelCase]]:
    """Every op's first case, the head's before all, then every op's second, ..."""
    counts: dict[str, int] = {}
    places = []
    for op, case in wanted:
        counts[op] = counts.get(op, -1) + 1
        places.append((counts[op], op != "linear_token_logprobs", len(places), op, case))
    return [(op, case) for *_, op, case in sorted(places, key=lambda place: place[:3])]


def plan(wanted: list[tuple[str, KernelCase]]) -> list[str]:
    """What would be measured, one case a line, and against which packages."""
    found = versions()
    lines = [f"peers installed: {', '.join(found)}; not installed: {', '.join(p for p in PACKAGES if p not in found)}"]
    for op, case in wanted:
        work = case.build("meta", False)
        parts = [f"{op}: {case.name}", f"moves {work.bytes / 1e6:,.1f} MB"]
        parts += [f"multiplies {work.flops / 1e12:,.2f} TFLOP"] if work.flops else []
        parts += [f"published: {case.published}"] if case.published else []
        lines.append("; ".join(parts))
    return lines


def earlier(path: Path, where: dict[str, Any]) -> dict[str, Any] | None:
    """The results of a run on the same device and versions, without the cases that went wrong."""
    had = json.loads(path.read_text()) if path.is_file() else None
    if had is None or {**had["machine"], "date": None} != {**where, "date": None}:
        return None
    return had | {"results": [one for one in had["results"] if not one["error"]]}


def measure(case: KernelCase, rounds: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """Check one case, then time it and its peers in turn; a JSON value. A failed case has its error and no times."""
    gc.collect()
    torch.cuda.empty_cache()
    result: dict[str, Any] = {"name": case.name, "published": case.published, "error": "", "ms": {}, "peak_mb": {}}
    try:
        work = case.build("cuda", False)
        if work.check:
            work.check()
        calls = {"fastalign": work.run}
        for name, peer in work.peers.items():
            try:
                peer()
                calls[name] = peer
            except Exception as error:  # another package's failure becomes a line in the table
                result.setdefault("peers_failed", {})[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        rounds = min(rounds, work.rounds or rounds)
        for _ in range(1 if work.rounds else 3):
            for call in calls.values():
                call()
        flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(milliseconds(call, flush))
        result["ms"] = {name: quantiles(ts) for name, ts in times.items()}
        result["peak_mb"] = {name: peak_mb(call) for name, call in calls.items()}
        seconds = result["ms"]["fastalign"]["p50"] / 1e3
        result["bandwidth"] = work.bytes / seconds / ceilings["bytes_per_s"]
        result["flop_rate"] = work.flops / seconds / ceilings["flops_per_s"]
        result["graph_ms"] = {}
        for name, call in calls.items():
            if result["ms"][name]["p50"] < SHORT:
                try:
                    replay = captured(call)
                    result["graph_ms"][name] = quantiles([milliseconds(replay, flush) for _ in range(rounds)])
                except Exception as error:  # what waits for the device cannot be captured
                    failed = result.setdefault("graphs_failed", {})
                    failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    except Exception as error:  # one broken kernel must not hide the others
        result["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return result


def milliseconds(call: Callable[[], Any], flush: torch.Tensor) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    began.record()
    call()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call's kernels without Python's launches of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_mb(call: Callable[[], Any]) -> float:
    """The memory of one call beyond that before it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target, flush = torch.empty_like(source), torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    return 2 * source.numel() / (min(milliseconds(lambda: target.copy_(source), flush) for _ in range(10)) / 1e3)


def product_rate() -> float:
    """Floating operations a second of a bfloat16 product 8,192 × 8,192 × 8,192."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    return 2 * 8192**3 / (min(milliseconds(lambda: a @ b, flush) for _ in range(10)) / 1e3)


def versions() -> dict[str, str]:
    """Of the PACKAGES that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The machine on which the numbers were measured."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        driver = f"ROCm {torch.version.hip}" if torch.version.hip else "unknown"
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "fastalign": fastalign.__version__,
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }


def line(result: dict[str, Any]) -> str:
    title = f"{result['op']}: {result['name']}"
    if result["error"]:
        return f"{title}: WRONG, {result['error']}"
    ours = result["ms"]["fastalign"]["p50"]
    parts = [f"{ours:.3f} ms, {result['bandwidth']:.0%} of copy, {result['flop_rate']:.0%} of GEMM"]
    graphs = {name: t["p50"] for name, t in result.get("graph_ms", {}).items()}
    parts += [f"{graphs['fastalign']:.3f} ms as a graph"] if "fastalign" in graphs else []
    parts += [f"{t['p50'] / ours:.2f} × {name}" for name, t in result["ms"].items() if name != "fastalign"]
    return f"{title}: {', '.join(parts)}" + (f" (published: {result['published']})" if result["published"] else "")


def table(everything: dict[str, Any]) -> str:
    """Markdown: each case against each peer that ran, and below it the machine."""
    lines = [
        "| op | case | time (p20–p80) | of copy rate | of GEMM rate | against | faster by | peak memory, theirs → "
        "ours | published |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in everything["results"]:
        if r["error"]:
            lines.append(f"| {r['op']} | {r['name']} | WRONG: {r['error']} | | | | | | {r['published']} |")
            continue
        ours, mine = r["ms"]["fastalign"], r["peak_mb"]["fastalign"]
        graphs = {name: t["p50"] for name, t in r.get("graph_ms", {}).items()}
        graph = f"; as a graph {graphs['fastalign']:.3f} ms" if "fastalign" in graphs else ""
        start = (
            f"| {r['op']} | {r['name']} | {ours['p50']:.3f} ms ({ours['p20']:.3f}–{ours['p80']:.3f}){graph} | "
            f"{r['bandwidth']:.0%} | {r['flop_rate']:.0%} |"
        )
        peers = [name for name in r["ms"] if name != "fastalign"]
        if not peers:
            lines.append(f"{start} | | {mine:,.0f} MB | {r['published']} |")
        for name in peers:
            both = "fastalign" in graphs and name in graphs
            of_graphs = f", as graphs {graphs[name] / graphs['fastalign']:.2f} ×" if both else ""
            lines.append(
                f"{start} {name} | **{r['ms'][name]['p50'] / ours['p50']:.2f} ×**{of_graphs} | "
                f"{r['peak_mb'][name]:,.0f} → {mine:,.0f} MB | {r['published']} |"
            )
        for name, why in r.get("peers_failed", {}).items():
            lines.append(f"| {r['op']} | {r['name']} | | | | {name} | failed: {why} | | |")
    where, ceilings = everything["machine"], everything["ceilings"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines += [
        "",
        f"{where['device']}, driver {where['driver']}, CUDA {where['cuda']}, fastalign {where['fastalign']}, "
        f"{versions}, {where['date']}. Copy {ceilings['bytes_per_s'] / 1e12:.2f} TB/s, bfloat16 GEMM "
        f"{ceilings['flops_per_s'] / 1e12:.0f} TFLOP/s, measured in the same run.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
