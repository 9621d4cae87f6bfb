"""Do values measure different things? Their correlations, as a table of colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastalign.report.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def agreement(values: Sequence[str], correlations: np.ndarray) -> Figure:
    """values: m names; correlations: (m, m), as `palette.agreement.correlations` gives them."""
    from matplotlib.patches import Rectangle

    m, names = len(values), [style.short(name) for name in values]
    with style.figure(2.6 + 0.75 * m, 1.2 + 0.5 * m) as figure:
        axes = figure.add_subplot()
        axes.set(xlim=(0, m), ylim=(m, 0))
        for i in range(m):
            for j in range(m):
                x = float(correlations[i, j])
                colour = style.PREDICTED if x > 0 else style.TARGET  # over the page's own, light or dark
                axes.add_patch(Rectangle((j, i), 1, 1, color=colour, alpha=abs(x), linewidth=0))
                ink = style.PAPER if abs(x) > 0.6 else style.INK
                axes.text(j + 0.5, i + 0.5, f"{x:.2f}", ha="center", va="center", color=ink, fontsize=9)
        places = np.arange(m) + 0.5
        axes.set_xticks(places, names, rotation=30, ha="right")
        axes.set_yticks(places, names)
        axes.tick_params(length=0)
        lines = np.arange(m + 1)
        axes.hlines(lines, 0, m, colors=style.GRID, linewidth=0.8)
        axes.vlines(lines, 0, m, colors=style.GRID, linewidth=0.8)
        for side in axes.spines.values():
            side.set_visible(False)
    return figure
