"""Do the values agree? The part of a page that shows their correlations."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from fastalign._base.errors import UserError
from fastalign.report import clean
from fastalign.report.page import figure_of, svg_of

_CAPTION = (
    "Correlations of the values among the {source} to one prompt. Two near 1 measure the same thing; two below 0 pull "
    "against each other."
)


def section(names: Sequence[str], rewards: np.ndarray, source: str = "candidates") -> list[str]:
    """The correlations of values within prompts, drawn, and those that are one value; nothing for a single value, or
    without matplotlib. rewards: (P, N, m). source: what the texts are, in the caption."""
    from fastalign.palette.agreement import alike, correlations
    from fastalign.report import figures as plots

    if len(names) < 2:
        return []
    shown = [clean(name) for name in names]
    try:
        figure = plots.agreement(shown, correlations(rewards))
    except UserError:  # without matplotlib
        return []
    notes = "".join(f"<p class='note'>{escape(line)}.</p>" for line in alike(shown, rewards))
    drawn = figure_of("agreement", {"agreement": svg_of(figure, "agreement")}, _CAPTION.format(source=source))
    return ["<h2>Do the values agree?</h2>", drawn, notes]
