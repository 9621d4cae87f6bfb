"""A palette's values: their levels, their distributions, and a radar plot of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from fastalign.report.figures import style
from fastalign.report.figures.style import BEFORE, GRID, INK, MUTED, PAPER, PREDICTED, REALISED, SERIES, TARGET

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def levels(
    values: Sequence[str],
    *,
    before: np.ndarray,
    std: np.ndarray,
    palette: np.ndarray,
    predicted: np.ndarray,
    realised: np.ndarray,
    se: np.ndarray,
) -> Figure:
    """One row per value: the mean before, the target, predicted and realised (with a bar of 3 standard errors each
    way).

    All (m,); palette is NaN for no target. The scale is (level - before) / std, std the standard
    deviation of all candidates; a value with no std stays at 0.
    """
    m = len(values)
    with style.figure(7.6, 0.9 + 0.52 * m) as figure:
        axes = figure.add_subplot()
        rows = np.arange(m)
        at = {
            name: style.in_deviations(x, before, std)
            for name, x in (("target", palette), ("predicted", predicted), ("realised", realised))
        }
        bar = 3 * np.where(std > 0, se / np.where(std > 0, std, 1), 0)
        axes.axvline(0, color=BEFORE, linewidth=1.1, zorder=1)
        axes.hlines(rows, 0, at["predicted"], color=GRID, linewidth=6, zorder=1)
        axes.hlines(rows + 0.17, at["realised"] - bar, at["realised"] + bar, color=REALISED, linewidth=1.7, zorder=2)
        axes.plot(np.zeros(m), rows, linestyle="none", zorder=3, **style.MARKERS["before"])
        axes.plot(at["predicted"], rows, linestyle="none", zorder=4, **style.MARKERS["predicted"])
        targeted = np.isfinite(palette)
        axes.vlines(
            at["target"][targeted],
            rows[targeted] - 0.33,
            rows[targeted] + 0.33,
            color=TARGET,
            linewidth=2.4,
            zorder=3,
        )
        axes.plot(at["realised"], rows + 0.17, linestyle="none", zorder=5, **style.MARKERS["realised"])
        axes.set_yticks(rows, [style.short(v) for v in values], color=INK, fontsize=10.5)
        axes.set_ylim(m - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.margins(x=0.06)
        axes.set_xlabel("change of the mean, in standard deviations of the candidates")
        handles = [
            style.handle("before"),
            style.line("target", TARGET, linewidth=2.4),
            style.handle("predicted"),
            style.handle("realised", "realised ± 3 SE"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=4, columnspacing=1.8, handletextpad=0.6)
    return figure


def histograms(
    before: np.ndarray,
    after: np.ndarray | None,
    values: Sequence[str],
    *,
    weights: np.ndarray | None = None,
    palette: np.ndarray | None = None,
) -> Figure:
    """Each value's distribution over all candidates and over the chosen texts, with the means and the target.

    before: (n, m), after: (d, m), or None if none are chosen yet. weights: (n,), the policy's weights of the
    candidates; if given, draws the policy's distribution too. palette: (m,), NaN for no target.
    """
    m = len(values)
    chosen = after is not None
    if after is None:
        after = np.empty((0, m))
    columns = min(3, m)
    rows = -(-m // columns)
    with style.figure(max(4.6, 3.2 * columns), 0.6 + 2.45 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        cut = False
        for axes, j in zip(grid.flat, range(m), strict=False):
            low, high = style.body(before[:, j], after[:, j])
            cut |= bool(before[:, j].min() < low or before[:, j].max() > high)
            inside = np.clip(before[:, j], low, high)
            edges = style.bins(np.concatenate([inside, after[:, j]]))
            all_alike = np.full(len(before), 100 / len(before))
            axes.hist(inside, edges, weights=all_alike, color=BEFORE, alpha=0.32, linewidth=0)
            if weights is not None:
                share = 100 * weights / weights.sum()
                axes.hist(inside, edges, weights=share, histtype="step", color=PREDICTED, linewidth=1.6)
            if len(after) >= 100 or (chosen and weights is None):
                share = np.full(len(after), 100 / len(after))
                axes.hist(after[:, j], edges, weights=share, histtype="step", color=REALISED, linewidth=1.6)
            elif chosen:  # too few for bars: each draw is a tick
                axes.plot(
                    after[:, j],
                    np.full(len(after), -0.035),
                    "|",
                    color=REALISED,
                    markersize=8,
                    markeredgewidth=1.3,
                    transform=axes.get_xaxis_transform(),
                    clip_on=False,
                )
            top = axes.get_xaxis_transform()
            axes.plot([before[:, j].mean()] * 2, [0, 1.0], color=MUTED, linewidth=1.3, transform=top)
            if chosen:
                axes.plot([after[:, j].mean()] * 2, [0, 1.0], color=REALISED, linewidth=1.8, transform=top)
            elif weights is not None:
                mean = np.average(before[:, j], weights=weights)
                axes.plot([mean] * 2, [0, 1.0], color=PREDICTED, linewidth=1.8, transform=top)
            if palette is not None and np.isfinite(palette[j]):
                axes.plot(
                    [palette[j]] * 2, [0, 1.0], color=TARGET, linewidth=1.8, linestyle=(0, (4, 2.5)), transform=top
                )
            axes.set_title(style.short(values[j], 30))
            axes.tick_params(axis="x", pad=8)
            axes.locator_params(nbins=5)
            axes.grid(axis="y")
            if j % columns == 0:
                axes.set_ylabel("texts, %")
        for axes in grid.flat[m:]:
            axes.set_visible(False)
        if cut:
            figure.supxlabel("candidates beyond an axis are counted in its end bins", fontsize=9, color=MUTED)
        handles = [style.patch("all candidates", BEFORE), style.line("their mean", MUTED)]
        if weights is not None:
            handles.append(style.line("under the policy" if chosen else "under the policy, its mean", PREDICTED))
        if chosen:
            few = weights is not None and len(after) < 100
            handles.append(style.line("realised mean" if few else "realised, its mean", REALISED, linewidth=1.8))
        if palette is not None and np.isfinite(palette).any():
            handles.append(style.line("target", TARGET, linewidth=1.8, linestyle=(0, (3, 2))))
        style.legend(figure, handles)
    return figure


def radar(values: Sequence[str], series: Mapping[str, np.ndarray], *, before: np.ndarray, std: np.ndarray) -> Figure:
    """Levels (m,) by name on m spokes, as (level - before) / std: 0 is the ring of the candidates' means; NaN is
    not drawn.

    Series named "before", "target", "predicted" and "realised" keep their house colours. The scale is on the plot.
    """
    m = len(values)
    angles = np.linspace(0, 2 * np.pi, m, endpoint=False)
    heights = {name: style.in_deviations(np.asarray(x), before, std) for name, x in series.items()}
    everything = np.concatenate([[0.0], *heights.values()])
    everything = everything[np.isfinite(everything)]
    step = style.nice_step(float(np.ptp(everything)) or 1.0)
    low = np.floor(everything.min() / step - 0.35) * step
    high = np.ceil(everything.max() / step + 0.05) * step
    with style.figure(5.4, 5.4) as figure:
        axes = figure.add_subplot(projection="polar")
        axes.set_theta_zero_location("N")
        axes.set_theta_direction(-1)
        axes.spines["polar"].set_visible(False)
        rings = np.arange(low + step, high + step / 2, step)
        circle = np.linspace(0, 2 * np.pi, 181)
        for ring in rings:
            zero = abs(ring) < step / 9
            axes.plot(
                circle,
                np.full_like(circle, ring),
                color=BEFORE if zero else GRID,
                linewidth=1.4 if zero else 0.8,
                zorder=1,
            )
        axes.vlines(angles, low, high, color=GRID, linewidth=0.8, zorder=1)
        others = cycle(zip(SERIES, "os^Dvp*", strict=True))
        for name, height in heights.items():
            look = style.MARKERS.get(name)
            if look is None:
                (color, dash), marker = next(others)
                look = dict(style.MARKERS["before"], color=color, linestyle=dash, marker=marker)
            around = (np.append(angles, angles[0]), np.append(height, height[0]))
            if name == "target":  # a broad band, visible even under the policy's line
                axes.plot(*around, color=TARGET, linewidth=6, alpha=0.35, label=name, zorder=2)
                continue
            axes.plot(*around, linewidth=0 if name == "before" else 1.8, label=name, zorder=3, **look)
            if name == "realised" and m > 2:
                axes.fill(angles, height, color=REALISED, alpha=0.1, linewidth=0, zorder=2)
        axes.set_ylim(low, high)
        axes.grid(False)
        axes.set_yticks([])
        # Between two spokes, so that the numbers cover no drawn line.
        for ring in rings:
            text = "0" if abs(ring) < step / 9 else f"{ring:+.3g} σ"
            axes.text(
                np.pi / max(m, 2),
                ring,
                text,
                fontsize=8,
                color=MUTED,
                ha="center",
                va="center",
                bbox=dict(facecolor=PAPER, linewidth=0, pad=0.8, alpha=0.8),
                zorder=4,
            )
        axes.set_xticks(angles, [style.short(v, 16) for v in values], color=INK, fontsize=10.5)
        axes.tick_params(axis="x", pad=10)
        figure.legend(loc="outside upper center", ncols=4, columnspacing=1.4, handletextpad=0.5)
        figure.supxlabel("ring 0: mean of the candidates · σ: their standard deviation", fontsize=9, color=MUTED)
    return figure
