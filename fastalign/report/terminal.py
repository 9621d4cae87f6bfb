"""The report on a terminal: the table, why a value misses its target, and a few texts side by side."""

from __future__ import annotations

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fastalign.report import Example, Report

WIDTH = 100
LONGEST = 360
_STYLES = {"met": "green", "within error": "green", "short": "yellow", "above": "yellow"}


def show(report: Report, console: Console, *, examples: int = 3) -> None:
    """Print within 100 columns."""
    width = min(WIDTH, console.width)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("value", max_width=18, no_wrap=True)
    for name in ("before", "target", "predicted", "realised ± SE"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for v in report.values:
        verdict = {"met": "met", "within error": "met within error"}.get(v.verdict, v.missed)
        realised = Text.assemble((v.show(v.realised), "bold"), (f" {v.show_error(report)}", "dim"))
        table.add_row(
            Text(v.name),
            v.show(v.before),
            v.wish,
            v.show(v.predicted),
            realised,
            Text(verdict, _STYLES[v.verdict]),
        )
    console.print(table, width=width)
    console.print(Text(report.headline, "bold green" if report.agrees else "bold yellow"), width=width)
    of = report.candidates * report.prompts if report.dual == "joint" else report.candidates
    ess = report.ess_per_prompt
    console.print(
        Text(
            f"KL {report.kl:.3f} nats; effective sample size {report.ess:,.1f} of {of:,}, "
            f"over prompts median {np.median(ess):,.1f}, least {ess.min():,.1f}"
        ),
        width=width,
    )
    for v in report.values:
        if v.reason:
            console.print(Text(f"{v.name} {v.missed}: {v.reason}.", "yellow"), width=width)
    for note in report.notes:
        console.print(Text(note, "yellow"), width=width)
    if report.examples:
        # The last ones are random prompts: show at least one of them.
        chosen = report.examples[: examples - 1] + report.examples[examples - 1 :][-1:]
        console.print(_sides(chosen, width), width=width)


def _sides(examples: list[Example], width: int) -> Panel:
    parts: list[RenderableType] = []
    for example in examples:
        sides = Table.grid(expand=True, padding=(0, 2))
        sides.add_column(ratio=1)
        sides.add_column(ratio=1)
        sides.add_row(Text("before", "dim"), Text("after", "dim"))
        sides.add_row(Text(_cut(example.before)), Text(_cut(example.after)))
        parts += [Text(_cut(example.prompt, 180), "bold cyan"), sides, Text()]
    return Panel(
        Group(*parts[:-1]),
        title="before and after",
        title_align="left",
        border_style="dim",
        width=width,
        padding=(1, 2),
    )


def _cut(text: str, longest: int = LONGEST) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"
