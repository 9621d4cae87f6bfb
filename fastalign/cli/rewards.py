"""The command `fastalign rewards`: what can be named in --rewards."""

from __future__ import annotations

from typing import Annotated

import typer

from fastalign.cli.command import Result, console, registrar


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    registrar(app)("fastalign rewards toxic")(rewards)


def rewards(
    words: Annotated[
        list[str] | None, typer.Argument(help="Show only those with all of these words in their name or description.")
    ] = None,
) -> Result:
    """List the rewards: those registered, and presets of the literature with their model, text form and licence."""
    from rich.table import Table

    from fastalign.rewards import available
    from fastalign.rewards.presets import PRESETS

    wanted = [word.lower() for word in words or []]
    chosen = {
        name: one
        for name, one in available().items()
        if all(word in f"{name} {one.description}".lower() for word in wanted)
    }
    own = Table("reward", "what it is", box=None, header_style="bold", pad_edge=False)
    presets = Table("preset", "model", "reads", "", "licence", box=None, header_style="bold", pad_edge=False)
    for name, one in chosen.items():
        if (preset := PRESETS.get(name)) is None:
            own.add_row(name, one.description if one.installed else f"needs {one.package}")
        else:
            sign = "-" if preset.direction < 0 else ""
            reads = preset.text if "{" not in preset.text else "pair"
            presets.add_row(name, preset.model, reads, f"{sign}{preset.head}", preset.licence)
    out = console()
    for table in (own, presets):
        if table.row_count:
            out.print(table)
    if not chosen:
        out.print("none")
    return {
        name: {**one._asdict(), **({"preset": vars(PRESETS[name])} if name in PRESETS else {})}
        for name, one in chosen.items()
    }
