"""The result of `fastalign align` on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastalign.report.proof import IMPOSSIBLE, MISSED, WATCHED


def show(result: Mapping[str, Any], console: Console, page: Path) -> None:
    """Print the content of align.json: a row for each value, the headline, KL and cost, and where the page lies."""
    table = Table("value", box=None, header_style="bold", pad_edge=False)
    for name in ("base", "asked", "predicted", "realised ± SE", "verdict"):
        table.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=True)
    for name, x in result["values"].items():
        asked = "–" if x["asked"] is None else f"{x['op']} {x['asked']:.4f}"
        realised = "–" if x["realised"] is None else f"{x['realised']:.4f} ± {_number(x['se'], 'n/a')}"
        row = (name, _number(x["base"]), asked, _number(x["predicted"]), realised, x["verdict"])
        table.add_row(*row, style="yellow" if x["verdict"].startswith((MISSED, IMPOSSIBLE)) else None)
    console.print(table)
    console.print(result["headline"])
    if (kl := result["kl"])["measured"] is not None:
        console.print(
            f"{result['how']}: KL {round(kl['measured'], 3) + 0.0:.3f} nats measured, {kl['predicted']:.3f} predicted; "
            f"{result['heldout_prompts']} held-out prompts, {result['train_prompts']} to learn from"
        )
    for name in result.get("fell", ()):
        watched = result["values"][name]["verdict"] == WATCHED
        said = f"watched, not optimised: {name}" if watched else f"nobody asked about {name}, and it"
        console.print(f"{said} fell by more than its error", style="yellow")
    if result["certificate"] is not None:
        console.print(result["certificate"]["text"], style="yellow")
    if result["nearest"] is not None:
        levels = ", ".join(f"{name} {level:.4f}" for name, level in result["nearest"].items())
        console.print(f"nearest that can be reached: {levels}")
    console.print(f"{result['cost']['tokens']:,} tokens, {result['cost']['seconds']:,.0f} s; {page}")


def _number(x: float | None, missing: str = "–") -> str:
    return missing if x is None else f"{x:.4f}"
