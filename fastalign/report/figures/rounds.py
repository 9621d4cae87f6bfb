"""What each round of training gained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastalign.report.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = (style.REALISED, style.PREDICTED, style.TARGET, style.INK, style.MUTED)
MARKERS = "osD^v"


def rounds(
    values: Sequence[str], kl: Sequence[float], gains: Sequence[Sequence[float]], asked: Sequence[float | None]
) -> Figure:
    """Lines over the KL to the base. values: m names; kl: of the base, 0, and of each round; gains: of each value at
    each; asked: the gain asked for, or None."""
    with style.figure(7.6, 3.0) as figure:
        axes = figure.add_subplot()
        for j, name in enumerate(values):
            colour, marker = COLOURS[j % len(COLOURS)], MARKERS[j % len(MARKERS)]
            axes.plot(kl, gains[j], color=colour, marker=marker, markersize=5, linewidth=1.6, label=style.short(name))
            if (level := asked[j]) is not None:
                axes.axhline(level, color=colour, linewidth=0.9, linestyle="--")
        axes.set_xlabel("KL to the base, nats per answer")
        axes.set_ylabel("gain, standard deviations")
        axes.legend(frameon=False, fontsize=9)
    return figure
