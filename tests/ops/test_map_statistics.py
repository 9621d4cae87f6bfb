import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from turns import on_its_day

from fastalign import UserError, reference, use_backend
from fastalign.ops import MapStatistics, map_statistics
from fastalign.ops.map_statistics import statistics_op

FIELDS = MapStatistics._fields
NEG_INF = float("-inf")


def problem(n, m, dtype=torch.float64, count=None, seed=0, weighted=False, groups=0):
    rng = np.random.default_rng(seed)
    rewards = torch.tensor(rng.normal(size=(n, m))).to(dtype)
    lam = torch.tensor(rng.normal(size=m if count is None else (count, m)))
    options = {"center": torch.tensor(rng.normal(size=m))}
    ids = rng.integers(-3, groups - 3, n) if groups else np.zeros(n, int)
    if groups:
        options["groups"] = torch.tensor(ids)
    if weighted:
        log_weights = np.log(rng.random(n) + 1e-3)
        out = rng.random(n) < 0.3
        out[np.unique(ids, return_index=True)[1]] = False  # every group keeps a row
        options["log_weights"] = torch.tensor(np.where(out, NEG_INF, log_weights))
    return rewards, lam, options


def by_definition(rewards, lam, center=None, log_weights=None, groups=None):
    """The definition once more, row by row in numpy."""
    x = rewards.double().numpy() - (0 if center is None else center.numpy())
    w = np.ones(len(x)) if log_weights is None else np.exp(log_weights.numpy())
    ids = np.zeros(len(x)) if groups is None else groups.numpy()
    rows = []
    for one in np.atleast_2d(lam.numpy()):
        each = []
        for g in np.unique(ids):
            part, weight = x[ids == g], w[ids == g]
            s = part @ one
            tilted = weight * np.exp(s)
            p = tilted / tilted.sum()
            mean = p @ part
            cov = sum(q * np.outer(r - mean, r - mean) for q, r in zip(p, part, strict=True))
            each.append((np.log(tilted.sum() / weight.sum()), mean, cov, 1 / (p @ p), s[weight > 0].max()))
        rows.append([np.mean([e[i] for e in each], axis=0) for i in range(5)])
    stacked = [np.array([row[i] for row in rows]) for i in range(5)]
    return MapStatistics(*(torch.tensor(a if lam.ndim == 2 else a[0]) for a in stacked))


def assert_same(found, expected, tolerance=1e-11):
    for name in FIELDS:
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.dtype == torch.float64
        torch.testing.assert_close(
            ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("groups", [0, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (9, 2), (261, 3), (100, 4), (70, 7), (40, 17)], ids=str)
def test_equals_the_definition(each_backend, shape, dtype, groups, weighted, count):
    rewards, lam, options = problem(*shape, dtype, count, weighted=weighted, groups=groups)
    assert_same(map_statistics(rewards, lam, **options), by_definition(rewards, lam, **options))


@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 40), st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_engine_equals_reference(n, m, groups, weighted, wide, seed):
    dtype = torch.float64 if wide else torch.float32
    rewards, lam, options = problem(n, m, dtype, 2, seed, weighted, groups)
    with use_backend("cpu"):
        result = map_statistics(rewards, lam, **options)
    assert_same(result, MapStatistics(**reference.map_statistics(rewards, lam, **options)))


def test_many_chunks_many_values_and_many_lambdas():
    """Past one chunk of rows, past the columns that fit in L1, past the λ of one read."""
    rewards, lam, options = problem(9001, 3, torch.float32, 5)
    assert_same(
        map_statistics(rewards, lam, **options), MapStatistics(**reference.map_statistics(rewards, lam, **options))
    )
    rewards, lam, options = problem(131, 64, torch.float32, 200)
    lam *= 0.1
    assert_same(
        map_statistics(rewards, lam, **options), MapStatistics(**reference.map_statistics(rewards, lam, **options))
    )


