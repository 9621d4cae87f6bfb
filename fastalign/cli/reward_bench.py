"""The command `fastalign reward-bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastalign.cli.command import Result, console, names, registrar
from fastalign.cli.options import Overwrite, Rewards


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    registrar(app)(
        "fastalign reward-bench rewardbench2.jsonl --rewards ./judge,rm/skywork-v2-qwen3-0.6b --out rm.json"
    )(reward_bench)


def reward_bench(
    data: Annotated[
        str,
        typer.Argument(
            help="Prompts with chosen and rejected answers, a file or hub data set in RewardBench 2's form."
        ),
    ],
    rewards: Rewards,
    out: Annotated[Path, typer.Option(help="Output file for the results (JSON).")],
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "train",
    report: Annotated[
        Path | None, typer.Option(help="Write scores and calibration as a page (.html) or figures (.png, .svg).")
    ] = None,
    overwrite: Overwrite = False,
) -> Result:
    """Measure how well rewards find the correct answer among several: accuracy by subset, and calibration."""
    from rich.table import Table

    from fastalign.jobs import reward_bench as job

    result = job.reward_bench(
        data, names("rewards", rewards), out, split=split, report=report, overwrite=overwrite, show_progress=True
    )
    table = Table("reward", "subset", box=None, header_style="bold", pad_edge=False)
    for name in ("rows", "accuracy", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in result["rewards"].items():
        for subset, x in one["subsets"].items():
            span = "" if x["low"] is None else f"{x['low']:.3f}–{x['high']:.3f}"
            table.add_row(name, subset, f"{x['rows']:,}", f"{x['accuracy']:.3f}", span)
        table.add_row(name, "mean of subsets", f"{result['rows']:,}", f"{one['score']:.3f}", "", style="bold")
    out_console = console()
    out_console.print(table)
    for name, one in result["rewards"].items():
        pairs = one["pairs"]
        out_console.print(
            f"{name}: {pairs['accuracy']:.3f} of {pairs['pairs']:,} pairs, calibration error "
            f"{pairs['calibration_error']:.3f}, log loss {pairs['log_loss']:.3f}"
        )
    return result
