import inspect

import numpy as np
import pytest

from fastalign import soup
from fastalign._base.former import renamed
from fastalign.palette import feasible_region
from fastalign.report.study import study


def test_a_former_name_is_accepted_and_not_shown():
    @renamed(old="new")
    def function(a, *, new=1):
        return a, new

    assert function(0, old=2) == function(0, new=2) == (0, 2) and function(0) == (0, 1)
    assert "old" not in inspect.signature(function).parameters
    with pytest.raises(TypeError, match="old is the former name of new: give one of them"):
        function(0, old=1, new=2)


def test_former_names_of_the_public_functions():
    grid = np.random.default_rng(0).normal(size=(3, 8, 2)).astype(np.float32)
    flat = grid.reshape(-1, 2)
    former, today = feasible_region(flat, n_lambda=5, l1_max=1.0, seed=0), feasible_region(flat, 5, 1.0, 0)
    np.testing.assert_array_equal(former.policies.lam, today.policies.lam)
    assert len(study(["a", "b"], grid, n_lambda=7).region.policies.lam) == 7
    for name in ("merge", "execute", "apply_adapters", "extract_adapter", "merge_adapters", "walk"):
        function = getattr(soup, name)
        assert "show_progress" in inspect.signature(function).parameters
        with pytest.raises(TypeError, match="progress is the former name of show_progress"):
            function(progress=True, show_progress=True)
