"""Figures of λ: which λ are desirable, how λ grows along the path to a palette, and what it costs in samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign.report.figures import style
from fastalign.report.figures.fronts import DOTS_AS_IMAGE
from fastalign.report.figures.style import BEFORE, MUTED, PAPER, PREDICTED, REALISED, SERIES, TARGET

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HOLLOW = dict(markerfacecolor=PAPER, markeredgecolor=TARGET, markeredgewidth=1.2)
_FRONT: dict[str, Any] = dict(marker="o", color=PREDICTED, markersize=5.5, markerfacecolor="none", markeredgewidth=1.2)


def region(
    values: Sequence[str],
    lam: np.ndarray,
    desirable: np.ndarray,
    *,
    shown: Sequence[tuple[int, int]],
    chosen: Mapping[str, np.ndarray] | None = None,
) -> Figure:
    """Random λ (T, m), in units of 1/σ, two values at a time: the desirable ones (T,) strong, above the others.

    chosen: λ (m,) by name, such as palettes' answers; those beyond the axes are drawn hollow, at the edge.
    """
    columns = min(3 if len(shown) <= 6 else 5, len(shown))
    rows = -(-len(shown) // columns)
    size = {1: 5.0, 5: 2.35}.get(columns, 3.4)
    share = f"{desirable.mean():.0%}" if desirable.mean() >= 0.1 else f"{desirable.mean():.1%}"
    with style.figure(size * columns, size * 0.95 * rows + 0.6) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        edge, left_out = float(lam.max()) * 1.04, False
        for axes, (i, j) in zip(grid.flat, shown, strict=False):
            for which, color, alpha, order in ((~desirable, BEFORE, 0.3, 1), (desirable, REALISED, 0.75, 2)):
                axes.plot(
                    lam[which, i],
                    lam[which, j],
                    ".",
                    color=color,
                    alpha=alpha,
                    markersize=5,
                    markeredgewidth=0,
                    zorder=order,
                    rasterized=len(lam) * len(shown) > DOTS_AS_IMAGE,
                )
            for at in (chosen or {}).values():
                beyond = max(at[i], at[j]) >= edge
                look = style.MARKERS["target"] | (_HOLLOW if beyond else {})
                axes.plot(min(at[i], edge), min(at[j], edge), linestyle="none", clip_on=False, zorder=3, **look)
                left_out |= beyond
            axes.set_xlim(-0.03 * edge, edge)
            axes.set_ylim(-0.03 * edge, edge)
            axes.set_xlabel("λ·σ of " + style.short(values[i], 24))
            axes.set_ylabel("λ·σ of " + style.short(values[j], 24))
            axes.locator_params(nbins=3 if columns == 5 else 6)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        handles = [
            style.points("random λ", ".", BEFORE, 8),
            style.points(f"no value below the model ({share})", ".", REALISED, 8),
        ]
        if chosen:
            handles.append(style.handle("target", "palettes"))
        if left_out:
            handles.append(style.points("palettes beyond the axes", "X", TARGET, 9.5, **_HOLLOW))
        style.legend(figure, handles)
    return figure


def path(
    values: Sequence[str],
    t: np.ndarray,
    lam: np.ndarray,
    kl: np.ndarray,
    ess: np.ndarray,
    *,
    limit: float,
    samples: int,
) -> Figure:
    """λ(c) along the path to a palette: λ·σ (T, m), KL (T,) and effective sample size (T,) of `samples` against t (T,).

    limit: the largest reachable t; drawn if it is less than 1 (the palette).
    """
    with style.figure(9.8, 3.5) as figure:
        left, middle, right = figure.subplots(1, 3)
        for j, name in enumerate(values):
            color, dash = SERIES[j % len(SERIES)]
            left.plot(t, lam[:, j], color=color, linestyle=dash, linewidth=1.8, label=style.short(name))
        middle.plot(t, kl, color=PREDICTED, linewidth=1.8)
        right.plot(t, ess, color=PREDICTED, linewidth=1.8)
        right.set_yscale("log")
        style.plain_logs(right.yaxis)
        right.axhline(samples, color=BEFORE, linewidth=1.1)
        labels = ("λ·σ of each value", "KL to the model, nats", f"effective sample size, of {samples:,}")
        for axes, label in zip((left, middle, right), labels, strict=True):
            axes.set_ylabel(label)
            axes.grid(True)
            axes.set_xlim(0, max(1.0, float(t[-1])) * 1.02)
            axes.axvline(1.0, color=TARGET, linewidth=1.6, linestyle=(0, (4, 2.5)))
            if limit < 1:
                axes.axvspan(limit, axes.get_xlim()[1], color=MUTED, alpha=0.13, linewidth=0)
        if lam.min() >= 0:
            left.set_ylim(bottom=0)
        else:  # for targets of at most, or exactly, a level
            left.axhline(0, color=MUTED, linewidth=0.8)
        middle.set_ylim(bottom=0)
        figure.supxlabel("share of the way from the model's mean to the palette", fontsize="medium")
        handles = [
            *left.get_legend_handles_labels()[0],
            style.line("the palette", TARGET, linewidth=1.6, linestyle=(0, (3, 2))),
        ]
        if limit < 1:
            from matplotlib.patches import Patch

            handles.append(Patch(facecolor=MUTED, alpha=0.2, linewidth=0, label=f"out of reach, from {limit:.0%}"))
        style.legend(figure, handles)
    return figure


def samples_left(
    kl: np.ndarray,
    ess: np.ndarray,
    desirable: np.ndarray,
    *,
    samples: int,
    trusted: float,
    fronts: Mapping[float, tuple[np.ndarray, np.ndarray]] | None = None,
    chosen: tuple[np.ndarray, np.ndarray] | None = None,
) -> Figure:
    """Effective sample size of `samples` against the KL, for random λ (T,), for fronts and for palettes.

    fronts: by KL, (KL (S,), ESS (S,)) of its policies. trusted: below this number, weighted means are mostly noise.
    """
    with style.figure(6.4, 4.3) as figure:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        axes = figure.add_subplot()
        for which, color, alpha in ((~desirable, BEFORE, 0.35), (desirable, REALISED, 0.7)):
            axes.plot(
                kl[which],
                ess[which],
                ".",
                color=color,
                alpha=alpha,
                markersize=5,
                markeredgewidth=0,
                rasterized=len(kl) > DOTS_AS_IMAGE,
            )
        most = max([float(kl.max()), *(float(x.max()) for x, _ in (fronts or {}).values())])
        if chosen is not None:
            most = max(most, float(chosen[0].max()))
        x = np.linspace(0, min(most, np.log(samples)), 100)
        axes.plot(x, np.maximum(samples * np.exp(-x), 1.0), color=MUTED, linewidth=1.3, linestyle=(0, (1.5, 2)))
        for at, left in (fronts or {}).values():
            axes.plot(at, left, linestyle="none", **_FRONT)
        if chosen is not None:
            axes.plot(*chosen, linestyle="none", zorder=4, **style.MARKERS["target"])
        axes.axhspan(0.8, min(trusted, samples), color=TARGET, alpha=0.1, linewidth=0)
        axes.set_yscale("log")
        style.plain_logs(axes.yaxis)
        axes.set_ylim(0.8, samples * 1.25)
        axes.set_xlim(left=0)
        axes.set_xlabel("KL to the model, nats")
        axes.set_ylabel(f"effective sample size, of {samples:,}")
        handles: list[Any] = [
            style.points("random λ", ".", BEFORE, 8),
            style.points("no value below the model", ".", REALISED, 8),
        ]
        if fronts:
            handles.append(Line2D([], [], linestyle="none", label="fronts", **_FRONT))
        if chosen is not None:
            handles.append(style.handle("target", "palettes"))
        handles.append(style.line("N·exp(−KL)", MUTED, linewidth=1.3, linestyle=(0, (1.5, 2))))

        handles.append(
            Patch(facecolor=TARGET, alpha=0.15, linewidth=0, label=f"below {min(trusted, samples):g}: mostly noise")
        )
        style.legend(figure, handles)
    return figure
