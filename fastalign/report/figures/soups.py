"""Merged models' measured values, for pairs of values, with standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastalign.palette.pareto import pareto_front
from fastalign.report.figures import style
from fastalign.report.figures.style import BEFORE, INK, MUTED, PAPER, PREDICTED
from fastalign.report.figures.tradeoff import pairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def soups(
    values: Sequence[str],
    models: Sequence[str],
    rho: np.ndarray,
    levels: np.ndarray,
    stderr: np.ndarray,
    *,
    palette: np.ndarray | None = None,
    predicted: np.ndarray | None = None,
    measured: np.ndarray | None = None,
    measured_stderr: np.ndarray | None = None,
) -> Figure:
    """One panel for each pair of values. rho (K, m); levels, stderr (K, d); palette, predicted, measured (d,) the
    chosen ρ's.

    Bars are one standard error. Soups that no other exceeds in all values are blue; lines join soups that differ by one
    step of ρ between two models.
    """
    from matplotlib.patheffects import withStroke

    shown = pairs(levels)
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    size = 5.8 if columns == 1 else 3.6
    best = np.isin(np.arange(len(levels)), pareto_front(levels))
    stderr = np.nan_to_num(stderr)
    with style.figure(size * columns, size * 0.92 * rows + 0.6) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (i, j) in zip(grid.flat, shown, strict=False):
            for k, other in _neighbours(rho):
                axes.plot(
                    levels[[k, other], i], levels[[k, other], j], color=BEFORE, linewidth=0.7, alpha=0.45, zorder=1
                )
            for which, color in ((~best, BEFORE), (best, PREDICTED)):
                axes.errorbar(
                    levels[which, i], levels[which, j], xerr=stderr[which, i], yerr=stderr[which, j], linestyle="none",
                    marker="D", markersize=4.5, color=color, ecolor=color, elinewidth=0.6, markeredgewidth=0,
                    alpha=0.85, zorder=3,
                )  # fmt: skip
            middle = levels[:, [i, j]].mean(axis=0)
            for m, name in enumerate(models):
                for k in np.flatnonzero(rho[:, m] == 1):
                    side = np.where(levels[k, [i, j]] >= middle, 1, -1)
                    end = levels[k, i], levels[k, j] + side[1] * stderr[k, j]  # clear of the error bar
                    axes.annotate(
                        f"{style.short(name, 18)} alone",
                        end,
                        xytext=(20 * side[0], 4 * side[1]),
                        textcoords="offset points",
                        ha="right" if side[0] > 0 else "left",
                        va="bottom" if side[1] > 0 else "top",
                        color=INK,
                        fontsize=9,
                        zorder=8,
                        path_effects=[withStroke(linewidth=2.5, foreground=PAPER)],
                    )
            if palette is not None and np.isfinite(palette[[i, j]]).all():
                axes.plot(
                    palette[i],
                    palette[j],
                    linestyle="none",
                    zorder=6,
                    **{**style.MARKERS["target"], "markersize": 13},
                )
            if predicted is not None:
                axes.plot(predicted[i], predicted[j], linestyle="none", zorder=5, **style.MARKERS["predicted"])
            if measured is not None and measured_stderr is not None:
                bars = np.nan_to_num(measured_stderr)
                axes.errorbar(
                    measured[i],
                    measured[j],
                    xerr=bars[i],
                    yerr=bars[j],
                    linestyle="none",
                    elinewidth=0.9,
                    zorder=7,
                    **{**style.MARKERS["realised"], "markersize": 6},
                )
            axes.set_xlabel(style.short(values[i], 30))
            axes.set_ylabel(style.short(values[j], 30))
            axes.locator_params(nbins=5)
            axes.margins(0.12)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        handles = [
            style.points("soups ± standard error", "D", BEFORE, 5),
            style.points("of those, none better", "D", PREDICTED, 5),
            style.line("neighbours in ρ", MUTED, linewidth=0.7),
        ]
        handles += [style.handle("target", "palette")] * (palette is not None)
        handles += [style.handle("predicted", "chosen ρ, interpolated")] * (predicted is not None)
        handles += [style.handle("realised", "chosen ρ, measured")] * (measured is not None)
        style.legend(figure, handles)
    return figure


def _neighbours(rho: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of soups at the smallest distance between any two."""
    if len(rho) < 2:
        return []
    apart = np.linalg.norm(rho[:, None] - rho[None], axis=2)
    near = apart[np.triu_indices(len(rho), 1)]
    least = near[near > 1e-9].min(initial=np.inf)
    first, second = np.nonzero(np.triu(np.abs(apart - least) < 1e-6, 1))
    return list(zip(first.tolist(), second.tolist(), strict=True))