@pytest.mark.slow_matrix
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("groups", [0, 5])
@pytest.mark.parametrize("shape", [(1, 3, 1), (35, 3, 3), (9, 9, 2)], ids=str)
def test_many_programs_blocks_and_lambdas(monkeypatch, shape, groups, weighted):
    """The Triton kernels in the interpreter: rows, λ and second moments shared out among programs."""
    kernel = pytest.importorskip("fastalign.kernels.map_statistics")
    for name, size in {"ROWS": 8, "PROGRAMS": 3, "LAMBDAS": 2, "MOST_SUMS": 128, "SUMS": 128, "MOST_LANES": 8}.items():
        monkeypatch.setattr(kernel, name, size)
    n, m, count = shape
    rewards, lam, options = problem(n, m, torch.float32, count, weighted=weighted, groups=groups)
    options["groups"] = torch.arange(n) if groups and n == 35 else options.get("groups")  # more groups than programs
    if n == 35 and groups:
        options.pop("log_weights", None)
    with use_backend("triton"):
        result = map_statistics(rewards, lam, **options)
        assert_same(map_statistics(rewards.T.contiguous().T, lam, **options), result, 1e-14)
    assert_same(result, MapStatistics(**reference.map_statistics(rewards, lam, **options)))


def test_a_group_without_weight_is_nan_where_nobody_waits():
    """A GPU cannot raise without the host waiting for it."""
    pytest.importorskip("triton")
    log_weights = torch.tensor([0.0, 0.0, NEG_INF, NEG_INF, 0.0])
    for groups in (None, torch.tensor([0, 0, 1, 1, 2])):
        with use_backend("triton"):
            result = map_statistics(
                R, LAM, log_weights=log_weights - (0 if groups is not None else np.inf), groups=groups
            )
        assert result.log_z.isnan() and result.mean.isnan().all() and result.cov.isnan().all()


def test_the_mean_is_the_gradient_and_the_covariance_the_hessian(each_backend):
    rewards, lam, options = problem(50, 4, groups=5)
    log_z = lambda x: reference.map_statistics(rewards, x, **options)["log_z"]  # noqa: E731
    result = map_statistics(rewards, lam, **options)
    torch.testing.assert_close(result.mean, torch.func.grad(log_z)(lam), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.cov, torch.func.hessian(log_z)(lam), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [0, 700])
def test_same_bits_at_any_number_of_threads(groups):
    rewards, lam, options = problem(30_000, 6, torch.float32, 2, groups=groups)
    before = torch.get_num_threads()
    try:
        result = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            result.append(map_statistics(rewards, lam, **options))
    finally:
        torch.set_num_threads(before)
    for other in result[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result[0], other, strict=True))


@on_its_day("levels: palettes")
def test_every_instruction_set():
    from fastalign import _C

    code = (
        "import torch; from fastalign import reference; from fastalign.ops import map_statistics; "
        "torch.manual_seed(0)\n"
        "for m in (1, 3, 6, 11):\n"
        "    r = torch.randn(5001, m); lam = torch.randn(2, m, dtype=torch.float64); g = torch.randint(0, 90, "
        "(5001,))\n"
        "    for groups in (None, g):\n"
        "        want = reference.map_statistics(r, lam, None, None, groups)\n"
        "        for name, x in map_statistics(r, lam, groups=groups)._asdict().items():\n"
        "            torch.testing.assert_close(x, want[name], rtol=1e-11, atol=1e-11)\n"
        "from fastalign import _C; print(_C.active_isa())"
    )
    for isa in _C.available_isas():
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "FASTALIGN_ISA": isa}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == isa


def test_strided_rows_are_read_in_place(each_backend):
    wide = torch.randn(100, 12)
    lam = torch.tensor([0.3, -0.2, 0.5])
    for view in (wide[:, 2:5], wide[::3, :3], wide[:, ::4], wide.T[:3].T):
        assert_same(map_statistics(view, lam), map_statistics(view.contiguous(), lam), 1e-15)


