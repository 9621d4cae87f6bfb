"""The command `fastalign soup`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastalign import cli_lora
from fastalign._command import console, numbers, registrar
from fastalign.errors import UserError


class Method(str, Enum):
    linear = "linear"
    task_arithmetic = "task_arithmetic"
    slerp = "slerp"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    command = registrar(
        app, interrupted="interrupted; finished shards are kept, and the same command goes on from them"
    )
    command("fastalign soup positive/ harmless/ coherent/ --weights 0.5,0.3,0.2 --out soup")(soup)


def soup(
    models: Annotated[
        list[str],
        typer.Argument(help="Folders, *.safetensors files or hub names, all of one architecture; or LoRA adapters' folders."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make; with --grid, of folders 0, 1, 2 ...")],
    weights: Annotated[
        str | None, typer.Option(help="One for each model, comma-separated: 0.5,0.3,0.2; task arithmetic's λ.")
    ] = None,
    grid: Annotated[
        int | None, typer.Option(help="Instead: all weights that sum to 1 on a grid of so many points a side.")
    ] = None,
    method: Annotated[
        Method, typer.Option(help="linear Σ ρ w; task_arithmetic base + Σ λ (w - base); slerp, of two models.")
    ] = Method.linear,
    base: Annotated[
        str | None, typer.Option(help="What models (of task_arithmetic) or adapters were trained from; adapters are merged onto it.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="To store in: float32, bfloat16, float16, float8_e4m3fn ...; default as they are.")
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Divide weights by their sum, or take them as they are."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of one output file.")] = "5GB",
    memory_limit: Annotated[str, typer.Option(help="For buffers.")] = "512MB",
    rank: Annotated[int | None, typer.Option(help="Of an adapter that is written, at most; default exact.")] = None,
    extract: Annotated[
        bool, typer.Option("--extract", help="Write the LoRA adapter that makes --base nearly the one model given.")
    ] = False,
    energy: Annotated[
        float | None, typer.Option(help="--extract's: the least rank that keeps this share of each matrix's difference.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Though configurations or tokenizers differ; takes the first model's.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, and stop.")] = False,
) -> None:  # fmt: skip
    """Merge separately aligned models into soups Σ ρ w, many ρ in one reading of the files."""
    from fastalign.soup import execute, lora_merge, methods
    from fastalign.soup import plan as plans
    from fastalign.soup.lora_files import is_adapter
    from fastalign.soup.merge import already_made

    if extract:
        return cli_lora.extract(models, base, out, rank=rank, energy=energy, dtype=dtype, force=force)
    adapters = any(is_adapter(model) for model in models)
    if energy is not None or (rank is not None and (base is not None or not adapters)):
        raise UserError("--rank is for adapters that are written, --energy for --extract")
    if adapters and normalize is not None:
        raise UserError("adapters' weights are taken as they are: --normalize is for whole models")
    if (weights is None) == (grid is None):
        raise UserError("give --weights, one for each model, or --grid")
    rows = methods.simplex_grid(len(models), grid) if weights is None else numbers("weights", weights)
    sizes = {"max_shard_size": max_shard_size, "memory_limit": memory_limit}
    if adapters and base is None:
        return cli_lora.mix(models, rows, out, method=method.value, rank=rank, dtype=dtype, force=force)
    if adapters:
        made = lora_merge.plan(base, models, rows, out, dtype=dtype, force=force, **sizes)
    else:
        made = plans.make(
            models, rows, out, method=method.value, base=base, dtype=dtype, normalize=normalize, force=force, **sizes
        )
    told = console()
    for line in made.describe():
        told.print(line, soft_wrap=True, markup=False)
    if dry_run:
        already_made(made)
        told.print("dry run: nothing was written")
        return
    found = execute(made)
    if found.resumed == len(made.layout) and not found.read_bytes:
        told.print(f"{out}: all of it was there already", soft_wrap=True, markup=False)
        return
    moved = found.read_bytes + found.written_bytes
    went_on = f", {found.resumed} of {len(made.layout)} shards were there already" if found.resumed else ""
    told.print(
        f"{out}: {plans.size(moved)} moved in {found.seconds:.2f} s, {moved / found.seconds / 1e9:.2f} GB/s{went_on}",
        soft_wrap=True,
        markup=False,
    )
