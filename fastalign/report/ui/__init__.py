"""A page with one slider for each value, answered by the solver as it moves: what `fastalign palette-ui` serves."""

from fastalign.report.ui.server import serve
from fastalign.report.ui.session import Desk

__all__ = ["Desk", "serve"]
