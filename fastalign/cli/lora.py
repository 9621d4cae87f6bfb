"""LoRA adapters in `fastalign soup`: mixing them, merging them into their base, extracting one from two models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastalign._base.errors import UserError
from fastalign.cli.command import Result, console


def mix(
    models: Sequence[str], rows: Any, out: Path, *, rank: int | None, dtype: str | None, force: bool, overwrite: bool
) -> Result:
    """Mixes adapters into one adapter per row of weights."""
    from fastalign.soup import merge_adapters

    terminal, every = (
        console(),
        merge_adapters(models, rows, out, rank=rank, dtype=dtype, force=force, overwrite=overwrite),
    )
    for made in every:
        terminal.print(_line(made), soft_wrap=True, markup=False)
    return {"adapters": [made._asdict() for made in every]}


def extract(
    models: Sequence[str],
    base: str | None,
    out: Path,
    *,
    rank: int | None,
    energy: float | None,
    dtype: str | None,
    force: bool,
    overwrite: bool,
) -> Result:
    """Extracts an adapter from a tuned model and its base."""
    from fastalign.soup import extract_adapter

    if len(models) != 1 or base is None:
        raise UserError("--extract takes one model, and --base with the model it was tuned from")
    extracted = extract_adapter(
        models[0], base, out, rank=rank, energy=energy, dtype=dtype, force=force, overwrite=overwrite
    )
    terminal = console()
    terminal.print(_line(extracted.made), soft_wrap=True, markup=False)
    if extracted.left_out:
        few = ", ".join(extracted.left_out[:3]) + (" ..." if len(extracted.left_out) > 3 else "")
        terminal.print(
            f"{len(extracted.left_out)} other tensors also differ and are not included ({few}): "
            f"{extracted.kept_of_all:.2%} of all difference kept",
            soft_wrap=True,
            markup=False,
        )
    return {
        "adapters": [extracted.made._asdict()],
        "left_out": extracted.left_out,
        "kept_of_all": extracted.kept_of_all,
    }


def _line(made) -> str:
    least, most = made.ranks
    ranks = f"rank {most}" if least == most else f"ranks {least} to {most}"
    kept = (
        "the whole update"
        if made.kept > 1 - 1e-9
        else (
            f"{made.kept:.2%} of the update kept (squared Frobenius norm), least in {made.worst[0]}: "
            f"{made.worst[1]:.2%}"
        )
    )
    return f"{made.out}: {made.modules} modules, {ranks}, {kept}"
