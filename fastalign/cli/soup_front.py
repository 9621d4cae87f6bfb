"""The command `fastalign soup-front`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastalign._base.devices import check_loading
from fastalign._base.error_bars import plus_minus
from fastalign._base.files import read_json
from fastalign._base.units import counted
from fastalign.cli.command import Result, console, names, registrar
from fastalign.cli.options import (
    Device,
    Dtype,
    Limit,
    MaxNewTokens,
    N,
    Overwrite,
    Rewards,
    Seed,
    Temperature,
    TopP,
)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    command = registrar(app)
    command(
        "fastalign soup-front positive/ coherent/ --prompts bundled --rewards positive,coherence --grid 11 --out soups"
    )(soup_front)


def soup_front(
    models: Annotated[
        list[str], typer.Argument(help="Models of one architecture, or, with --base, LoRA adapters of that model.")
    ],
    prompts: Annotated[str, typer.Option(help="Prompts, as for `fastalign sample`.")],
    rewards: Rewards,
    out: Annotated[Path, typer.Option(help="Output folder for each soup's scored candidates, soups.json and figures.")],
    grid: Annotated[int, typer.Option(help="All weights that sum to 1 on a grid with this many points per side.")] = 5,
    palette: Annotated[
        Path | None,
        typer.Option(help="A palette file from `fastalign map`: choose the best ρ for it, and measure that soup."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model of the adapters.")] = None,
    n: N = 8,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    limit: Limit = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> Result:
    """Measure soups along ρ with rewards, without writing a model, and choose the ρ for a palette."""
    from rich.table import Table

    from fastalign.data import prompts as sources
    from fastalign.data import sampling
    from fastalign.rewards import references

    drawing: dict[str, Any] = {
        "n": n,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "temperature": temperature,
        "top_p": top_p,
    }
    sampling.check(drawing)
    check_loading(dtype, device)
    given = names("rewards", rewards)
    values = references.names(given)
    from fastalign.jobs import soup_front as job
    from fastalign.soup import simplex_grid

    target = job.read_palette(palette, values) if palette is not None else None
    front = job.study(
        models,
        simplex_grid(len(models), grid),
        sources.load(prompts, limit=limit),
        given,
        out,
        palette=target,
        base=base,
        dtype=dtype,
        device=device,
        overwrite=overwrite,
        **drawing,
    )
    terminal = console()
    table = Table(*(f"ρ {name}" for name in front.models), box=None, header_style="bold", pad_edge=False)
    for name in values:
        table.add_column(name, justify="right", no_wrap=True)
    count = front.means.shape[1]
    for row, levels, errors in zip(front.rho, front.levels, front.stderr, strict=True):
        table.add_row(
            *(f"{x:.3g}" for x in row), *(plus_minus(x, e, count) for x, e in zip(levels, errors, strict=True))
        )
    terminal.print(table)
    terminal.print(f"± is one standard error over {counted(count, 'prompt')} of {counted(n, 'candidate')}")
    if front.chosen is not None:
        chosen = front.chosen
        terminal.print(
            "chosen: " + ", ".join(f"{name} {x:.3f}" for name, x in zip(front.models, chosen["rho"], strict=True))
        )
        for j, name in enumerate(values):
            level = "free" if chosen["palette"][j] is None else f"{chosen['palette'][j]:.3f}"
            terminal.print(
                f"  {name}: target {level}, interpolated {chosen['predicted'][j]:.3f}, measured "
                f"{plus_minus(chosen['measured'][j], chosen['stderr'][j], count)}"
            )
        terminal.print(chosen["verdict"])
    terminal.print(f"{out / job.RECORD}", soft_wrap=True)
    return read_json(out / job.RECORD)
