"""Runs the cases of bench_<op>.py, keeps their results as JSON, and makes a table of them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from fastalign.bench.common import machine, measure

from fastalign._base.errors import UserError
from fastalign._base.files import atomic_write, write_json

GROUPS = {
    "losses": ("linear_token_logprobs", "token_logprobs", "gae"),
    "sampling": ("sample_tokens", "resample"),
    "map": ("map",),
    "training": ("dpo",),
    "decode": ("decode",),
    "soup": ("soup",),
}
BEGIN, END = "<!-- bench: begin (written by `make bench`) -->", "<!-- bench: end -->"


def run(names: Sequence[str], results: Path, *, say: Callable[[str], None]) -> None:
    """Measure the cases of the named groups, or whose title holds a name (all by default); `say` tells each at once.

    A part that begins with "<op>: " builds no other op's cases. Writes results/<op>.json. Raises UserError where nothing
    answers to the names.
    """
    grouped = {op for name in names for op in GROUPS.get(name, ())}
    parts = [name for name in names if name not in GROUPS]
    every = [op for ops in GROUPS.values() for op in ops]
    ran = False
    for op in every:
        if names and op not in grouped and all(part.partition(": ")[0] in {*every} - {op} for part in parts):
            continue
        found, whole = [], True
        for case in importlib.import_module(f"fastalign.bench.bench_{op}").cases():
            title = f"{op}: {case.name}"
            if names and op not in grouped and not any(part in title for part in parts):
                whole = False
                continue
            result = measure(case)
            found.append(result)
            say(_line(title, result))
        if found:
            _merge(results / f"{op}.json", found, whole)
            ran = True
    if not ran:
        raise UserError(f"benchmarks must be among {', '.join(GROUPS)} or parts of their names, got {', '.join(names)}")


def _merge(path: Path, results: list[dict], whole: bool) -> None:
    """A partial run replaces its own cases, if those that stay come from the same machine; else all are replaced."""
    kept: dict[str, dict] = {}
    here = machine()
    if path.exists() and not whole:
        old = json.loads(path.read_text())
        if all(old["machine"][key] == here[key] for key in ("cpu", "threads", "isa")):
            kept = {result["name"]: result for result in old["results"]}
    kept |= {result["name"]: result for result in results}
    write_json(path, {"machine": here, "results": list(kept.values())})


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


def table(results: Path, *, headline: bool = False) -> list[str]:
    """Every result as a row of a Markdown table: the ratio, and what it was measured against.

    headline: only the comparisons that have a bar to reach, with the bar.
    """
    lines = [
        "| op | case | against | faster by (p20–p80) | time | floor | peak memory, theirs → ours |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    machines = []
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text())
        if "results" not in found:  # a study with a figure of its own
            continue
        where = found["machine"]
        told = f"{where['cpu']}, {where['threads']} threads, {where['isa']}, torch {where['versions']['torch']}, {where['date']}"
        if told not in machines:
            machines.append(told)
        for result in found["results"]:
            ours = result["ms"]["fastalign"]["p50"]
            floor = f"{_figures(result['floor_ms'])} ms" if "floor_ms" in result else ""
            for peer, ratio in result["ratio"].items():
                if headline and peer not in result["bars"]:
                    continue
                memory = [result["peak_mb"].get(name) for name in (peer, "fastalign")]
                memory = "" if None in memory else f"{memory[0]:,.0f} → {memory[1]:,.0f} MB"
                bar = f", bar {result['bars'][peer]:g}" if headline else ""
                speed = f"**{ratio['p50']:.1f} ×** ({ratio['p20']:.1f}–{ratio['p80']:.1f}{bar})"
                lines.append(
                    f"| {path.stem} | {result['name']} | {peer} | {speed} | {_figures(ours)} ms | {floor} | {memory} |"
                )
    return [*lines, "", f"Measured in one run each, ours and theirs in turn, on {'; '.join(machines)}."]


def _figures(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def write_into(readme: Path, results: Path) -> None:
    """Put the headline table between its two marks in a Markdown file, and every row in RESULTS.md beside the results."""
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UserError(f"{readme} lacks the lines {BEGIN} and {END}")
    head, rest = text.split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    with atomic_write(readme) as beside:
        lines = [head + BEGIN, "", *table(results, headline=True), "", END + tail]
        beside.write_text("\n".join(lines), encoding="utf-8")
    with atomic_write(results.parent / "RESULTS.md") as beside:
        lines = ["# Every comparison", "", "Written by `make bench`; do not edit.", "", *table(results), ""]
        beside.write_text("\n".join(lines), encoding="utf-8")
