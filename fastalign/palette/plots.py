"""Figures of a palette: levels, histograms, radar, trade-offs. Needs matplotlib (`pip install fastalign[plots]`).

One style for all, in colours that the colour-blind can tell apart (Okabe & Ito 2008), each with its own marker as well.
Every function returns a matplotlib Figure that belongs to no window or global state; `save` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastalign.data.files import atomic_write
from fastalign.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1b2026", "#66707b", "#e1e5ea", "#fefefe"
BEFORE, ASKED, PREDICTED, REALISED = "#8a93a0", "#d55e00", "#0072b2", "#009e73"
MAX_PAIRS = 15

_MARKERS = {
    "before": dict(marker="o", color=BEFORE, markerfacecolor=PAPER, markeredgewidth=1.6, markersize=7),
    "asked for": dict(marker="X", color=ASKED, markeredgecolor=PAPER, markeredgewidth=0.6, markersize=9.5),
    "predicted": dict(marker="D", color=PREDICTED, markerfacecolor=PAPER, markeredgewidth=1.6, markersize=7.5),
    "realised": dict(marker="o", color=REALISED, markeredgecolor=PAPER, markeredgewidth=0.6, markersize=8),
}
_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "figure.facecolor": PAPER,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "savefig.dpi": 160,
}


def levels(
    values: Sequence[str], *, before: np.ndarray, spread: np.ndarray, palette: np.ndarray, predicted: np.ndarray,
    realised: np.ndarray, se: np.ndarray,
) -> Figure:  # fmt: skip
    """One row per value: the mean before, asked for, predicted and realised (its bar: 3 standard errors each way).

    All (m,). The scale is (level - before) / spread, spread the standard deviation of all candidates; a value
    with no spread stays at 0.
    """
    m = len(values)
    with _figure(7.6, 0.9 + 0.52 * m) as figure:
        axes = figure.add_subplot()
        rows = np.arange(m)
        at = {
            name: _in_spreads(x, before, spread)
            for name, x in (("asked for", palette), ("predicted", predicted), ("realised", realised))
        }
        bar = 3 * np.where(spread > 0, se / np.where(spread > 0, spread, 1), 0)
        axes.axvline(0, color=BEFORE, linewidth=1.1, zorder=1)
        axes.hlines(rows, 0, at["predicted"], color=GRID, linewidth=6, zorder=1)
        axes.hlines(rows + 0.17, at["realised"] - bar, at["realised"] + bar, color=REALISED, linewidth=1.7, zorder=2)
        axes.plot(np.zeros(m), rows, linestyle="none", zorder=3, **_MARKERS["before"])
        axes.plot(at["predicted"], rows, linestyle="none", zorder=4, **_MARKERS["predicted"])
        axes.vlines(at["asked for"], rows - 0.33, rows + 0.33, color=ASKED, linewidth=2.4, zorder=3)
        axes.plot(at["realised"], rows + 0.17, linestyle="none", zorder=5, **_MARKERS["realised"])
        axes.set_yticks(rows, [_short(v) for v in values], color=INK, fontsize=10.5)
        axes.set_ylim(m - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.margins(x=0.06)
        axes.set_xlabel("change of the mean, in standard deviations of the candidates")
        handles = [
            _handle("before"),
            _line("asked for", ASKED, linewidth=2.4),
            _handle("predicted"),
            _handle("realised", "realised ± 3 SE"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=4, columnspacing=1.8, handletextpad=0.6)
    return figure


def histograms(
    before: np.ndarray, after: np.ndarray, values: Sequence[str], *, weights: np.ndarray | None = None,
    palette: np.ndarray | None = None,
) -> Figure:  # fmt: skip
    """Each value's distribution over all candidates and over the texts chosen, with the means and the level asked for.

    before: (n, m), after: (d, m). weights: (n,), the policy's weights of the candidates: draws its whole distribution
    too, which is what few draws hint at. palette: (m,).
    """
    m = len(values)
    columns = min(3, m)
    rows = -(-m // columns)
    with _figure(max(4.6, 3.2 * columns), 0.6 + 2.45 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        cut = False
        for axes, j in zip(grid.flat, range(m), strict=False):
            low, high = _body(before[:, j], after[:, j])
            cut |= bool(before[:, j].min() < low or before[:, j].max() > high)
            inside = np.clip(before[:, j], low, high)
            edges = _bins(np.concatenate([inside, after[:, j]]))
            all_alike = np.full(len(before), 100 / len(before))
            axes.hist(inside, edges, weights=all_alike, color=BEFORE, alpha=0.32, linewidth=0)
            if weights is not None:
                share = 100 * weights / weights.sum()
                axes.hist(inside, edges, weights=share, histtype="step", color=PREDICTED, linewidth=1.6)
            share = np.full(len(after), 100 / len(after))
            if len(after) >= 100 or weights is None:
                axes.hist(after[:, j], edges, weights=share, histtype="step", color=REALISED, linewidth=1.6)
            else:  # too few for bars: each draw is a tick
                axes.plot(after[:, j], np.full(len(after), -0.035), "|", color=REALISED, markersize=8, markeredgewidth=1.3,
                          transform=axes.get_xaxis_transform(), clip_on=False)  # fmt: skip
            top = axes.get_xaxis_transform()
            axes.plot([before[:, j].mean()] * 2, [0, 1.0], color=MUTED, linewidth=1.3, transform=top)
            axes.plot([after[:, j].mean()] * 2, [0, 1.0], color=REALISED, linewidth=1.8, transform=top)
            if palette is not None:
                axes.plot(
                    [palette[j]] * 2, [0, 1.0], color=ASKED, linewidth=1.8, linestyle=(0, (4, 2.5)), transform=top
                )
            axes.set_title(_short(values[j], 30))
            axes.tick_params(axis="x", pad=8)
            axes.locator_params(nbins=5)
            axes.grid(axis="y")
            if j % columns == 0:
                axes.set_ylabel("texts, %")
        for axes in grid.flat[m:]:
            axes.set_visible(False)
        if cut:
            figure.supxlabel("candidates beyond an axis are counted in its end bins", fontsize=9, color=MUTED)
        handles = [_patch("all candidates", BEFORE), _line("their mean", MUTED)]
        if weights is not None:
            handles.append(_line("under the policy", PREDICTED))
        handles.append(
            _line(
                "realised mean" if weights is not None and len(after) < 100 else "realised, its mean",
                REALISED,
                linewidth=1.8,
            )
        )
        if palette is not None:
            handles.append(_line("asked for", ASKED, linewidth=1.8, linestyle=(0, (3, 2))))
        _legend(figure, handles)
    return figure


def radar(values: Sequence[str], series: Mapping[str, np.ndarray], *, before: np.ndarray, spread: np.ndarray) -> Figure:
    """Levels (m,) by name on m spokes, as (level - before) / spread: 0 is the ring of the candidates' means.

    Series named "before", "asked for", "predicted" and "realised" keep their house colours. The scale is on the plot.
    """
    m = len(values)
    angles = np.linspace(0, 2 * np.pi, m, endpoint=False)
    heights = {name: _in_spreads(np.asarray(x), before, spread) for name, x in series.items()}
    everything = np.concatenate([[0.0], *heights.values()])
    step = _nice_step(float(np.ptp(everything)) or 1.0)
    low = np.floor(everything.min() / step - 0.35) * step
    high = np.ceil(everything.max() / step + 0.05) * step
    with _figure(5.4, 5.4) as figure:
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
        others = iter(["#e69f00", "#cc79a7", "#56b4e9"] * len(heights))
        for name, height in heights.items():
            if name == "before" or name not in _MARKERS:
                look = dict(_MARKERS["before"], color=BEFORE if name == "before" else next(others))
            else:
                look = _MARKERS[name]
            around = (np.append(angles, angles[0]), np.append(height, height[0]))
            if name == "asked for":  # a broad band, to be seen also where the policy is exactly on it
                axes.plot(*around, color=ASKED, linewidth=6, alpha=0.35, label=name, zorder=2)
                continue
            axes.plot(*around, linewidth=0 if name == "before" else 1.8, label=name, zorder=3, **look)
            if name == "realised" and m > 2:
                axes.fill(angles, height, color=REALISED, alpha=0.1, linewidth=0, zorder=2)
        axes.set_ylim(low, high)
        axes.grid(False)
        axes.set_yticks([])
        # Between two spokes, so that the numbers stand on no line that is drawn.
        for ring in rings:
            text = "0" if abs(ring) < step / 9 else f"{ring:+.3g} σ"
            axes.text(np.pi / max(m, 2), ring, text, fontsize=8, color=MUTED, ha="center", va="center",
                      bbox=dict(facecolor=PAPER, linewidth=0, pad=0.8, alpha=0.8), zorder=4)  # fmt: skip
        axes.set_xticks(angles, [_short(v, 16) for v in values], color=INK, fontsize=10.5)
        axes.tick_params(axis="x", pad=10)
        figure.legend(loc="outside upper center", ncols=4, columnspacing=1.4, handletextpad=0.5)
        figure.supxlabel("ring 0: mean of the candidates · σ: their standard deviation", fontsize=9, color=MUTED)
    return figure


def pareto(
    values: Sequence[str], *, before: np.ndarray, cloud: tuple[np.ndarray, np.ndarray], kl: float,
    palette: np.ndarray, predicted: np.ndarray, realised: np.ndarray, se: np.ndarray,
    fronts: Mapping[tuple[int, int], np.ndarray] | None = None, limits: Mapping[tuple[int, int], np.ndarray] | None = None,
) -> Figure:  # fmt: skip
    """Every pair of values against each other: what policies p_λ over the same candidates can reach.

    cloud: levels (T, m) and KL (T,) of T policies; the dots, strong where the KL is at most `kl`, the chosen policy's.
    fronts, limits: by pair (i, j), i < j, curves (S, 2): the most that is reachable at that KL, and at any.
    The realised mean has a bar of 3 standard errors `se` each way. A single value is drawn against the KL instead.
    Of many values the 15 pairs are kept that trade off most against each other (lowest correlation over the cloud).
    """
    points, cost = cloud
    m = len(values)
    if m == 1:
        return _level_by_kl(values[0], before, points, cost, kl, palette, predicted, realised, se)
    shown = pairs(points)
    columns = min(3 if len(shown) <= 6 else 5, len(shown))
    rows = -(-len(shown) // columns)
    size = {1: 5.2, 5: 2.35}.get(columns, 3.55)
    with _figure(size * columns, size * 0.95 * rows + 0.7) as figure:
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
            axes.axvline(palette[i], color=ASKED, linewidth=0.9, alpha=0.55, linestyle=(0, (4, 3)))
            axes.axhline(palette[j], color=ASKED, linewidth=0.9, alpha=0.55, linestyle=(0, (4, 3)))
            axes.plot(before[i], before[j], linestyle="none", **_MARKERS["before"])
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
            axes.plot(palette[i], palette[j], linestyle="none", zorder=4, **_MARKERS["asked for"])
            axes.plot(predicted[i], predicted[j], linestyle="none", zorder=5, **_MARKERS["predicted"])
            axes.plot(realised[i], realised[j], linestyle="none", zorder=6, **_MARKERS["realised"])
            axes.set_xlabel(_short(values[i], 30))
            axes.set_ylabel(_short(values[j], 30))
            axes.locator_params(nbins=3 if columns == 5 else 5)
            axes.margins(0.07)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        handles = [_handle("before"), _handle("asked for"), _handle("predicted"), _handle("realised", "realised ± 3 SE"),
                   _dot("policies of random λ")]  # fmt: skip
        if fronts:
            handles.append(_line(f"front at KL {kl:.2f}", PREDICTED, linewidth=1.8))
        if limits:
            handles.append(_line("limit of these candidates", MUTED, linewidth=1.2, linestyle=(0, (1.5, 2))))
        _legend(figure, handles)
        if m * (m - 1) // 2 > len(shown):
            figure.supxlabel(
                f"the {len(shown)} pairs of {m * (m - 1) // 2} that trade off most", fontsize=9, color=MUTED
            )
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure whole or not at all, as its suffix says: .svg, .png or .pdf."""
    kind = Path(path).suffix.lower().lstrip(".")
    if kind not in ("svg", "png", "pdf"):
        raise UserError(f"path must end in .svg, .png or .pdf, got {str(path)!r}")
    with atomic_write(path) as beside:
        write(figure, beside, kind)


