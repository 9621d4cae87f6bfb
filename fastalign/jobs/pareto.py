"""The command `pareto`: a scored file's study as figures, a page and JSON; and `map --plot`'s figures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastalign._base import outputs
from fastalign._base.errors import UserError
from fastalign._base.files import atomic_write
from fastalign._base.former import renamed
from fastalign.data import palettes as palette_files
from fastalign.decode import elsewhere
from fastalign.decode.candidates import Candidates
from fastalign.palette.front import palette_path
from fastalign.report.study import L1_MAX, Study, flat, groups_of, palette_figures, study


@renamed(n_lambda="n_lam")
def write(
    scored: str | Path,
    out: str | Path,
    *,
    palettes: Sequence[str | Path] = (),
    quantiles: Sequence[float] = (),
    soups: Sequence[str | Path] = (),
    values: Sequence[str] | None = None,
    joint: bool = False,
    n_lam: int = 1000,
    l1_max: float = L1_MAX,
    seed: int = 0,
    prompt_column: str | None = None,
    response_column: str | None = None,
    overwrite: bool = False,
) -> Study | None:
    """The study of a scored file into the folder `out`: pareto.json, pareto.html, and each figure as SVG and PNG.

    palettes: palette files of these values and possibly others. quantiles: palettes at these quantiles of each value.
    soups: scored files of other models' candidates, each a point at its mean rewards, or soups.json files of
    `soup.walk`. values: which rewards; default all. prompt_column, response_column: see `decode.elsewhere`.
    Returns None if the folder already contains this study. Raises UserError if it contains another one, unless
    `overwrite` is set.
    """
    from fastalign.palette.quantile import check_quantile, quantile_palette
    from fastalign.report.pareto_html import page

    if seed < 0:
        raise UserError(f"seed must be at least 0, got {seed}")
    if n_lam < 1:
        raise UserError(f"n_lam must be at least 1, got {n_lam}")
    for q in quantiles:
        check_quantile("quantile", q)
    out = Path(out)
    inputs = {"scored": scored, **{f"palette {i}": path for i, path in enumerate(palettes)}}
    inputs |= {f"soup {i}": path for i, path in enumerate(soups)}
    columns = elsewhere.Columns(prompt_column, response_column, values)
    settings: dict[str, Any] = {"quantiles": list(quantiles), "values": None if values is None else list(values)}
    settings |= {"joint": joint, **columns.named()}
    job = outputs.Job("pareto", inputs, settings | {"lambdas": n_lam, "l1_max": l1_max, "seed": seed})
    written: dict[str, Any] = {"files": [out / "pareto.html"], "figures": out}
    if (record := outputs.claim(out / "pareto.json", job, overwrite=overwrite, **written)) is None:
        return None
    whole = elsewhere.read(scored, kind="scored", columns=columns)
    names = list(values or whole.rewards)
    rewards = whole.reward_array(names)
    targets = {f"q{100 * q:g}": quantile_palette(rewards.reshape(-1, len(names)), q) for q in quantiles}
    for path in palettes:
        solution = palette_files.read(path, "palette", "sense")
        at = palette_files.of_values(path, solution, names)
        senses, levels = ([solution[row][j] for j in at] for row in ("sense", "palette"))
        if set(senses) != {">="} or None in levels:
            came = ", ".join(
                sense if level is not None else "free" for sense, level in zip(senses, levels, strict=True)
            )
            raise UserError(f"{path}: must ask for at least its levels in every value, got {came}")
        targets[_unlike(targets, path)] = np.array(levels)
    merged: dict[str, np.ndarray] = {}
    for path in soups:
        for name, row in _soup_levels(path, names).items():
            merged[_unlike(merged, path, name)] = row
    result = study(
        names,
        rewards,
        palettes=targets,
        soups=np.array(list(merged.values())) if merged else None,
        soup_names=list(merged),
        joint=joint,
        n_lam=n_lam,
        l1_max=l1_max,
        seed=seed,
    )
    figures = result.figures()
    with outputs.making(out / "pareto.json", result.to_json(), record, **written):
        save_figures(figures, out)
        text = page(result, figures)
        with atomic_write(out / "pareto.html") as beside:
            beside.write_text(text, encoding="utf-8")
    return result


def _soup_levels(path: str | Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Mean rewards (m,) by name: of one model's scored candidates, or of all soups of a walk, "0.3 a + 0.7 b"."""
    if Path(path).suffix != ".json":
        return {"": Candidates.from_parquet(path, kind="scored").reward_array(names).mean(axis=(0, 1))}
    from fastalign.soup.front import SoupFront

    front = SoupFront.read(path)
    lacking = [name for name in names if name not in front.values]
    if lacking:
        raise UserError(f"{path}: its values are {', '.join(front.values)}, it has no {lacking[0]}")
    models = [Path(model).name or model for model in front.models]
    recipes = [
        " + ".join(f"{r:.3g} {model}" for r, model in zip(row, models, strict=True) if r) for row in front.rho.tolist()
    ]
    levels = front.levels[:, [front.values.index(name) for name in names]]
    return {recipe.removeprefix("1 "): row for recipe, row in zip(recipes, levels, strict=True)}


def _unlike(taken: Mapping[str, Any], path: str | Path, name: str = "") -> str:
    """An unused name for the content of a file: its own, or the file's."""
    plain = name or Path(path).stem
    longer = f"{name} of {path}" if name else str(path)
    numbered = (f"{longer} ({k})" for k in itertools.count(2))
    return next(x for x in itertools.chain((plain, longer), numbered) if x not in taken)


def plot_palette(rewards: np.ndarray, solution: Mapping[str, Any], folder: str | Path) -> None:
    """Write `palette_figures` of a palette file's content to a folder, for the dual that it was solved with; rewards
    (P, N, m)."""
    names, joint = solution["values"], solution["dual"] == "joint"
    groups = groups_of(rewards, joint)
    rows = flat(rewards)
    way = palette_path(rows, solution["palette"], groups=groups, sense=solution["sense"])
    target = np.where(solution["free"], np.nan, way.palette) if solution.get("free") else way.palette
    save_figures(palette_figures(names, rewards, way._replace(palette=target), joint=joint), folder)


def save_figures(figures: Mapping[str, Any], folder: str | Path) -> None:
    """Write each figure to a folder, as SVG and PNG."""
    from fastalign.report import figures as plots

    for name, figure in figures.items():
        for suffix in ("svg", "png"):
            plots.save(figure, Path(folder) / f"{name}.{suffix}")
