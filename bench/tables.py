"""python -m bench.tables [RUN.json]: stores and shows the results of `pytest bench --benchmark-json=RUN.json`.

Replaces the run's benchmarks in results/benchmarks.json, those of the same processor alone, drops those that no longer
exist, and writes RESULTS.md and README's table. Without a run, only writes these two.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
GROUPS = ("losses", "sampling", "map", "training", "decode", "soup")  # how benchmarks are marked
RESULTS, README = HERE / "results" / "benchmarks.json", HERE.parent / "README.md"
BEGIN, END = "<!-- bench: begin (written by `make bench`) -->", "<!-- bench: end -->"
KEPT = ("group", "name", "fullname", "extra_info", "stats")  # of pytest-benchmark's entries


def quantiles(values: list[float]) -> dict[str, float]:
    """How times and ratios are kept: the median, and the numbers that a fifth lie below and above."""
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return {"p20": fifths[0], "p50": statistics.median(values), "p80": fifths[3]}


def line(benchmark: dict) -> str:
    """One benchmark on the terminal."""
    result = benchmark["extra_info"]
    parts = [f"{benchmark['group']}: {title(benchmark)}: {_ms(benchmark['stats']['median'])}"]
    for peer, ratio in result["ratio"].items():
        bar = result["bars"].get(peer)
        message = "" if bar is None else f" (bar {bar:.3g}{'' if ratio['p50'] >= bar else ', MISSED'})"
        parts.append(f"{figures(ratio['p50'])} × {peer} [{spread(result, ratio)}]{message}")
    parts += [f"floor {_ms(result['floor'])}"] if "floor" in result else []
    parts += [result["check"]] if "check" in result else []
    return ", ".join(parts)


def table(benchmarks: list[dict], *, headline: bool = False) -> list[str]:
    """Every comparison as a row of a Markdown table; headline: for each group with a bar, the first comparison that
    reaches it."""
    lines = [
        "| op | case | against | faster by (p20–p80) | bar | time | floor | peak memory, theirs → ours | measured |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    machines, shown = [], set()
    for benchmark in sorted(benchmarks, key=lambda one: one["group"]):
        result = benchmark["extra_info"]
        place = (
            f"{result['processor']}, {result['threads']} threads, {result['isa']}, torch {result['versions']['torch']}"
        )
        floor = _ms(result["floor"]) if "floor" in result else ""
        for peer, ratio in result["ratio"].items():
            bar = result["bars"].get(peer)
            if headline and (bar is None or ratio["p50"] < bar or benchmark["group"] in shown):
                continue
            shown.add(benchmark["group"])
            machines += [place] * (place not in machines)
            memory = [result["peak_mb"].get(name) for name in (peer, "fastalign")]
            cells = [benchmark["group"], title(benchmark), peer]
            cells += [f"**{figures(ratio['p50'])} ×** ({spread(result, ratio)})"]
            cells += ["" if bar is None else f"{bar:.3g}{'' if ratio['p50'] >= bar else ', missed'}"]
            cells += [_ms(benchmark["stats"]["median"]), floor]
            cells += ["" if None in memory else f"{memory[0]:,.0f} → {memory[1]:,.0f} MB"]
            cells += [f"{result['date']} on {machines.index(place) + 1}"]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *(f"{i}. {place}" for i, place in enumerate(machines, 1))]


def title(benchmark: dict) -> str:
    """The parameters in brackets after the test's name, or that name."""
    name, _, case = benchmark["name"].removesuffix("]").partition("[")
    return (case or name.removeprefix("test_").replace("_", " ")).replace(" x ", " × ")


def spread(result: dict, ratio: dict[str, float]) -> str:
    """Within which the middle three fifths of the rounds' ratios lie."""
    return "one round" if result["rounds"] == 1 else f"{figures(ratio['p20'])}–{figures(ratio['p80'])}"


def _ms(seconds: float) -> str:
    return f"{figures(1e3 * seconds)} ms"


def figures(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def existing() -> list[str]:
    """The existing benchmarks, by pytest's names."""
    command = [sys.executable, "-m", "pytest", str(HERE), "--collect-only", "-q", "-o", "addopts="]
    message = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parent).stdout
    return [line for line in message.splitlines() if "::" in line]


def keep(run: Path, names: Sequence[str]) -> None:
    """Merge a run into RESULTS and keep only these names; benchmarks that were not run keep their numbers and dates."""
    from fastalign._base.files import write_json

    order = {name: i for i, name in enumerate(names)}
    every = json.loads(RESULTS.read_text())["benchmarks"] + json.loads(run.read_text())["benchmarks"]
    known = {(one["fullname"], one["extra_info"]["processor"]): one for one in every if one["fullname"] in order}
    for one in known.values():
        one["stats"].pop("data", None)
    kept = sorted(known, key=lambda key: order[key[0]])
    write_json(RESULTS, {"benchmarks": [{part: known[key][part] for part in KEPT} for key in kept]})


def write() -> None:
    """RESULTS.md and, between its two marks, README's table."""
    from fastalign._base.errors import UserError
    from fastalign._base.files import atomic_write

    benchmarks = json.loads(RESULTS.read_text())["benchmarks"]
    text = README.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UserError(f"{README} lacks the lines {BEGIN} and {END}")
    (head, rest), every = text.split(BEGIN, 1), table(benchmarks)
    lines = [head + BEGIN, "", *table(benchmarks, headline=True), "", END + rest.split(END, 1)[1]]
    with atomic_write(README) as beside:
        beside.write_text("\n".join(lines), encoding="utf-8")
    lines = [
        "# Every comparison",
        "",
        "Written by `make bench`; do not edit. Ours and theirs in turn in one run.",
        "",
        *every,
        "",
    ]
    with atomic_write(HERE / "RESULTS.md") as beside:
        beside.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:]:
        keep(Path(sys.argv[1]), existing())
    write()