def write(figure: Figure, target, kind: str) -> None:
    """The figure as `kind` into a path or binary file, the same bytes every time."""
    import matplotlib

    # Without a date and with a fixed salt for its ids, an unchanged figure is an unchanged file.
    metadata = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}.get(kind)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "fastalign"}):
        figure.savefig(target, format=kind, metadata=metadata)


@contextmanager
def _figure(width: float, height: float):
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib: pip install 'fastalign[plots]'") from None
    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def _level_by_kl(value, before, points, cost, kl, palette, predicted, realised, se) -> Figure:
    with _figure(6.0, 4.2) as figure:
        axes = figure.add_subplot()
        order = np.argsort(cost)
        axes.plot(cost[order], points[order, 0], color=PREDICTED, linewidth=1.8)
        axes.axhline(palette[0], color=ASKED, linewidth=1.8, linestyle=(0, (4, 2.5)))
        axes.plot(0, before[0], linestyle="none", zorder=3, **_MARKERS["before"])
        axes.errorbar(kl, realised[0], yerr=3 * se[0], fmt="none", ecolor=REALISED, elinewidth=1.3, zorder=3)
        axes.plot(kl, predicted[0], linestyle="none", zorder=4, **_MARKERS["predicted"])
        axes.plot(kl, realised[0], linestyle="none", zorder=5, **_MARKERS["realised"])
        axes.set_xlabel("KL to the model, nats")
        axes.set_ylabel(_short(value, 30))
        axes.grid(True)
        handles = [_handle("before"), _line("asked for", ASKED, linewidth=1.8, linestyle=(0, (3, 2))), _handle("predicted"),
                   _handle("realised", "realised ± 3 SE"), _line("most at each KL", PREDICTED, linewidth=1.8)]  # fmt: skip
        _legend(figure, handles)
    return figure


