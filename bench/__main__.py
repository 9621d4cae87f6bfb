"""python -m bench [name ...]: run the benchmarks whose name contains one of these (all by default).

Writes bench/results/<op>.json per file bench_<op>.py and the table in README.md. `--table` only rewrites the table.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from bench.common import machine, measure

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
BEGIN, END = "<!-- bench: begin (written by `make bench`) -->", "<!-- bench: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the benchmarks' names, such as token_logprobs or 'V 49,152'")
    parser.add_argument("--table", action="store_true", help="only rewrite the README's table from the results")
    arguments = parser.parse_args()
    if not arguments.table:
        run(arguments.names)
    write_table()


def run(wanted: list[str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    for path in sorted(HERE.glob("bench_*.py")):
        module = importlib.import_module(f"bench.{path.stem}")
        results = []
        for case in module.cases():
            title = f"{path.stem.removeprefix('bench_')}: {case.name}"
            if wanted and not any(part in title for part in wanted):
                continue
            result = measure(case)
            results.append(result)
            print(_line(title, result), flush=True)
        if results:
            _merge(RESULTS / f"{path.stem.removeprefix('bench_')}.json", results)


def _merge(path: Path, results: list[dict]) -> None:
    """A partial run replaces its own cases, if those that stay come from the same machine; else all are replaced."""
    kept: dict[str, dict] = {}
    here = machine()
    if path.exists():
        old = json.loads(path.read_text())
        if all(old["machine"][key] == here[key] for key in ("cpu", "threads", "isa")):
            kept = {result["name"]: result for result in old["results"]}
    kept |= {result["name"]: result for result in results}
    path.write_text(json.dumps({"machine": here, "results": list(kept.values())}, indent=1) + "\n")


def _line(title: str, result: dict) -> str:
    parts = [f"{title}: {result['ms']['fastalign']['p50']:.2f} ms"]
    for peer, ratio in result["ratio"].items():
        bar = result["bars"].get(peer)
        told = "" if bar is None else f" (bar {bar:g}{'' if ratio['p50'] >= bar else ', MISSED'})"
        parts.append(f"{ratio['p50']:.1f} × {peer} [{ratio['p20']:.1f}–{ratio['p80']:.1f}]{told}")
    if "floor_ms" in result:
        parts.append(f"floor {result['floor_ms']:.2f} ms")
    if "note" in result:
        parts.append(result["note"])
    return ", ".join(parts)


def write_table() -> None:
    """Every result as a row of README's table: the ratio, and what it was measured against."""
    lines = [
        "| op | case | against | faster by (p20–p80) | time | peak memory, theirs → ours |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    machines = []
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text())
        where = found["machine"]
        told = f"{where['cpu']}, {where['threads']} threads, {where['isa']}, torch {where['versions']['torch']}, {where['date']}"
        if told not in machines:
            machines.append(told)
        for result in found["results"]:
            for peer, ratio in result["ratio"].items():
                ours = result["ms"]["fastalign"]["p50"]
                memory = [result["peak_mb"].get(name) for name in (peer, "fastalign")]
                memory = "" if None in memory else f"{memory[0]:,.0f} → {memory[1]:,.0f} MB"
                speed = f"**{ratio['p50']:.1f} ×** ({ratio['p20']:.1f}–{ratio['p80']:.1f})"
                lines.append(f"| {path.stem} | {result['name']} | {peer} | {speed} | {ours:.3g} ms | {memory} |")
    lines += ["", f"Measured in one run each, ours and theirs in turn, on {'; '.join(machines)}."]
    text = README.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"README.md lacks the lines {BEGIN} and {END}")
    head, rest = text.split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    README.write_text("\n".join([head + BEGIN, "", *lines, "", END + tail]), encoding="utf-8")


if __name__ == "__main__":
    main()
