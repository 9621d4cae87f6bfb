"""Figures of palettes, fronts and λ. Needs matplotlib (`pip install 'fastalign[plots]'`).

Every function returns a matplotlib Figure without a window or global state; `save` writes it.
"""

from fastalign.report.figures.agreement import agreement
from fastalign.report.figures.fronts import Shown, front_in_three, fronts
from fastalign.report.figures.lam import path, region, samples_left
from fastalign.report.figures.rounds import rounds
from fastalign.report.figures.soups import soups
from fastalign.report.figures.style import BEFORE, GRID, INK, MUTED, PAPER, PREDICTED, REALISED, TARGET, save, write
from fastalign.report.figures.tradeoff import MAX_PAIRS, pairs, pareto
from fastalign.report.figures.values import histograms, levels, radar

__all__ = [
    "BEFORE", "GRID", "INK", "MAX_PAIRS", "MUTED", "PAPER", "PREDICTED", "REALISED", "TARGET", "Shown",
    "agreement", "front_in_three", "fronts", "histograms", "levels", "pairs", "pareto", "path", "radar", "region",
    "rounds", "samples_left", "save", "soups", "write",
]  # fmt: skip
