import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from turns import on_its_day

import fastalign.backend
from fastalign import UserError, kernels, reference, use_backend
from fastalign.ops import resample, sample_tokens
from fastalign.ops.resample import resample_op
from fastalign.reference import RESAMPLE_METHODS as METHODS

NEG_INF, INF, NAN = float("-inf"), float("inf"), float("nan")
WITH_REPLACEMENT = METHODS[:4]
LOWER_VARIANCE = METHODS[1:4]
WITHOUT = METHODS[4:]


BACKENDS = ["cpu", *["triton"] * ("resample" in kernels.names() and fastalign.backend.interpreted())]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes as long for a small block as for one of thousands."""
    if "triton" in BACKENDS:
        monkeypatch.setattr("fastalign.kernels.resample.DRAWS", 4096)
        monkeypatch.setattr("fastalign.kernels.resample.TILE", 1 << 16)


def assert_same(log_weights, k, backend="cpu", **options):
    with use_backend(backend):
        ours = resample(log_weights, k, **options)
    with use_backend("reference"):
        theirs = resample(log_weights, k, **options)
    assert torch.equal(ours, theirs)
    return ours


def counts(ids, n):
    """(P, k) indices -> how often each of n candidates was drawn, (P, n)."""
    return torch.zeros(len(ids), n, dtype=torch.int64).scatter_add(1, ids, torch.ones_like(ids))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_engine_draws_what_the_reference_draws(dtype, method):
    generator = torch.Generator().manual_seed(0)
    for prompts, n in ((1, 1), (6, 2), (6, 63), (6, 65), (5, 1000), (5, 3001)):
        for scale in (0.0, 1.0, 10.0, 1e30):
            x = (torch.randn(prompts, n, generator=generator, dtype=torch.float64) * scale).to(dtype)
            if prompts > 1:
                x[1, 0], x[2, n // 2], x[4, n - 1] = NEG_INF, NAN, INF
                x[3] = NEG_INF
            masks = [None, torch.rand(prompts, n, generator=generator) > 0.3]
            for mask, k in itertools.product(masks, (1, 5, 200)):
                ids = assert_same(x, k, method=method, mask=mask, seed=3)
                assert ids.shape == (prompts, k) and ids.dtype == torch.int64
                valid = x > NEG_INF if mask is None else (x > NEG_INF) & mask
                assert valid.gather(1, ids.clamp_min(0))[ids >= 0].all()
                if mask is None and prompts > 1:
                    assert (ids[2:5] == -1).all()
                if method in WITH_REPLACEMENT:
                    assert ((ids == -1).all(1) | (ids >= 0).all(1)).all()


@pytest.mark.slow_matrix
@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton kernel")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_tiles_and_sums_draw_what_the_reference_draws(monkeypatch, dtype, method):
    """Blocks as small as they can be: tiles in several rounds, sums in several reads, odd tails of each."""
    from fastalign.kernels import resample as kernel

    monkeypatch.setattr(kernel, "TILE", 128)
    monkeypatch.setattr(kernel, "WIDTH", 2)
    generator = torch.Generator().manual_seed(5)
    for n, k, masked in ((1, 1, False), (129, 1, True), (700, 3, False), (700, 300, True)):
        x = torch.randn(5, n, generator=generator, dtype=torch.float64).to(dtype) * 4
        if n > 2:
            x[0, n // 3 : n // 2] = NEG_INF  # whole blocks of nothing
            x[1, 0], x[2, n // 2], x[4, n - 1] = NEG_INF, NAN, INF
            x[3] = x[3].round()  # ties
        mask = torch.rand(5, n, generator=generator) > 0.3 if masked else None
        monkeypatch.setattr(kernel, "DRAWS", 256 if k > 3 else 2)
        assert_same(x, k, "triton", method=method, mask=mask, seed=2**63 + 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_weights_and_masks_are_read_in_place(backend):
    base, mask = torch.randn(3, 3, 200), torch.rand(200, 3) > 0.5
    for view in (base[:, 1], base[:, 2, ::2], base[:, 0, 7:], base[0, :, :9].T, base[:1, 0].expand(3, -1)):
        for method in METHODS:
            ids = assert_same(view, 6, backend, method=method, seed=0)
            assert torch.equal(ids, resample(view.contiguous(), 6, method=method, seed=0))
    a = assert_same(base[:, 1], 4, backend, mask=mask.T, seed=0)
    assert torch.equal(a, resample(base[:, 1], 4, mask=mask.T.contiguous(), seed=0))


@pytest.mark.not_interpreted
@pytest.mark.parametrize("method", WITH_REPLACEMENT)
@pytest.mark.parametrize("k", [1, 7])
def test_expected_counts(each_backend, method, k):
    torch.manual_seed(0)
    n, runs = 12, 8000
    log_weights = torch.randn(1, n) * 1.5
    probs = log_weights.double().softmax(-1)[0]
    result = counts(resample(log_weights.expand(runs, -1), k, method=method, seed=1), n).double()
    assert (result.sum(1) == k).all()
    error = result.var(0).div(runs).sqrt() + 1e-12  # 0 where residual and its kin always draw the same number
    assert ((result.mean(0) - k * probs).abs() <= 5 * error + 1e-9).all()
    if k == 1 or method == "multinomial":
        assert chisquare(result.sum(0).tolist(), (probs * k * runs).tolist()).pvalue > 1e-4


@pytest.mark.not_interpreted
@pytest.mark.parametrize("method", LOWER_VARIANCE)
def test_variance_is_below_the_multinomials(each_backend, method):
    """Stratified and residual counts have no larger variance in theory (arXiv cs/0507025, section 3), systematic
    here."""
    torch.manual_seed(1)
    log_weights = torch.randn(1, 20)
    spread = {
        name: counts(resample(log_weights.expand(4000, -1), 20, method=name, seed=2), 20).double().var(0).sum()
        for name in ("multinomial", method)
    }
    assert spread[method] < 0.7 * spread["multinomial"]


@pytest.mark.parametrize("method", LOWER_VARIANCE)
def test_whole_shares_are_drawn_exactly(each_backend, method):
    """k times each probability is an integer: systematic and residual then draw just that many, stratified too."""
    shares = torch.tensor([3, 1, 0, 4, 2, 0, 5, 0, 0, 1])
    log_weights = (shares.double() / 16).log().expand(40, -1)
    ids = resample(log_weights, 16, method=method, seed=5)
    assert (counts(ids, 10) == shares).all()


@pytest.mark.not_interpreted
def test_residual_copies_each_share_then_draws_the_rest(each_backend):
    probs = torch.tensor([0.55, 0.25, 0.15, 0.05])
    ids = resample(probs.log().expand(6000, -1), 10, method="residual", seed=4)
    assert (ids[:, :8] == torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])).all()
    rest = torch.bincount(ids[:, 8:].flatten(), minlength=4)
    assert chisquare(rest.tolist(), (torch.tensor([0.25, 0.25, 0.25, 0.25]) * 12000).tolist()).pvalue > 1e-4


def test_systematic_and_stratified_take_one_from_each_part(each_backend):
    n = k = 50
    flat = torch.zeros(20, n)
    for method in ("systematic", "stratified"):
        assert (resample(flat, k, method=method, seed=0) == torch.arange(n)).all()
    two = resample(torch.zeros(40, 100), 2, method="systematic", seed=0)
    assert (two[:, 1] == two[:, 0] + 50).all()  # one number for all parts
    own = resample(torch.zeros(40, 100), 2, method="stratified", seed=0)
    assert (own[:, 0] < 50).all() and (own[:, 1] >= 50).all() and len((own[:, 1] - own[:, 0]).unique()) > 20


@pytest.mark.not_interpreted
def test_multinomial_draws_are_independent(each_backend):
    pairs = resample(torch.zeros(8000, 6), 2, seed=0)
    assert chisquare(torch.bincount(pairs[:, 0] * 6 + pairs[:, 1], minlength=36).tolist()).pvalue > 1e-4
    neighbours = pairs[:-1, 0] * 6 + pairs[1:, 0]
    assert chisquare(torch.bincount(neighbours, minlength=36).tolist()).pvalue > 1e-4


@pytest.mark.not_interpreted
def test_a_seed_shared_with_sample_tokens_gives_other_numbers(each_backend):
    flat = torch.zeros(8000, 6)
    pairs = sample_tokens(flat, seed=3).ids * 6 + resample(flat, seed=3)[:, 0]
    assert chisquare(torch.bincount(pairs, minlength=36).tolist()).pvalue > 1e-4


@pytest.mark.not_interpreted
def test_gumbel_top_k_is_sequential_sampling_without_replacement(each_backend):
    """P(ordered draw i, j, ..) = p_i p_j / (1 - p_i) .. (arXiv 1903.06059, eq. 5), all 60 outcomes enumerated."""
    torch.manual_seed(2)
    log_weights = torch.randn(1, 5)
    p = log_weights.double().softmax(-1)[0].tolist()
    runs = 40_000
    ids = resample(log_weights.expand(runs, -1), 3, method="gumbel_top_k", seed=6)
    observed, expected = [], []
    for a, b, c in itertools.permutations(range(5), 3):
        observed.append(int((ids == torch.tensor([a, b, c])).all(1).sum()))
        expected.append(runs * p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b]))
    assert sum(observed) == runs
    assert chisquare(observed, expected).pvalue > 1e-4


@pytest.mark.parametrize("method", WITHOUT)
def test_without_replacement_no_index_comes_twice(each_backend, method):
    torch.manual_seed(0)
    x = torch.randn(6, 3000)
    for k in (1, 50, 3000):
        ids = resample(x, k, method=method, seed=1)
        assert all(len(row.unique()) == k for row in ids)


def test_best_is_a_stable_sort(each_backend):
    x = torch.randint(0, 300, (10, 4000), generator=torch.Generator().manual_seed(0)).float()
    for k in (1, 7, 1500, 4000):
        assert torch.equal(
            resample(x, k, method="best", seed=0), x.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        )
    x = torch.arange(2000.0)[None].flip(1)
    x[0, 1500] = 1e30  # all differ from it by as much in double
    assert resample(x, 4, method="best", seed=0).tolist() == [[1500, 0, 1, 2]]
    assert resample(x.flip(1), 4, method="best", seed=0).tolist() == [[499, 0, 1, 2]]


@pytest.mark.parametrize("method", METHODS)
def test_places_that_cannot_be_filled(each_backend, method):
    x = torch.tensor([[1.0, NEG_INF, 2.0, 5.0], [NEG_INF] * 4, [NAN, 0.0, 0.0, 0.0], [INF, 0.0, 0.0, 0.0], [0.0] * 4])
    mask = torch.tensor([[True, True, True, False]] * 4 + [[False] * 4])
    ids = resample(x, 6, method=method, mask=mask, seed=0)
    assert (ids[1:] == -1).all()
    if method in WITHOUT:
        assert sorted(ids[0, :2].tolist()) == [0, 2] and (ids[0, 2:] == -1).all()
    else:
        assert set(ids[0].tolist()) == {0, 2}
    hidden = torch.tensor([[NAN, INF, 0.0]])  # what the mask hides does not count
    assert resample(hidden, 1, method=method, mask=torch.tensor([[False, False, True]]), seed=0).item() == 2


@pytest.mark.slow_matrix
@pytest.mark.parametrize("method", METHODS)
def test_the_scale_of_the_weights_does_not_matter(each_backend, method):
    x = torch.randn(10, 40, dtype=torch.float64)
    ids = resample(x, 5, method=method, seed=1)
    assert torch.equal(resample(x + 700.0, 5, method=method, seed=1), ids)
    assert torch.equal(resample(x - 5000.0, 5, method=method, seed=1), ids)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "n", "k"), [(30, 2000, 9), (1, 40_000, 1), (1, 40_000, 700)])
def test_threads_do_not_matter(method, rows, n, k):
    """Rows are shared out or, where there are few and long ones, the parts of a row."""
    generator = torch.Generator().manual_seed(0)
    x, mask = torch.randn(rows, n, generator=generator), torch.rand(rows, n, generator=generator) > 0.1
    x[:, ::7] = 1.5  # ties
    before = torch.get_num_threads()
    result = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            result.append(resample(x, k, method=method, mask=mask, seed=2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(result[0], result[1]) and torch.equal(result[0], result[2])
    assert torch.equal(result[0], assert_same(x, k, method=method, mask=mask, seed=2))


def test_a_long_row(each_backend):
    n = 1_000_000
    x = torch.zeros(1, n)
    for method in WITH_REPLACEMENT:
        share = resample(x, 10_000, method=method, seed=0).double().mean() / n
        assert share.item() == pytest.approx(0.5, abs=5 / math.sqrt(12 * 10_000))


LEVELS = """
import torch, fastalign.backend
from fastalign.ops import resample
from fastalign.reference import RESAMPLE_METHODS as METHODS
torch.manual_seed(0)
x = torch.randn(8, 1500, dtype=torch.float64) * 3
out = []
for x in (x.float(), x):
    for method in METHODS:
        out += resample(x, 9, method=method, seed=1).flatten().tolist()
