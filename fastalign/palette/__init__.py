"""Value palettes: solve for the weights that reach one, or find the nearest that can be reached."""

from fastalign.palette.quantile import quantile_palette
from fastalign.palette.solve import PaletteSolution, solve
from fastalign.palette.sources import ParquetRewards

__all__ = ["PaletteSolution", "ParquetRewards", "quantile_palette", "solve"]
