"""Value palettes: solve for the weights that reach one, or find the nearest that can be reached."""

from fastalign.palette.ask import (
    lambda_of_rlhf,
    parse_palette,
    raised_palette,
    rlhf_of_lambda,
    single_value_palette,
)
from fastalign.palette.quantile import quantile_palette
from fastalign.palette.sequential import solve_in_turn
from fastalign.palette.solve import PaletteSolution, solve
from fastalign.palette.sources import ParquetRewards
from fastalign.palette.uncertainty import bootstrap, held_out, standard_errors

__all__ = [
    "PaletteSolution", "ParquetRewards", "bootstrap", "held_out", "lambda_of_rlhf", "parse_palette", "quantile_palette",
    "raised_palette", "rlhf_of_lambda", "single_value_palette", "solve", "solve_in_turn", "standard_errors",
]  # fmt: skip
