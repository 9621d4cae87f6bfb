"""Figures of palettes, fronts and λ. Needs matplotlib (`pip install fastalign[plots]`).

Every function returns a matplotlib Figure that belongs to no window or global state; `save` writes it.
"""

from fastalign.palette.plots._style import (
    ASKED,
    BEFORE,
    GRID,
    INK,
    MUTED,
    PAPER,
    PREDICTED,
    REALISED,
    _bins,
    _figure,
    _legend,
    _line,
    _patch,
    _short,
    save,
    write,
)  # fmt: skip
from fastalign.palette.plots.tradeoff import MAX_PAIRS, pairs, pareto
from fastalign.palette.plots.values import histograms, levels, radar

__all__ = [
    "ASKED", "BEFORE", "GRID", "INK", "MAX_PAIRS", "MUTED", "PAPER", "PREDICTED", "REALISED", "_bins", "_figure", "_legend",
    "_line", "_patch", "_short", "histograms", "levels", "pairs", "pareto", "radar", "save", "write",
]  # fmt: skip
