"""Non-dominated points and hypervolume, against brute force and volumes that are known."""

from itertools import combinations

import numpy as np
import pytest
import torch

from fastalign._base.errors import UserError
from fastalign.palette import hypervolume, pareto_front


def points(kind: str, n: int, d: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 4, size=(n, d)).astype(float) if kind == "ties" else rng.normal(size=(n, d))


def brute_front(x: np.ndarray) -> list[int]:
    return [i for i, p in enumerate(x) if not ((x >= p).all(axis=1) & (x > p).any(axis=1)).any()]


def inclusion_exclusion(x: np.ndarray, reference: np.ndarray) -> float:
    x = np.maximum(x - reference, 0.0)
    subsets = [list(s) for k in range(1, len(x) + 1) for s in combinations(range(len(x)), k)]
    return sum((-1) ** (len(s) + 1) * x[s].min(axis=0).prod() for s in subsets)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("kind", ["ties", "distinct"])
def test_pareto_front_is_brute_forces(kind, d):
    for seed, n in enumerate((1, 2, 7, 40, 40)):
        x = points(kind, n, d, seed)
        x = np.concatenate([x, x[: n // 2]])  # duplicates: all copies stay or none
        assert pareto_front(x).tolist() == brute_front(x)


def test_pareto_front_of_many_points_is_the_same_by_both_methods():
    x = points("distinct", 3000, 3)
    front = pareto_front(x)
    assert 20 < len(front) < 200
    assert pareto_front(np.c_[x, np.zeros(3000)]).tolist() == front.tolist()
    assert pareto_front(np.c_[x, -x[:, 0]]).tolist() == brute_front(np.c_[x, -x[:, 0]])  # a front of many blocks


def test_pareto_front_only_cares_for_order():
    x = points("distinct", 200, 4)
    assert pareto_front(np.exp(150 * x)[:, ::-1]).tolist() == pareto_front(x).tolist()
    huge = np.array([[1e308, -1e308, 1e308, 1e308], [1e308, -1e308, 1e308, 1e307], [-1e308, 1e308, 0, 0]])
    assert pareto_front(huge).tolist() == [0, 2]
    assert pareto_front(np.empty((0, 3))).tolist() == []
    assert pareto_front(torch.tensor([[1, 2], [2, 1], [1, 1]])).tolist() == [0, 1]


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("kind", ["ties", "distinct"])
def test_hypervolume_is_inclusion_exclusions(kind, d):
    for seed in range(3):
        x = points(kind, 9, d, seed)
        reference = np.full(d, 0.5 if kind == "ties" else -0.8)
        assert hypervolume(x, reference) == pytest.approx(inclusion_exclusion(x, reference), rel=1e-12, abs=1e-12)


def test_hypervolumes_that_are_known():
    assert hypervolume([[2.0, 3.0, 4.0]], [1.0, 1.0, 1.0]) == 6.0
    assert hypervolume([[1, 2], [2, 1], [1, 1]], [0, 0]) == 3.0
    assert hypervolume(np.empty((0, 2)), [0.0, 0.0]) == 0.0
    assert hypervolume([[1.0, -1.0], [0.0, 5.0]], [0.0, 0.0]) == 0.0  # on the reference's edge, or below it
    # DTLZ1's front, a + b + c constant, on a lattice: under its steps lie h (h + 1) (h + 2) / 6 cubes.
    h = 12
    lattice = np.array([(i, j, h + 2 - i - j) for i in range(1, h + 1) for j in range(1, h + 2 - i)], dtype=float)
    assert hypervolume(lattice, np.zeros(3)) == h * (h + 1) * (h + 2) / 6
    angle = np.linspace(0, np.pi / 2, 400)
    quarter = np.c_[np.cos(angle), np.sin(angle)]
    assert hypervolume(quarter, [0, 0]) == pytest.approx(np.pi / 4, abs=3e-3)


def test_hypervolume_grows_only_with_points_that_no_other_dominates():
    x = np.abs(points("distinct", 30, 4))
    whole, front = hypervolume(x, np.zeros(4)), pareto_front(x)
    assert hypervolume(x[front], np.zeros(4)) == pytest.approx(whole, rel=1e-12)
    assert hypervolume(x[::-1] * [2, 1, 1, 0.5], np.zeros(4)) == pytest.approx(whole, rel=1e-12)
    for i in front:
        assert hypervolume(np.delete(x, i, axis=0), np.zeros(4)) < whole


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pareto_front([[0.0, 1.0], [np.nan, 0.0]]), "points must be finite, got nan in row 1, column 0"),
        (lambda: pareto_front([[0.0, np.inf]]), "points must be finite, got inf in row 0, column 1"),
        (lambda: pareto_front([1.0, 2.0]), "points must have shape (n, d), d at least 1, got (2,)"),
        (lambda: pareto_front(np.empty((3, 0))), "points must have shape (n, d), d at least 1, got (3, 0)"),
        (lambda: hypervolume([[1.0, 2.0]], [0.0]), "reference must have one level for each of the 2 values, got (1,)"),
        (lambda: hypervolume([[1.0, 2.0]], [0.0, np.nan]), "reference must be finite, got nan"),
    ],
)
def test_bad_points_are_one_clear_line(call, says):
    with pytest.raises(UserError) as error:
        call()
    assert str(error.value) == says


def test_points_must_be_numbers():
    with pytest.raises(TypeError, match="points must be an array of numbers"):
        pareto_front([["a", "b"]])
