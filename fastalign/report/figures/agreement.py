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
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("agreement", [style.TARGET, style.PAPER, style.PREDICTED])
    m, names = len(values), [style.short(name) for name in values]
    with style.figure(2.6 + 0.75 * m, 1.2 + 0.5 * m) as figure:
        axes = figure.add_subplot()
        axes.pcolormesh(correlations, cmap=colours, vmin=-1, vmax=1, edgecolors=style.GRID, linewidth=0.8)
        for i in range(m):
            for j in range(m):
                x = float(correlations[i, j])
                ink = style.PAPER if abs(x) > 0.6 else style.INK
                axes.text(j + 0.5, i + 0.5, f"{x:.2f}", ha="center", va="center", color=ink, fontsize=9)
        places = np.arange(m) + 0.5
        axes.set_xticks(places, names, rotation=30, ha="right")
        axes.set_yticks(places, names)
        axes.tick_params(length=0)
        axes.invert_yaxis()
        for side in axes.spines.values():
            side.set_visible(False)
    return figure
