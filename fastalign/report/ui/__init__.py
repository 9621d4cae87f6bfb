"""The page of `fastalign palette-ui`: one slider per value, with the solver's answer as it moves."""

from fastalign.report.ui.server import serve
from fastalign.report.ui.session import Session

__all__ = ["Session", "serve"]
