"""The command `fastalign soup`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fastalign._base.errors import UserError, printable
from fastalign.cli import lora as cli_lora
from fastalign.cli.command import Result, console, named_values, numbers, registrar
from fastalign.cli.options import Overwrite


class _Command(TyperCommand):
    """Its help lists the methods and their parameters; they are imported only when help is shown."""

    def format_help(self, *args: Any) -> None:
        from fastalign.soup import METHODS

        options: dict[str | None, Any] = {one.name: one for one in self.params}
        options["method"].metavar = f"[{'|'.join(METHODS)}]"
        taken = [f"{one.name} ({', '.join(one.parameters)})" for one in METHODS.values() if one.parameters]
        options["set_"].help += f" Parameters by method: {', '.join(taken)}."
        super().format_help(*args)


def _known(method: str) -> str:
    from fastalign.soup import METHODS

    if method not in METHODS:
        raise typer.BadParameter(f"must be one of {', '.join(METHODS)}, got {method!r}")
    return method


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    command = registrar(app)
    command("fastalign soup positive/ harmless/ coherent/ --weights 0.5,0.3,0.2 --out soup")(soup)
    app.registered_commands[-1].cls = _Command


def soup(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders, *.safetensors files or hub names of models of one architecture; or folders of LoRA adapters."
        ),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="Output folder; with --grid, it contains the folders 0, 1, 2 ...")],
    recipe: Annotated[
        Path | None,
        typer.Option(help="A YAML file in fastalign's or mergekit's format, in place of models and their options."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One weight per model, comma-separated: 0.5,0.3,0.2; for task arithmetic, its λ.")
    ] = None,
    grid: Annotated[
        int | None,
        typer.Option(help="Instead of --weights: all weights that sum to 1 on a grid with this many points per side."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            callback=_known,
            help="linear: Σ ρ w; task_arithmetic: base + Σ λ (w - base); slerp: two models; ties, dare ...",
        ),
    ] = "linear",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A parameter of the method, such as density=0.3; repeatable.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help=(
                "The base model of the models (for task_arithmetic, ties ...) or adapters; adapters are merged into it."
            )
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Output type: float32, bfloat16, float16, float8_e4m3fn ...; default: the inputs' type."),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Divide the weights by their sum, or use them unchanged."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of one output file.")] = "5GB",
    memory_limit: Annotated[str | None, typer.Option(help="Memory for buffers; default: 512MB.")] = None,
    rank: Annotated[int | None, typer.Option(help="Maximum rank of an output adapter; default: exact.")] = None,
    extract: Annotated[
        bool, typer.Option("--extract", help="Write the LoRA adapter that best turns --base into the given model.")
    ] = False,
    energy: Annotated[
        float | None,
        typer.Option(help="For --extract: use the smallest rank that keeps this share of each matrix's difference."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Merge even if configurations or tokenizers differ, using the first model's."),
    ] = False,
    sync: Annotated[
        bool,
        typer.Option(
            "--sync/--no-sync",
            help="Flush the output to disk, or leave that to the operating system (for temporary soups).",
        ),
    ] = True,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Fail on NaN or infinity in an input, or on a number outside the output type's range."
        ),
    ] = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan without writing anything.")
    ] = False,
) -> Result:
    """Merge separately aligned models into soups Σ ρ w; many ρ need only one read of the files."""
    from fastalign.soup import plan as plans
    from fastalign.soup import read_recipe, simplex_grid
    from fastalign.soup.checkpoint import is_adapter

    sizes: dict[str, Any] = {"max_shard_size": max_shard_size, "memory_limit": memory_limit}
    if recipe is not None:
        if models or base or weights or grid or set_ or extract or method != "linear":
            raise UserError("--recipe defines the merge: leave out the models and their options")
        written = read_recipe(recipe)
        given = {"dtype": dtype, "normalize": normalize, "force": force or None}
        written |= {key: value for key, value in given.items() if value is not None}
        return _merge(plans.make(**{**sizes, **written}, out=out), dry_run, sync, strict, overwrite)
    models = models or []
    if not models:
        raise UserError("give the models to merge, or --recipe")
    adapters = any(is_adapter(model) for model in models)
    if dry_run and (extract or (adapters and base is None)):
        raise UserError("--dry-run is for merges that write whole models; writing an adapter takes only seconds")
    if extract:
        return cli_lora.extract(
            models, base, out, rank=rank, energy=energy, dtype=dtype, force=force, overwrite=overwrite
        )
    if energy is not None or (rank is not None and (base is not None or not adapters)):
        raise UserError("--rank is for output adapters, --energy for --extract")
    if adapters and method != "linear":
        raise UserError(f"adapters can be mixed only with --method linear, got {method}")
    if adapters and normalize is not None:
        raise UserError("adapters' weights are never normalised: --normalize is for whole models")
    if weights is not None and grid is not None:
        raise UserError("give --weights, one for each model, or --grid, not both")
    if weights is None and grid is None and (adapters or method == "linear"):
        raise UserError("give --weights, one for each model, or --grid")
    rows: Any = simplex_grid(len(models), grid) if grid is not None else weights and numbers("weights", weights)
    if adapters:
        if base is None:
            return cli_lora.mix(models, rows, out, rank=rank, dtype=dtype, force=force, overwrite=overwrite)
        from fastalign.soup.lora import apply

        made = apply.plan(base, models, rows, out, dtype=dtype, force=force, **sizes)
    else:
        made = plans.make(
            models,
            rows,
            out,
            method=method,
            base=base,
            parameters=_parameters(set_ or []),
            dtype=dtype,
            normalize=normalize,
            force=force,
            **sizes,
        )
    return _merge(made, dry_run, sync, strict, overwrite)


def _parameters(given: list[str]) -> dict[str, Any]:
    """name=value pairs; a value is JSON or a plain word."""
    values = named_values("--set", given)
    words = {"true": True, "false": False}
    return {name: words.get(x.strip().lower(), x.strip()) if isinstance(x, str) else x for name, x in values.items()}


def _merge(made, dry_run: bool, sync: bool, strict: bool, overwrite: bool) -> Result:
    """Print the plan, run it unless dry_run is set, and print its speed."""
    from fastalign._base.units import size
    from fastalign.soup.outputs import already_made
    from fastalign.soup.run import estimated, execute

    out, terminal = made.out, console()
    for line in made.describe():
        terminal.print(printable(line), soft_wrap=True, markup=False)
    if dry_run:
        already_made(made, overwrite=overwrite)
        terminal.print(estimated(made), soft_wrap=True, markup=False)
        terminal.print("dry run: nothing was written")
        return {"out": str(out), "plan": list(made.describe()), "estimate": estimated(made)}
    merged = execute(made, sync=sync, strict=strict, overwrite=overwrite)
    result = {"out": str(out), "soups": merged.models, "shards": len(made.layout), "resumed": merged.resumed}
    result |= {"read_bytes": merged.read_bytes, "written_bytes": merged.written_bytes, "seconds": merged.seconds}
    result["not_finite"] = merged.not_finite or None
    if merged.not_finite:
        print(printable(f"fastalign: {out}: {merged.not_finite}"), file=sys.stderr)
    if merged.resumed == len(made.layout) and not merged.read_bytes:
        terminal.print(f"{out}: already there, complete", soft_wrap=True, markup=False)
        return result
    moved = merged.read_bytes + merged.written_bytes
    went_on = f", {merged.resumed} of {len(made.layout)} shards already existed" if merged.resumed else ""
    terminal.print(
        f"{out}: {size(moved)} moved in {merged.seconds:.2f} s, {moved / merged.seconds / 1e9:.2f} GB/s{went_on}",
        soft_wrap=True,
        markup=False,
    )
    return result
