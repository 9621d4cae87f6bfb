"""The figures' common style, in colours suitable for the colour-blind (Okabe & Ito 2008), and how figures are
written."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch


INK, MUTED, GRID, PAPER = "#1b2026", "#66707b", "#e1e5ea", "#fefefe"
BEFORE, TARGET, PREDICTED, REALISED = "#8a93a0", "#d55e00", "#0072b2", "#009e73"

# For lines without a fixed colour: each has its own dash, so that they differ in grey print too. The palettes' colour
# is not among them.
SERIES: list[tuple[str, Any]] = [
    ("#0072b2", "-"),
    ("#e69f00", (0, (5, 1.5))),
    ("#009e73", (0, (1.2, 1.2))),
    ("#cc79a7", (0, (6, 1.5, 1.2, 1.5))),
    ("#1b2026", (0, (3, 1))),
    ("#56b4e9", (0, (8, 2))),
    ("#66707b", (0, (1.2, 2.5))),
]

MARKERS: dict[str, dict[str, Any]] = {
    "before": dict(marker="o", color=BEFORE, markerfacecolor=PAPER, markeredgewidth=1.6, markersize=7),
    "target": dict(marker="X", color=TARGET, markeredgecolor=PAPER, markeredgewidth=0.6, markersize=9.5),
    "predicted": dict(marker="D", color=PREDICTED, markerfacecolor=PAPER, markeredgewidth=1.6, markersize=7.5),
    "realised": dict(marker="o", color=REALISED, markeredgecolor=PAPER, markeredgewidth=0.6, markersize=8),
}
_STYLE: dict[Any, Any] = {
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


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure atomically, in the format of its suffix: .svg, .png or .pdf."""
    kind = Path(path).suffix.lower().lstrip(".")
    if kind not in ("svg", "png", "pdf"):
        raise UserError(f"path must end in .svg, .png or .pdf, got {str(path)!r}")
    with atomic_write(path) as beside:
        write(figure, beside, kind)


def write(figure: Figure, target: Any, kind: str) -> None:
    """Write the figure as `kind` to a path or binary file, with reproducible bytes."""
    import matplotlib

    # Without a date and with a fixed salt for its ids, an unchanged figure is an unchanged file.
    metadata = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}.get(kind)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "fastalign"}), warnings.catch_warnings():
        # An SVG names its letters, so the viewer's own fonts draw those that matplotlib's lack.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        figure.savefig(target, format=kind, metadata=metadata)


@contextmanager
def figure(width: float, height: float):
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib: pip install 'fastalign[plots]'") from None
    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def in_deviations(level: np.ndarray, before: np.ndarray, std: np.ndarray) -> np.ndarray:
    return np.where((std > 0) | np.isnan(level), (level - before) / np.where(std > 0, std, 1), 0.0)


def body(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """The range to draw: all of it, or, if a few outliers would squeeze the rest, the middle 90 % plus half as much on
    each side, and all of `after`."""
    least, most = float(before.min()), float(before.max())
    low, high = np.percentile(before, [5, 95])
    if most - least < 2.6 * (high - low) or low == high:
        return least, most
    margin = 0.5 * (high - low)
    return max(least, after.min(initial=low - margin)), min(most, after.max(initial=high + margin))


def bins(x: np.ndarray) -> np.ndarray:
    """12 to 32 bins by Freedman & Diaconis' rule over all of x; rewards with few distinct values get one bin each."""
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


def nice_step(extent: float) -> float:
    """1, 2 or 5 times a power of ten, such that 3 to 7 of them span `extent`."""
    power = 10.0 ** np.floor(np.log10(extent / 3))
    return max(s * power for s in (1, 2, 5) if s * power <= extent / 3 * (1 + 1e-9))


def short(name: str, width: int = 24) -> str:
    # An unescaped $ would start mathematics.
    return (name if len(name) <= width else name[: width - 1] + "…").replace("$", r"\$")


def handle(name: str, label: str | None = None) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", label=label or name, **MARKERS[name])


def line(label: str, color: str, **look: Any) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, label=label, **{"linewidth": 1.4, **look})


def dot(label: str) -> Line2D:
    return points(label, ".", BEFORE, 7, alpha=0.7)


def points(label: str, marker: str, color: str, size: float, **look: Any) -> Line2D:
    from matplotlib.lines import Line2D

    look = {"markeredgewidth": 0, **look}
    return Line2D([], [], linestyle="none", marker=marker, color=color, markersize=size, label=label, **look)


def patch(label: str, color: str) -> Patch:
    from matplotlib.patches import Patch

    return Patch(facecolor=color, alpha=0.32, linewidth=0, label=label)


def plain_logs(axis: Any) -> None:
    """A logarithmic axis with its numbers written out, at 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, handles: Sequence[Any]) -> None:
    wide = figure.get_figwidth() > 8
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=len(handles) if wide and len(handles) < 7 else 4 if wide else 3,
        columnspacing=1.6,
        handletextpad=0.6,
    )
