"""A wrong argument of the palette's functions is one line of UserError that names it, what came and what is wanted."""

import numpy as np
import pytest
from refusals import assert_one_line

from fastalign import decode, palette
from fastalign.palette import front, sequential, uncertainty

R = np.random.default_rng(0).standard_normal((40, 2))
C = R.mean(axis=0) + 0.1
TWO = np.stack([C, C])

CASES = [
    (lambda: palette.solve(R, "positive=1"), "palette must be an array of numbers, got 'positive=1'"),
    (lambda: palette.solve(R, None), "palette must have one level for each of the 2 rewards"),
    (lambda: palette.solve([[1.0], [1.0, 2.0]], C), "rewards must be an array of numbers, got list"),
    (lambda: palette.solve(R, C, weights="x"), "weights must be an array of numbers, got 'x'"),
    (lambda: palette.solve(R, C, tol=None), "tol must be a number, got None"),
    (lambda: palette.solve(R, C, lam_max="x"), "lam_max must be a number, got 'x'"),
    (lambda: palette.solve(R, C, sense=None), "sense must be '>=', '<=' or '==', got None"),
    (lambda: palette.solve(R, C, sense=[None, ">="]), "sense must be '>=', '<=' or '==', got None"),
    (lambda: palette.solve(R, C, groups=[[1], [1, 2]]), "groups must have shape (40,), one prompt id for each row"),
    (lambda: palette.solve(R, C, groups=["a"] * 40), "groups must be integers, got "),
    (lambda: palette.quantile_palette("x", 0.5), "rewards must be an array of numbers, got 'x'"),
    (lambda: palette.quantile_palette(R, None), "q must be a number, got None"),
    (lambda: palette.pareto_front("x"), "points must be an array of numbers, got 'x'"),
    (lambda: palette.pareto_front([[1.0], [1.0, 2.0]]), "points must be an array of numbers, got list"),
    (lambda: palette.hypervolume(R, None), "reference must have one level for each of the 2 values, got ()"),
    (lambda: palette.hypervolume(R, "x"), "reference must be an array of numbers, got 'x'"),
    (lambda: sequential.solve_in_turn(R, "x"), "palette must be an array of numbers, got 'x'"),
    (lambda: sequential.solve_in_turn(R, C, weights="x"), "weights must be an array of numbers, got 'x'"),
    (lambda: sequential.solve_in_turn(R, C, sense=None), "sense must be '>=', '<=' or '==', got None"),
    (lambda: front.spread_directions(2, columns=[7]), "columns must be from 0 to 1, of 2 values, got 7"),
    (lambda: front.spread_directions(2, columns=[-1]), "columns must be from 0 to 1, of 2 values, got -1"),
    (lambda: front.spread_directions(2, columns=-1), "columns must be several of the 2 values, got -1"),
    (lambda: front.spread_directions(-1), "m must be an integer, at least 1, got -1"),
    (lambda: front.spread_directions(2, None), "count must be an integer, got None"),
    (lambda: front.feasible_region(R, 10, 1.0, -1), "seed must be an integer, at least 0, got -1"),
    (lambda: front.feasible_region(R, None, 1.0, 0), "n_lam must be an integer, got None"),
    (lambda: front.feasible_region(R, 10, "x", 0), "l1_max must be a number, got 'x'"),
    (lambda: front.kl_front(R, None), "kl must be a number, got None"),
    (lambda: front.kl_front(R, 0.1, "x"), "directions must be an array of numbers, got 'x'"),
    (lambda: front.front_towards(R, C, "x"), "kl must be a number, got 'x'"),
    (lambda: front.front_towards(R, "x", 0.1), "palettes must be an array of numbers, got 'x'"),
    (lambda: front.palette_path(R, C, steps=None), "steps must be an integer, got None"),
    (lambda: front.palette_path(R, TWO), "palette must be one palette, of shape (2,), got 2 palettes"),
    (lambda: uncertainty.bootstrap(R, C, seed=-1), "seed must be an integer, at least 0, got -1"),
    (lambda: uncertainty.bootstrap(R, C, draws="x"), "draws must be an integer, got 'x'"),
    (lambda: uncertainty.bootstrap(R, TWO), "palette must be one palette, of shape (2,), got 2 palettes"),
    (lambda: uncertainty.held_out(R, C, folds=None), "folds must be an integer, got None"),
    (lambda: uncertainty.held_out(R, C, weights="x"), "weights must be an array of numbers, got 'x'"),
    (lambda: uncertainty.held_out(R, TWO), "palette must be one palette, of shape (2,), got 2 palettes"),
    (lambda: uncertainty.standard_errors(R, ["x", "y"]), "lam must be an array of numbers, got list"),
    (lambda: decode.select(R[None], ["x"], seed=0), "lam must be an array of numbers, got list"),
    (lambda: decode.select(R[None], C, k=None, seed=0), "k must be an integer, at least 1, got None"),
    (lambda: decode.select(R[None], C, method=None, seed=0), "method must be one of "),
    (lambda: decode.select("x", C, seed=0), "rewards must be an array of numbers, got 'x'"),
]


@pytest.mark.parametrize(("call", "message"), CASES)
def test_a_wrong_argument_is_one_line(call, message):
    assert_one_line(call, message)