def pairs(points: np.ndarray) -> list[tuple[int, int]]:
    """The pairs of values (i, j), i < j, that `pareto` draws of policies with these levels (T, m)."""
    every = list(combinations(range(points.shape[1]), 2))
    if len(every) <= MAX_PAIRS:
        return every
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.nan_to_num(np.corrcoef(points.T), nan=1.0)
    return sorted(sorted(every, key=lambda pair: correlation[pair])[:MAX_PAIRS])


def _in_spreads(level: np.ndarray, before: np.ndarray, spread: np.ndarray) -> np.ndarray:
    return np.where(spread > 0, (level - before) / np.where(spread > 0, spread, 1), 0.0)


def _body(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """The range to draw: all of it, or the middle 90 % and half as much on each side, and all of `after`,
    where a few outliers would squeeze the rest."""
    least, most = float(before.min()), float(before.max())
    low, high = np.percentile(before, [5, 95])
    if most - least < 2.6 * (high - low) or low == high:
        return least, most
    margin = 0.5 * (high - low)
    return max(least, min(low - margin, after.min())), min(most, max(high + margin, after.max()))


def _bins(x: np.ndarray) -> np.ndarray:
    """12 to 32 bins by Freedman & Diaconis' rule over all of x; rewards of few distinct values get one bin each."""
    distinct = np.unique(x)
    if len(distinct) == 1:
        half = max(abs(float(distinct[0])), 1.0) * 0.1
        return np.linspace(distinct[0] - half, distinct[0] + half, 12)
    if len(distinct) <= 12:
        gap = np.diff(distinct).min()
        if np.ptp(x) / gap <= 32:
            return np.arange(distinct[0] - gap / 2, distinct[-1] + gap, gap)
    low, high = np.percentile(x, [25, 75])
    width = 2 * (high - low) / len(x) ** (1 / 3)
    count = int(np.clip(np.ptp(x) / width, 12, 32)) if width > 0 else 24
    return np.linspace(distinct[0], distinct[-1], count + 1)


def _nice_step(extent: float) -> float:
    """1, 2 or 5 times a power of ten, such that 3 to 7 of them span `extent`."""
    power = 10.0 ** np.floor(np.log10(extent / 3))
    return max(s * power for s in (1, 2, 5) if s * power <= extent / 3 * (1 + 1e-9))


def _short(name: str, width: int = 24) -> str:
    # A $ would start mathematics.
    return (name if len(name) <= width else name[: width - 1] + "…").replace("$", r"\$")


def _handle(name: str, label: str | None = None):
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", label=label or name, **_MARKERS[name])


def _line(label: str, color: str, **look):
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, label=label, **{"linewidth": 1.4, **look})


def _dot(label: str):
    from matplotlib.lines import Line2D

    return Line2D(
        [], [], linestyle="none", marker=".", color=BEFORE, alpha=0.7, markersize=7, markeredgewidth=0, label=label
    )


def _patch(label: str, color: str):
    from matplotlib.patches import Patch

    return Patch(facecolor=color, alpha=0.32, linewidth=0, label=label)


def _legend(figure, handles) -> None:
    wide = figure.get_figwidth() > 8
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles) if wide and len(handles) < 7 else 4 if wide else 3,
                  columnspacing=1.6, handletextpad=0.6)  # fmt: skip
