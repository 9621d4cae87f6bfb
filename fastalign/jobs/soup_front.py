"""The command `soup-front`: measures soups along ρ and chooses the ρ for a palette; writes figures and soups.json."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign._base import outputs
from fastalign._base.errors import UserError
from fastalign._base.former import renamed
from fastalign._base.units import counted
from fastalign.data import palettes
from fastalign.soup.front import Choice, SoupFront, choose
from fastalign.soup.measure import FIGURES, RECORD, Walk, making

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastalign.data.sampling import SamplingOptions
    from fastalign.palette.inputs import Array


@renamed(progress="show_progress")
def study(
    models: Sequence[str | os.PathLike[str]],
    rho: Array,
    prompts: Sequence[str],
    rewards: Sequence[Any],
    out: str | os.PathLike[str],
    *,
    palette: np.ndarray | None = None,
    n: int,
    max_new_tokens: int,
    seed: int,
    base: str | os.PathLike[str] | None = None,
    dtype: Any = "auto",
    device: Any = "auto",
    overwrite: bool = False,
    show_progress: bool = True,
    **sampling: Unpack[SamplingOptions],
) -> SoupFront:
    """`walk`, then `choose` for a palette (d,), and measure the chosen ρ with the next seed. Writes soups.json and
    figures to `out`.

    The arguments are those of `walk`. The verdict compares the new measurement with the palette, not the one used to
    choose ρ. Without a palette, an earlier choice in `out` stays; one for another palette raises UserError, unless
    overwrite is set.
    """
    from fastalign.report import figures as plots

    settings: dict[str, Any] = {"n": n, "max_new_tokens": max_new_tokens, "base": base, "dtype": dtype}
    settings |= {"device": device, "show_progress": show_progress, **sampling}
    first = Walk(models, rho, prompts, rewards, seed=seed, **settings)
    with making(out, [*models, base], first.job, overwrite=overwrite) as files:
        had = None if overwrite else _had(Path(out) / RECORD)
        ours = had is not None or not (Path(out) / RECORD).exists()
        for name in (RECORD, *FIGURES):
            files.check(name, ours=ours)
        if had is not None and had.chosen:
            before = _levels(had.chosen["palette"])
            palette = before if palette is None else palette
            files.check(RECORD, ours=np.array_equal(palette, before))
        front, marks = first.into(files), {}
        if palette is not None:
            choice = choose(front, palette)
            again = Walk(models, choice.rho[None], prompts, rewards, seed=seed + 1, **settings).into(files, "chosen/")
            marks = {
                "palette": np.asarray(palette, dtype=np.float64),
                "predicted": choice.levels,
                "measured": again.levels[0],
                "measured_stderr": again.stderr[0],
            }
            front = replace(front, chosen=_chosen(front.values, marks["palette"], choice, again))
        if len(front.values) > 1:
            figure = plots.soups(front.values, front.models, front.rho, front.levels, front.stderr, **marks)
            for name in FIGURES:
                with files.making(name) as path:
                    plots.save(figure, path)
        if files.reused:
            outputs.say(f"{out}: {counted(files.reused, 'soup')} already there, measured with the same settings")
        with files.making(RECORD) as path:
            front.write(path)
    return front


def _had(path: Path) -> SoupFront | None:
    try:
        return SoupFront.read(path)
    except (UserError, OSError):
        return None


def _levels(row: Sequence[float | None]) -> np.ndarray:
    return np.array([-np.inf if level is None else float(level) for level in row])


def _chosen(values: Sequence[str], palette: np.ndarray, choice: Choice, again: SoupFront) -> dict[str, Any]:
    def plain(x: np.ndarray) -> list[float | None]:
        return [float(v) if np.isfinite(v) else None for v in x]

    levels, errors = again.levels[0], again.stderr[0]
    with np.errstate(invalid="ignore"):
        away = (levels - palette) / errors  # target -inf: inf, met; one prompt: NaN
    away[(levels == palette) & (errors == 0)] = np.inf  # a value that does not vary
    short = [name for name, x in zip(values, away, strict=True) if x < -2]
    unsure = [name for name, x in zip(values, away, strict=True) if -2 <= x < 2]
    if np.isnan(errors).any():
        verdict = "not judged: errors are n/a (1 prompt); use more prompts"
    elif short:
        verdict = f"not met: {', '.join(short)} below the target by more than two standard errors"
    elif unsure:
        verdict = f"within two standard errors of the palette in {', '.join(unsure)}: use more prompts or candidates"
    else:
        verdict = "met, by more than two standard errors in every value"
    return {
        "rho": choice.rho.tolist(),
        "palette": plain(palette),
        "predicted": plain(choice.levels),
        "predicted_stderr": plain(choice.stderr),
        "margin": choice.margin,
        "between": choice.between,
        "measured": plain(levels),
        "stderr": plain(errors),
        "verdict": verdict,
    }


def read_palette(path: str | os.PathLike[str], values: Sequence[str]) -> np.ndarray:
    """The target levels (d,) of these values in a palette file; -inf for a value without one."""
    solution = palettes.read(path, "palette", "sense")
    palettes.check_carried(path, solution, values)
    if set(solution["sense"]) != {">="}:
        raise UserError(f"{path}: must ask for at least its levels in every value, got {', '.join(solution['sense'])}")
    levels = dict(zip(solution["values"], solution["palette"], strict=True))
    return _levels([levels.get(name) for name in values])
