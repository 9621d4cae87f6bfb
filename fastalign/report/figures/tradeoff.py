"""One policy among all that the same candidates allow, for every pair of values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from fastalign.report.figures import style
from fastalign.report.figures.style import BEFORE, MUTED, PREDICTED, REALISED, TARGET

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PAIRS = 15


def pareto(
    values: Sequence[str],
    *,
    before: np.ndarray,
    cloud: tuple[np.ndarray, np.ndarray],
    kl: float,
    palette: np.ndarray,
    predicted: np.ndarray,
    realised: np.ndarray,
    se: np.ndarray,
    fronts: Mapping[tuple[int, int], np.ndarray] | None = None,
    limits: Mapping[tuple[int, int], np.ndarray] | None = None,
) -> Figure:
    """What policies p_λ over the same candidates can reach, for every pair of values.

    cloud: levels (T, m) and KL (T,) of T policies; the dots, strong where the KL is at most `kl`, the chosen policy's.
    fronts, limits: by pair (i, j), i < j, curves (S, 2): the highest levels at that KL, and at any KL. palette (m,):
    NaN for no target, which is not drawn. The realised mean has an error bar of 3 standard errors `se` each way. A
    single value is drawn against the KL instead. With many values only the 15 pairs with the strongest trade-off are
    drawn (lowest correlation over the cloud).
    """
    points, cost = cloud
    m = len(values)
    if m == 1:
        return _level_by_kl(values[0], before, points, cost, kl, palette, predicted, realised, se)
    shown = pairs(points)
    columns = min(3 if len(shown) <= 6 else 5, len(shown))
    rows = -(-len(shown) // columns)
    size = {1: 5.2, 5: 2.35}.get(columns, 3.55)
    with style.figure(size * columns, size * 0.95 * rows + 0.7) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (i, j) in zip(grid.flat, shown, strict=False):
            near = cost <= kl
            for which, alpha in ((~near, 0.22), (near, 0.6)):
                axes.plot(
                    points[which, i],
                    points[which, j],
                    ".",
                    color=BEFORE,
                    alpha=alpha,
                    markersize=5,
                    markeredgewidth=0,
                    rasterized=len(points) > 2000,
                )
            if limits and (i, j) in limits:
                axes.plot(*limits[i, j].T, color=MUTED, linewidth=1.2, linestyle=(0, (1.5, 2)))
            if fronts and (i, j) in fronts:
                axes.plot(*fronts[i, j].T, color=PREDICTED, linewidth=1.8)
            for line, k in ((axes.axvline, i), (axes.axhline, j)):
                if np.isfinite(palette[k]):
                    line(palette[k], color=TARGET, linewidth=0.9, alpha=0.55, linestyle=(0, (4, 3)))
            axes.plot(before[i], before[j], linestyle="none", **style.MARKERS["before"])
            axes.errorbar(
                realised[i],
                realised[j],
                xerr=3 * se[i],
                yerr=3 * se[j],
                fmt="none",
                ecolor=REALISED,
                elinewidth=1.3,
                zorder=3,
            )
            axes.plot(palette[i], palette[j], linestyle="none", zorder=4, **style.MARKERS["target"])
            axes.plot(predicted[i], predicted[j], linestyle="none", zorder=5, **style.MARKERS["predicted"])
            axes.plot(realised[i], realised[j], linestyle="none", zorder=6, **style.MARKERS["realised"])
            axes.set_xlabel(style.short(values[i], 30))
            axes.set_ylabel(style.short(values[j], 30))
            axes.locator_params(nbins=3 if columns == 5 else 5)
            axes.margins(0.07)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        handles = [
            style.handle("before"),
            style.handle("target"),
            style.handle("predicted"),
            style.handle("realised", "realised ± 3 SE"),
            style.dot("policies of random λ"),
        ]
        if fronts:
            handles.append(style.line(f"front at KL {kl:.2f}", PREDICTED, linewidth=1.8))
        if limits:
            handles.append(style.line("limit of these candidates", MUTED, linewidth=1.2, linestyle=(0, (1.5, 2))))
        style.legend(figure, handles)
        if m * (m - 1) // 2 > len(shown):
            figure.supxlabel(
                f"the {len(shown)} pairs of {m * (m - 1) // 2} that trade off most", fontsize=9, color=MUTED
            )
    return figure


def _level_by_kl(value, before, points, cost, kl, palette, predicted, realised, se) -> Figure:
    with style.figure(6.0, 4.2) as figure:
        axes = figure.add_subplot()
        order = np.argsort(cost)
        axes.plot(cost[order], points[order, 0], color=PREDICTED, linewidth=1.8)
        if np.isfinite(palette[0]):
            axes.axhline(palette[0], color=TARGET, linewidth=1.8, linestyle=(0, (4, 2.5)))
        axes.plot(0, before[0], linestyle="none", zorder=3, **style.MARKERS["before"])
        axes.errorbar(kl, realised[0], yerr=3 * se[0], fmt="none", ecolor=REALISED, elinewidth=1.3, zorder=3)
        axes.plot(kl, predicted[0], linestyle="none", zorder=4, **style.MARKERS["predicted"])
        axes.plot(kl, realised[0], linestyle="none", zorder=5, **style.MARKERS["realised"])
        axes.set_xlabel("KL to the model, nats")
        axes.set_ylabel(style.short(value, 30))
        axes.grid(True)
        handles = [
            style.handle("before"),
            style.line("target", TARGET, linewidth=1.8, linestyle=(0, (3, 2))),
            style.handle("predicted"),
            style.handle("realised", "realised ± 3 SE"),
            style.line("most at each KL", PREDICTED, linewidth=1.8),
        ]
        style.legend(figure, handles)
    return figure


def pairs(points: np.ndarray) -> list[tuple[int, int]]:
    """The pairs of values (i, j), i < j, that `pareto` draws of policies with these levels (T, m)."""
    every = list(combinations(range(points.shape[1]), 2))
    if len(every) <= MAX_PAIRS:
        return every
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.nan_to_num(np.corrcoef(points.T), nan=1.0)
    return sorted(sorted(every, key=lambda pair: correlation[pair])[:MAX_PAIRS])
