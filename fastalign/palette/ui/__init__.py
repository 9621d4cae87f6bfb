"""A page with one slider for each value, answered by the solver as it moves: what `fastalign palette-ui` serves."""

from fastalign.palette.ui.desk import Desk
from fastalign.palette.ui.server import serve

__all__ = ["Desk", "serve"]