def test_huge_scores_do_not_overflow(each_backend):
    rewards = torch.tensor([[1.0], [0.5], [-1.0]])
    result = map_statistics(rewards, torch.tensor([1e6]))
    assert result.log_z.item() == pytest.approx(1e6 - np.log(3), rel=1e-15)
    assert result.mean.item() == 1 and result.ess.item() == 1 and result.cov.item() == 0
    assert map_statistics(rewards, torch.tensor([-1e6])).mean.item() == -1


def test_late_maximum_rescales_what_was_summed(each_backend):
    rewards = torch.linspace(0, 1, 5000, dtype=torch.float64).unsqueeze(1)
    up = map_statistics(rewards, torch.tensor([2000.0]))
    assert_same(map_statistics(rewards.flip(0).contiguous(), torch.tensor([2000.0])), up, 1e-12)
    assert up.mean.item() == pytest.approx(by_definition(rewards, torch.tensor([700.0])).mean.item(), abs=2e-3)


def test_rows_without_weight_count_for_nothing(each_backend):
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [50.0, 50.0]], dtype=torch.float64)
    lam = torch.tensor([0.7, 0.1])
    log_weights = torch.tensor([0.2, -0.1, NEG_INF])
    result = map_statistics(rewards, lam, log_weights=log_weights)
    assert_same(result, map_statistics(rewards[:2], lam, log_weights=log_weights[:2]), 1e-14)
    assert result.max_score.item() == pytest.approx(0.7)


def test_nan_gives_nan(each_backend):
    rewards = torch.randn(40, 3)
    rewards[17, 1] = float("nan")
    result = map_statistics(rewards, torch.zeros(3))
    assert result.log_z.isnan() and result.mean[1].isnan() and result.max_score.isnan()
    groups = torch.arange(40) // 10
    assert map_statistics(rewards, torch.zeros(3), groups=groups).mean.isnan().any()


def test_registered_op_and_fake():
    rewards, lam, options = problem(20, 3, groups=4)
    arguments = (rewards, lam, options["center"], None, options["groups"])
    torch.library.opcheck(statistics_op, arguments, test_utils=("test_schema", "test_faketensor"))
    assert not map_statistics(rewards.requires_grad_(), lam).log_z.requires_grad


R, LAM = torch.zeros(5, 2), torch.zeros(2)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((np.zeros((5, 2)), LAM), {}, TypeError, "rewards must be a torch.Tensor, got ndarray"),
        ((R.half(), LAM), {}, TypeError, "rewards must be float32 or float64, got torch.float16"),
        ((R[0], LAM), {}, UserError, r"rewards must have shape \(n, m\).*got \(2,\)"),
        ((R[:0], LAM), {}, UserError, r"n, m >= 1, got \(0, 2\)"),
        ((R, torch.zeros(3)), {}, UserError, r"lam must have shape \(2,\) or \(K, 2\), got \(3,\)"),
        ((R, torch.zeros(0, 2)), {}, UserError, r"lam must have shape .*got \(0, 2\)"),
        ((R, LAM), {"center": torch.zeros(1)}, UserError, r"center must have shape \(2,\), got \(1,\)"),
        ((R, LAM), {"log_weights": torch.zeros(4)}, UserError, r"log_weights must have shape \(5,\), got \(4,\)"),
        ((R, LAM), {"log_weights": torch.full((5,), NEG_INF)}, UserError,
         "weights must be positive in at least one row"),
        ((R, LAM), {"log_weights": torch.full((5,), float("nan"))}, UserError, "log_weights must be below infinity"),
        ((R, LAM), {"groups": torch.zeros(5)}, TypeError, "groups must be integers, got torch.float32"),
        ((R, LAM), {"groups": torch.zeros(6, dtype=torch.int64)}, UserError,
         r"groups must have shape \(5,\), got \(6,\)"),
    ],
)  # fmt: skip
def test_mistakes_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        map_statistics(*arguments, **options)


def test_a_group_without_weight_is_named():
    log_weights = torch.tensor([0.0, 0.0, NEG_INF, NEG_INF, 0.0])
    with pytest.raises(UserError, match="in every group"):
        map_statistics(R, LAM, log_weights=log_weights, groups=torch.tensor([0, 0, 1, 1, 2]))
