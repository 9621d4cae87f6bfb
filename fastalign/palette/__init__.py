"""Value palettes: solve for the weights that reach one, or find the nearest that can be reached."""

from fastalign.palette.ask import (
    lambda_of_rlhf,
    raised_palette,
    rlhf_of_lambda,
    single_value_palette,
)
from fastalign.palette.front import (
    Policies,
    Region,
    Way,
    feasible_region,
    front_towards,
    kl_front,
    palette_path,
    spread_directions,
)
from fastalign.palette.pareto import hypervolume, pareto_front
from fastalign.palette.quantile import quantile_palette
from fastalign.palette.sequential import solve_in_turn
from fastalign.palette.solve import PaletteSolution, solve
from fastalign.palette.sources import ParquetRewards
from fastalign.palette.uncertainty import bootstrap, held_out, standard_errors
from fastalign.palette.words import parse_palette

__all__ = [
    "PaletteSolution", "ParquetRewards", "Policies", "Region", "Way", "bootstrap", "feasible_region", "front_towards",
    "held_out", "hypervolume", "kl_front", "lambda_of_rlhf", "palette_path", "pareto_front", "parse_palette",
    "quantile_palette", "raised_palette", "rlhf_of_lambda", "single_value_palette", "solve", "solve_in_turn",
    "spread_directions", "standard_errors",
]  # fmt: skip
