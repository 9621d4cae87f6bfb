"""Fronts at several KLs, with other alignment methods on the same axes: for pairs of values, and for three."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fastalign.report.figures import style
from fastalign.report.figures.style import BEFORE, GRID, INK, MUTED, PAPER, PREDICTED, REALISED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALARISED, BEST = "#e69f00", "#cc79a7"
DOTS_AS_IMAGE = 4000  # on all panels together
NAMED = 8  # merged models


@dataclass(frozen=True)
class Shown:
    """Points to draw, each array (…, m) with one column per value, or (…, 2) for a pair of values.

    fronts: by KL, in drawing order, (S, ·) the highest levels at that KL. limit: (S, ·) at any KL. best_of: by N,
    best-of-N by w·R for several w. scalarised: RLHF's solutions for several w at one β.
    """

    fronts: Mapping[float, np.ndarray]
    limit: np.ndarray | None = None
    scalarised: np.ndarray | None = None
    best_of: Mapping[int, np.ndarray] = field(default_factory=dict)


def fronts(
    values: Sequence[str],
    shown: Mapping[tuple[int, int], Shown],
    *,
    before: np.ndarray,
    cloud: np.ndarray,
    desirable: np.ndarray,
    palettes: np.ndarray | None = None,
    soups: np.ndarray | None = None,
    soup_names: Sequence[str] = (),
) -> Figure:
    """One panel for each pair (i, j) of `shown`, whose points have two columns.

    before (m,). cloud (T, m): levels of random λ, desirable (T,) those that leave no value below `before`. palettes,
    soups (·, m): target levels, and levels of merged models, with their names: all if few, else only the outermost.
    """
    columns = min(3 if len(shown) <= 6 else 5, len(shown))
    rows = -(-len(shown) // columns)
    size = {1: 5.6, 5: 2.35}.get(columns, 3.55)
    with style.figure(size * columns, size * 0.95 * rows + 0.8) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, ((i, j), points) in zip(grid.flat, shown.items(), strict=False):
            pick = [i, j]
            axes.axvline(before[i], color=GRID, linewidth=0.9, zorder=0)
            axes.axhline(before[j], color=GRID, linewidth=0.9, zorder=0)
            _cloud(axes, cloud[:, pick], desirable, image=len(cloud) * len(shown) > DOTS_AS_IMAGE)
            if points.limit is not None:
                axes.plot(*points.limit.T, color=MUTED, linewidth=1.2, linestyle=(0, (1.5, 2)))
            for alpha, curve in zip(_alphas(points.fronts), points.fronts.values(), strict=True):
                axes.plot(*curve.T, color=PREDICTED, linewidth=1.8, alpha=alpha)
            for size_, (_, best) in zip(_sizes(points.best_of), points.best_of.items(), strict=True):
                axes.plot(*best.T, linestyle="none", zorder=4, **_look("^", BEST, size_))
            if points.scalarised is not None:
                axes.plot(*points.scalarised.T, linestyle="none", zorder=5, **_look("s", SCALARISED, 5))
            if soups is not None:
                axes.plot(*soups[:, pick].T, linestyle="none", zorder=5, **_look("D", INK, 5))
                _name(axes, soups[:, pick], soup_names)
            if palettes is not None:
                axes.plot(*palettes[:, pick].T, linestyle="none", zorder=6, **style.MARKERS["target"])
            axes.plot(*before[pick], linestyle="none", zorder=6, **style.MARKERS["before"])
            axes.set_xlabel(style.short(values[i], 30))
            axes.set_ylabel(style.short(values[j], 30))
            axes.locator_params(nbins=3 if columns == 5 else 5)
            axes.margins(0.06)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        handles = _handles(next(iter(shown.values())), palettes, soups)
        ncols = max(2, min(5, int(figure.get_figwidth() / 2.1)))
        figure.legend(handles=handles, loc="outside upper center", ncols=ncols, columnspacing=1.6, handletextpad=0.6)
    return figure


def front_in_three(
    values: Sequence[str],
    directions: np.ndarray,
    shown: Shown,
    *,
    before: np.ndarray,
    palettes: np.ndarray | None = None,
    soups: np.ndarray | None = None,
    soup_names: Sequence[str] = (),
) -> Figure:
    """The front of three values at the largest KL of `shown` as a surface, from two sides; columns as `values`.

    directions: (S, 3), those whose front points `shown.fronts` has, on a triangular lattice.
    """
    from matplotlib.tri import Triangulation

    share = directions / directions.sum(axis=1, keepdims=True)
    mesh = Triangulation(share[:, 0] + share[:, 1] / 2, share[:, 1] * np.sqrt(3) / 2)
    kl, surface = list(shown.fronts.items())[-1]
    with style.figure(9.6, 4.9) as figure:
        # A constrained layout would reserve half of the page for the rotated box.
        figure.set_layout_engine("none")
        for side, angle in enumerate((22, 68)):
            axes = figure.add_axes((0.01 + 0.49 * side, 0.03, 0.49, 0.96), projection="3d")
            axes.plot_trisurf(
                *surface.T,
                triangles=mesh.triangles,
                color=PREDICTED,
                alpha=0.28,
                linewidth=0.35,
                edgecolor=PREDICTED,
                shade=False,
            )
            if shown.best_of:
                best = list(shown.best_of.values())[-1]
                axes.plot(*best.T, linestyle="none", **_look("^", BEST, 6))
            if shown.scalarised is not None:
                axes.plot(*shown.scalarised.T, linestyle="none", **_look("s", SCALARISED, 5))
            if soups is not None:
                axes.plot(*soups.T, linestyle="none", **_look("D", INK, 5))
                if len(soups) <= NAMED:
                    for at, name in zip(soups, soup_names, strict=False):
                        axes.text(*at, f" {style.short(name)}", color=INK, fontsize=8)
            if palettes is not None:
                axes.plot(*palettes.T, linestyle="none", **style.MARKERS["target"])
            axes.plot(*before[:, None], linestyle="none", **style.MARKERS["before"])
            axes.view_init(elev=24, azim=angle)
            axes.set_box_aspect((1, 1, 0.9), zoom=0.86)
            for axis, name in zip("xyz", values, strict=True):
                getattr(axes, f"set_{axis}label")(style.short(name, 24), labelpad=6)
                own = getattr(axes, f"{axis}axis")
                own.set_pane_color((1, 1, 1, 0))
                own._axinfo["grid"].update(color=GRID, linewidth=0.7)
            axes.locator_params(nbins=4)
            axes.tick_params(labelsize=8, pad=1)
        only = Shown(
            {kl: surface}, None, shown.scalarised, dict(list(shown.best_of.items())[-1:]) if shown.best_of else {}
        )
        handles = _handles(only, palettes, soups, cloud=False)
        figure.legend(handles=handles, loc="upper center", ncols=len(handles), columnspacing=1.6, handletextpad=0.6)
    return figure


def _name(axes, points: np.ndarray, names: Sequence[str]) -> None:
    """Names beside points (S, 2): all of up to `NAMED` points, else those at either end of either value."""
    shown = range(len(names)) if len(names) <= NAMED else {*points.argmin(axis=0), *points.argmax(axis=0)}
    for k in sorted(shown):
        axes.annotate(
            style.short(names[k]),
            points[k],
            xytext=(5, 4),
            textcoords="offset points",
            color=INK,
            fontsize=8,
            zorder=8,
            bbox=dict(facecolor=PAPER, alpha=0.75, edgecolor="none", pad=0.5),
        )


def _cloud(axes, points: np.ndarray, desirable: np.ndarray, *, image: bool) -> None:
    for which, color, alpha in ((~desirable, BEFORE, 0.3), (desirable, REALISED, 0.6)):
        axes.plot(
            *points[which].T,
            ".",
            color=color,
            alpha=alpha,
            markersize=4.5,
            markeredgewidth=0,
            zorder=1,
            rasterized=image,
        )


def _handles(shown: Shown, palettes, soups, *, cloud: bool = True) -> list:
    handles = [style.handle("before", "the model")]
    if cloud:
        handles += [
            style.points("random λ", ".", BEFORE, 8),
            style.points("λ with no value below the model", ".", REALISED, 8),
        ]
    handles += [
        style.line(f"front at KL {kl:.2f}", PREDICTED, linewidth=1.8, alpha=alpha)
        for alpha, kl in zip(_alphas(shown.fronts), shown.fronts, strict=True)
    ]
    if shown.limit is not None:
        handles.append(style.line("limit of these candidates", MUTED, linewidth=1.2, linestyle=(0, (1.5, 2))))
    handles += [
        style.points(f"best of {n}", "^", BEST, size)
        for size, n in zip(_sizes(shown.best_of), shown.best_of, strict=True)
    ]
    if shown.scalarised is not None:
        handles.append(style.points("linear scalarisation", "s", SCALARISED, 5))
    if soups is not None:
        handles.append(style.points("merged models", "D", INK, 5))
    if palettes is not None:
        handles.append(style.handle("target", "palettes"))
    return handles


def _look(marker: str, color: str, size: float) -> dict:
    return dict(marker=marker, color=color, markersize=size, markeredgecolor="none", alpha=0.95)


def _alphas(of: Mapping) -> np.ndarray:
    return np.linspace(1.0, 0.4, len(of))[::-1]


def _sizes(of: Mapping) -> np.ndarray:
    return np.linspace(7, 4.5, len(of))[::-1]
