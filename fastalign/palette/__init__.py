"""Value palettes: solve for the weights that reach one, or find the nearest that can be reached."""

from fastalign.palette.quantile import quantile_palette
from fastalign.palette.solve import PaletteSolution, solve

__all__ = ["PaletteSolution", "quantile_palette", "solve"]
