"""The command `fastalign soup-front`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastalign._base.devices import check_loading
from fastalign._base.error_bars import plus_minus
from fastalign._base.errors import UserError
from fastalign._base.files import read_json
from fastalign._base.units import counted
from fastalign.cli.command import Found, Overwrite, console, names, registrar


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    command = registrar(app)
    command(
        "fastalign soup-front positive/ coherent/ --prompts bundled --rewards positive,coherence --grid 11 --out soups"
    )(soup_front)


def soup_front(
    models: Annotated[
        list[str], typer.Argument(help="Models of one architecture; or, with --base, LoRA adapters of that model.")
    ],
    prompts: Annotated[str, typer.Option(help="As `fastalign sample` takes them.")],
    rewards: Annotated[str, typer.Option(help="Comma-separated names; `fastalign info` lists them.")],
    out: Annotated[Path, typer.Option(help="Folder for each soup's scored candidates, soups.json and figures.")],
    grid: Annotated[int, typer.Option(help="All weights that sum to 1 on a grid of so many points a side.")] = 5,
    palette: Annotated[
        Path | None,
        typer.Option(help="A palette file, as `fastalign map` writes it: choose the ρ nearest it, and measure it."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Of the adapters.")] = None,
    n: Annotated[int, typer.Option("-n", "--candidates", help="Candidates per prompt.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens per candidate, at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    limit: Annotated[int | None, typer.Option(help="Only the first so many prompts.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    overwrite: Overwrite = False,
) -> Found:
    """Measure soups along ρ with rewards, writing no model; choose the ρ for a palette."""
    from rich.table import Table

    from fastalign.data import prompts as sources
    from fastalign.data import sampling
    from fastalign.rewards import check_names

    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    drawing = {"n": n, "max_new_tokens": max_new_tokens, "seed": seed, "temperature": temperature, "top_p": top_p}
    sampling.check(drawing)
    check_loading(dtype, device)
    values = names("rewards", rewards)
    check_names(values)
    from fastalign.jobs import soup_front as job
    from fastalign.soup import simplex_grid

    asked = job.read_palette(palette, values) if palette is not None else None
    found = job.study(
        models,
        simplex_grid(len(models), grid),
        sources.load(prompts)[:limit],
        values,
        out,
        palette=asked,
        base=base,
        dtype=dtype,
        device=device,
        overwrite=overwrite,
        **drawing,
    )
    told = console()
    table = Table(*(f"ρ {name}" for name in found.models), box=None, header_style="bold", pad_edge=False)
    for name in values:
        table.add_column(name, justify="right", no_wrap=True)
    count = found.means.shape[1]
    for row, levels, errors in zip(found.rho, found.levels, found.stderr, strict=True):
        table.add_row(
            *(f"{x:.3g}" for x in row), *(plus_minus(x, e, count) for x, e in zip(levels, errors, strict=True))
        )
    told.print(table)
    told.print(f"± is one standard error over {counted(count, 'prompt')} of {counted(n, 'candidate')}")
    if found.chosen is not None:
        chosen = found.chosen
        told.print(
            "chosen: " + ", ".join(f"{name} {x:.3f}" for name, x in zip(found.models, chosen["rho"], strict=True))
        )
        for j, name in enumerate(values):
            level = "free" if chosen["palette"][j] is None else f"{chosen['palette'][j]:.3f}"
            told.print(
                f"  {name}: asked for {level}, interpolated {chosen['predicted'][j]:.3f}, measured "
                f"{plus_minus(chosen['measured'][j], chosen['stderr'][j], count)}"
            )
        told.print(chosen["verdict"])
    told.print(f"{out / job.RECORD}", soft_wrap=True)
    return read_json(out / job.RECORD)