print(fastalign.backend.native.active_isa(), *out)
"""


@on_its_day("levels: draws")
@pytest.mark.skipif(fastalign.backend.native is None, reason="the native extension is not built")
def test_every_instruction_set_draws_the_same():
    rows = {}
    for isa in fastalign.backend.native.available_isas():
        done = subprocess.run(
            [sys.executable, "-c", LEVELS], env=os.environ | {"FASTALIGN_ISA": isa}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        name, *ids = done.stdout.split()
        assert name == isa and len(ids) == 2 * 6 * 8 * 9
        rows[isa] = ids
    assert all(row == rows["baseline"] for row in rows.values())


value = st.sampled_from([NEG_INF, 0.0, 1.0, -1.0, 1e30, -1e30, 3e38, -3e38, 700.0, -745.0, 1e-38])


@given(
    st.integers(1, 70).flatmap(lambda n: st.lists(st.lists(value, min_size=n, max_size=n), min_size=1, max_size=3)),
    st.integers(1, 80),
    st.sampled_from(METHODS),
    st.integers(0, 2**64 - 1),
    st.sampled_from(BACKENDS),
)
def test_edge_values(values, k, method, seed, backend):
    x = torch.tensor(values)
    ids = assert_same(x, k, backend, method=method, seed=seed)
    for row, drawn in zip(x, ids, strict=True):
        possible = int((row > NEG_INF).sum())
        filled = min(possible, k) if method in WITHOUT else (k if possible else 0)
        assert (drawn[:filled] >= 0).all() and (drawn[filled:] == -1).all()
        assert (row[drawn[:filled]] > NEG_INF).all()


def test_no_prompts(each_backend):
    assert resample(torch.zeros(0, 4), 3, seed=0).shape == (0, 3)


def test_the_op_is_registered_soundly(each_backend):
    x = torch.randn(3, 40, requires_grad=True)
    assert not resample(x, 2, seed=0).requires_grad
    compiled = torch.compile(lambda x: resample(x, 2, seed=0), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), resample(x, 2, seed=0))
    torch.library.opcheck(resample_op, (x.detach(), 4, 0, torch.rand(3, 40) > 0.5, -3))


def test_uniform_numbers_are_inside_the_interval():
    u = reference.uniform(0, torch.arange(100_000), torch.tensor(0))
    assert u.min() > 0 and u.max() < 1
    assert chisquare(torch.histc(u, 50, 0, 1).tolist()).pvalue > 1e-4


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"log_weights": [[0.0]]}, TypeError, "log_weights must be a torch.Tensor, got list"),
        (
            {"log_weights": torch.zeros(2, 3).half()},
            TypeError,
            "log_weights must be float32 or float64, got torch.float16",
        ),
        ({"log_weights": torch.zeros(3)}, UserError, r"log_weights must have shape \(P, N\) with N >= 1, got \(3,\)"),
        ({"log_weights": torch.zeros(2, 0)}, UserError, r"N >= 1, got \(2, 0\)"),
        ({"k": 0}, UserError, "k must be an integer, at least 1, got 0"),
        ({"k": 1.0}, UserError, r"k must be an integer, at least 1, got 1\.0"),
        ({"method": "bootstrap"}, UserError, "method must be one of multinomial, .*, best, got 'bootstrap'"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be a bool tensor, got torch.float32"),
        (
            {"mask": torch.ones(3, 2, dtype=torch.bool)},
            UserError,
            r"mask.shape must equal .* got \(3, 2\) and \(2, 3\)",
        ),
        ({"seed": 2**64}, UserError, r"seed must be an integer in \[0, 2\^64\), got 18446744073709551616"),
        ({"seed": None}, UserError, "seed must be .* got None"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_says_what_came(each_backend, change, error, message):
    good = {"log_weights": torch.zeros(2, 3), "seed": 0}
    with pytest.raises(error, match=message):
        resample(**(good | change))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flushing_denormals_changes_nothing(method, k, dtype):
    """As torch.set_flush_denormal does it, in the thread that calls alone."""
    log_weights = torch.randn(40, 9, dtype=dtype)
    log_weights[1], log_weights[2, 1:], log_weights[3] = 0, NEG_INF, NEG_INF  # ties; one weight; none
    log_weights[4] = -torch.arange(9, dtype=dtype) * 200  # weights too small for a normal number
    log_weights[5] = torch.finfo(dtype).tiny
    mask = torch.rand(40, 9) < 0.7
    for valid in (None, mask):
        expected = resample(log_weights, k, method=method, mask=valid, seed=1)
        try:
            assert torch.set_flush_denormal(True)
            result = resample(log_weights, k, method=method, mask=valid, seed=1)
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(result, expected)


@pytest.mark.skipif(fastalign.backend.native is None, reason="the native extension is not built")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_best_of_denormals(backend):
    """Differences no normal number holds: with denormals they order, without they are ties, and never is there none."""
    x = torch.tensor([[3e-320, 5e-320, 5e-320, 0.0]], dtype=torch.float64)
    with use_backend(backend):
        assert resample(x, 1, method="best", seed=0).item() == 1
        try:
            torch.set_flush_denormal(True)
            assert resample(x, 1, method="best", seed=0).item() in (0, 1)
        finally:
            torch.set_flush_denormal(False)
