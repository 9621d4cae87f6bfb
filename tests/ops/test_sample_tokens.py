import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from turns import on_its_day

import fastalign.backend
from fastalign import UserError, kernels, reference, use_backend
from fastalign.ops import sample_tokens
from fastalign.ops.sample_tokens import sample_op

NEG_INF, INF, NAN = float("-inf"), float("inf"), float("nan")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"top_k": 5},
    {"top_k": 700},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"top_p": 0.3, "temperature": 2.0},
    {"min_p": 0.1},
    {"top_k": 200, "top_p": 0.8},
    {"top_k": 50, "top_p": 0.95, "min_p": 0.05, "temperature": 1.3},
]


BACKENDS = ["cpu", *["triton"] * ("sample_tokens" in kernels.names() and fastalign.backend.interpreted())]


@pytest.fixture(autouse=True)
def few_passes(monkeypatch):
    """The interpreter takes as long to try eight borders as to try a hundred."""
    if "triton" in BACKENDS:
        monkeypatch.setattr("fastalign.kernels.sample_tokens.DIGITS", 128)


def both(logits, backend="cpu", **options):
    with use_backend(backend):
        ours = sample_tokens(logits, **options)
    with use_backend("reference"):
        theirs = sample_tokens(logits, **options)
    return ours, theirs


def assert_same(logits, backend="cpu", **options):
    ours, theirs = both(logits, backend, **options)
    assert torch.equal(ours.ids, theirs.ids)
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-5, atol=1e-5, equal_nan=True)
    return ours


def warped(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The logits after transformers' own warpers, -inf where dropped."""
    warpers = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        logits = warper(None, logits)
    return logits


# From Random123's kat_vectors (philox4x32, 10 rounds): key, counter's two halves, the four words.
KNOWN = [
    (0, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (-1, -1, -1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (0x299F31D0A4093822, 0x85A308D3243F6A88 - 2**64, 0x0370734413198A2E, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("seed, row, offset, words", KNOWN)
def test_philox_gives_the_published_answers(seed, row, offset, words):
    result = reference.philox(seed, torch.tensor(row), torch.tensor(offset))
    assert result.tolist() == [int(word, 16) for word in words.split()]


@pytest.mark.parametrize("seed, row, offset, words", [known for known in KNOWN if known[2] >= 0])
def test_draws_follow_the_published_answers(each_backend, seed, row, offset, words):
    """Of 2^16 equally likely tokens the one drawn is the first 16 bits of the generator's first word."""
    result = sample_tokens(torch.zeros(1, 2**16), seed=seed, offset=offset, rows=torch.tensor([row]))
    assert result.ids.item() == int(words[:4], 16)
    assert result.log_probs.item() == pytest.approx(-16 * math.log(2))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_engine_draws_what_the_reference_draws(dtype, options):
    generator = torch.Generator().manual_seed(0)
    for vocab in (1, 2, 17, 64, 1023, 1025, 5003):
        for scale in (0.0, 0.01, 3.0, 40.0):
            logits = (torch.randn(24, vocab, generator=generator, dtype=torch.float64) * scale).to(dtype)
            logits[3, vocab // 2] = NAN
            logits[4] = NEG_INF
            logits[5, 0] = INF
            logits[6, vocab // 2 :] = NEG_INF
            result = assert_same(logits, seed=7, offset=2, **options)
            assert result.log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert result.ids[[3, 4, 5]].tolist() == [-1] * 3 and result.log_probs[[3, 4, 5]].isnan().all()
            assert ((result.ids[7:] >= 0) & (result.ids[7:] < vocab)).all()
            assert not result.log_probs[7:].isnan().any() and (result.log_probs[7:] <= 1e-5).all()


@pytest.mark.slow_matrix
@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton kernel")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tiles_and_groups_draw_what_the_reference_draws(monkeypatch, dtype, options):
    """Blocks as small as they can be: several tiles, blocks of groups and of group maxima, odd tails of each."""
    monkeypatch.setattr("fastalign.kernels.sample_tokens.TILE", 128)
    monkeypatch.setattr("fastalign.kernels.sample_tokens.GROUP", 16)
    monkeypatch.setattr("fastalign.kernels.sample_tokens.BLOCK", 128 if dtype == torch.float64 else 64)
    generator = torch.Generator().manual_seed(1)
    for vocab, rows in ((33, None), (400, torch.tensor([3, 2**40, 0, -5, 7, 9]))):
        logits = (torch.randn(6, vocab, generator=generator, dtype=torch.float64) * 3).to(dtype)
        logits[0] = logits[0].round()  # ties
        logits[1, vocab // 2 :] = NEG_INF
        logits[2] = NEG_INF
        logits[3, vocab // 2], logits[4, 0] = NAN, INF
        result = assert_same(logits, "triton", seed=2**63 + 7, offset=2**31 + 2, rows=rows, **options)
        assert result.ids[[2, 3, 4]].tolist() == [-1] * 3 and result.log_probs[[2, 3, 4]].isnan().all()


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton kernel")
@pytest.mark.parametrize("options", [{}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.8}], ids=str)
def test_few_candidates_a_pass_find_the_same_border(monkeypatch, options):
    monkeypatch.setattr("fastalign.kernels.sample_tokens.DIGITS", 8)
    for scale in (0.01, 3.0, 40.0):
        assert_same(torch.randn(2, 5003) * scale, "triton", seed=1, **options)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton kernel")
def test_triton_reads_strided_logits_in_place():
    base = torch.randn(3, 2, 150)
    for view in (base[:, 1], base[:, 1, 5:100], base[:, 0, ::2], base[0, :, :4].T, base[:1, 0].expand(3, -1)):
        for options in ({}, {"temperature": 0.0}, OPTIONS[-1]):
            assert_same(view, "triton", seed=1, **options)


def test_minus_zero_ties_with_zero(each_backend):
    logits = torch.tensor([[-0.0, -1.0, 0.0]]).expand(8, -1)
    result = sample_tokens(logits, top_k=1, seed=0)
    assert set(result.ids.tolist()) == {0, 2}
    torch.testing.assert_close(result.log_probs, torch.full((8,), -math.log(2)))
    assert (sample_tokens(logits, top_k=2, top_p=0.5, seed=0).ids == 2).all()


def test_strided_logits_are_read_in_place_and_give_the_same():
    base = torch.randn(6, 4, 333)
    for view in (base[:, -1], base[:, 1, 5:200], base[:, 2, ::2], base[0].T, base[:1, 0].expand(6, -1)):
        for options in OPTIONS:
            result = assert_same(view, seed=1, **options)
            assert torch.equal(result.ids, sample_tokens(view.contiguous(), seed=1, **options).ids)


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("temperature", 1) > 0], ids=str)
def test_survivors_are_those_of_transformers(options):
    torch.manual_seed(3)
    logits = torch.randn(50, 1200, dtype=torch.float64) * 3
    theirs = warped(logits, **options) > NEG_INF
    assert torch.equal(reference.survivors(logits, **options), theirs)
    # The reported log-probability shows the surviving tokens: it contains their total mass.
    truth = warped(logits, **options).log_softmax(-1)
    for offset in range(5):
        result = sample_tokens(logits, seed=0, offset=offset, **options)
        assert theirs.gather(1, result.ids[:, None]).all()
        torch.testing.assert_close(result.log_probs, truth.gather(1, result.ids[:, None])[:, 0], rtol=0, atol=1e-10)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("temperature", 1) > 0], ids=str)
def test_survivors_among_ties(each_backend, options):
    """Few distinct values: top_k keeps all ties, as theirs; of top_p's ties the same number, ours the higher
    indices."""
    torch.manual_seed(4)
    logits = torch.randint(0, 4, (1, 24)).double()
    theirs = warped(logits, **options)
    result = sample_tokens(logits.expand(4000, -1), seed=5, **options)
    kept = torch.zeros(24, dtype=torch.bool)
    kept[result.ids.unique()] = True
    assert kept.sum() == (theirs > NEG_INF).sum()
    scaled = logits[0] / options.get("temperature", 1.0)
    assert torch.equal(scaled[kept].sort().values, theirs[theirs > NEG_INF].sort().values)
    least = scaled[kept].min()
    border = (scaled == least).nonzero().flatten()
    chosen = border[kept[border]]
    assert torch.equal(chosen, border[len(border) - len(chosen) :])


def test_a_mass_that_is_met_exactly_is_enough(each_backend):
    draws = 2 if each_backend == "triton" else 3000  # the interpreter is slow
    for vocab, top_p, kept in ((10, 0.9, 9), (10, 0.1, 1), (4, 0.5, 2), (3, 1 / 3, 1), (1000, 0.123, 123)):
        result = sample_tokens(torch.zeros(draws, vocab), top_p=top_p, seed=0)
        assert result.ids.min() >= vocab - kept and (result.ids.min() == vocab - kept or draws < 3000)
        assert result.log_probs[0].item() == pytest.approx(-math.log(kept), abs=1e-6)


# Probabilities in whole parts, and options whose border they meet to the last digit; what is kept, as parts.
BORDERS = [
    ([3, 1, 1, 5], {"top_p": 0.8}, [3, 5]),  # transformers' own vector (test_top_p_dist_warper)
    ([3, 6, 6, 5], {"top_p": 0.6}, [6, 6]),
    ([5, 2, 1, 1, 1], {"top_p": 0.7}, [5, 2]),
    ([1, 2, 3, 4], {"top_p": 0.7}, [3, 4]),
    ([1] * 10, {"top_p": 0.9}, [1] * 9),
    ([7, 1, 1, 1], {"top_p": 0.7}, [7]),
    ([10, 5, 5, 4, 1], {"min_p": 0.5}, [10, 5, 5]),
    ([8, 2, 2, 1], {"min_p": 0.25}, [8, 2, 2]),
    ([4, 4, 2], {"min_p": 1.0}, [4, 4]),
    ([4, 2, 2, 1], {"top_k": 2}, [4, 2, 2]),  # ties of the k-th stay
    ([8, 4, 4, 2, 2], {"top_k": 2, "top_p": 0.5}, [8]),
    ([20, 10, 10, 5, 5], {"top_p": 0.9, "min_p": 0.25}, [20, 10, 10, 5]),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("parts", "options", "kept"), BORDERS, ids=lambda x: "".join(str(x).split()))
def test_what_meets_a_border_to_its_dtypes_rounding_has_reached_it(each_backend, dtype, parts, options, kept):
    parts = torch.tensor(parts, dtype=torch.float64)
    logits = (parts / parts.sum()).log().to(dtype)[None] + 3
    draws = 2 if each_backend == "triton" else 400
    result = sample_tokens(logits.expand(draws, -1), seed=0, **options)
    expected = (parts[result.ids] / sum(kept)).log()
    torch.testing.assert_close(result.log_probs.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
    if draws > 2:
        assert parts[result.ids.unique()].tolist() == kept
    if dtype == torch.float32:  # its own rounding decides theirs in others, and so does an offset
        probs = (parts / parts.sum()).log().to(dtype)[None]
        assert parts[warped(probs, **options)[0] > NEG_INF].tolist() == kept


@pytest.mark.not_interpreted
@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("temperature", 1) > 0], ids=str)
def test_frequencies(each_backend, options):
    torch.manual_seed(1)
    logits = torch.randn(1, 40) * 1.5
    probs = warped(logits.double(), **options).softmax(-1)[0]
    result = sample_tokens(logits.expand(40_000, -1), seed=11, **options)
    counts = torch.bincount(result.ids, minlength=40).double()
    assert counts[probs == 0].sum() == 0
    probs = probs * len(result.ids)
    large = probs >= 5
    observed, expected = [*counts[large].tolist()], [*probs[large].tolist()]
    if (~large & (probs > 0)).any():
        observed.append(counts[~large].sum().item())
        expected.append(probs[~large].sum().item())
    if len(expected) > 1:
        assert chisquare(observed, expected).pvalue > 1e-4
    assert len(result.ids.unique()) > 1 or len(expected) == 1


def test_frequencies_over_a_large_vocabulary():
    torch.manual_seed(1)
    logits = torch.randn(1, 5000) * 2
    result = sample_tokens(logits.expand(50_000, -1), seed=2)
    bins = logits.double().softmax(-1)[0].view(50, 100).sum(1)
    counts = torch.bincount(result.ids, minlength=5000).view(50, 100).sum(1)
    assert chisquare(counts.tolist(), (bins * 50_000).tolist()).pvalue > 1e-4


@pytest.mark.not_interpreted
def test_rows_and_steps_are_independent_streams(each_backend):
    flat = torch.zeros(300, 16)
    steps = torch.stack([sample_tokens(flat, seed=3, offset=t).ids for t in range(100)])
    table = torch.bincount((steps[:-1] * 16 + steps[1:]).flatten(), minlength=256)
    assert chisquare(table.tolist()).pvalue > 1e-4
    table = torch.bincount((steps[:, :-1] * 16 + steps[:, 1:]).flatten(), minlength=256)
    assert chisquare(table.tolist()).pvalue > 1e-4
    assert not torch.equal(steps[0], sample_tokens(flat, seed=4, offset=0).ids)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_draw_does_not_hang_on_batch_or_threads(each_backend, options):
    torch.manual_seed(2)
    logits = torch.randn(40, 3000)
    rows = torch.randperm(1000)[:40]
    whole = sample_tokens(logits, seed=9, offset=4, rows=rows, **options)
    order = torch.randperm(40)
    parts = [sample_tokens(logits[p], seed=9, offset=4, rows=rows[p], **options) for p in order.split([1, 7, 32])]
    for name in ("ids", "log_probs"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)[order])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            again = sample_tokens(logits, seed=9, offset=4, rows=rows, **options)
            assert torch.equal(again.ids, whole.ids) and torch.equal(again.log_probs, whole.log_probs)
    finally:
        torch.set_num_threads(before)
    default = sample_tokens(logits, seed=9, **options)
    assert torch.equal(default.ids, sample_tokens(logits, seed=9, rows=torch.arange(40), **options).ids)


@pytest.mark.parametrize("options", [{}, {"top_k": 9}], ids=str)
def test_rows_with_steps_of_their_own(each_backend, options):
    torch.manual_seed(3)
    logits, streams = torch.randn(6, 700), torch.randperm(1000)[:6]
    steps = torch.tensor([0, 5, 2, 5, 2**40, 1])
    result = sample_tokens(logits, seed=9, offset=4, rows=torch.stack([streams, steps], 1), **options)
    for i, step in enumerate(steps.tolist()):
        one = sample_tokens(logits[i : i + 1], seed=9, offset=4 + step, rows=streams[i : i + 1], **options)
        assert torch.equal(one.ids[0], result.ids[i]) and torch.equal(one.log_probs[0], result.log_probs[i])


def test_greedy_takes_the_first_of_the_largest(each_backend):
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [NEG_INF, NEG_INF, -5.0, -5.0], [NAN, 1.0, 2.0, 3.0]])
    result = sample_tokens(logits, temperature=0, top_p=0.5, seed=0)
    assert result.ids.tolist() == [1, 2, -1]
    assert result.log_probs[:2].tolist() == [0.0, 0.0] and result.log_probs[2].isnan()


LEVELS = """
import torch, fastalign.backend
from fastalign.ops import sample_tokens
torch.manual_seed(0)
out = []
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    x = (torch.randn(64, 1500, dtype=torch.float64) * 4).to(dtype)
    every = {"top_k": 300, "top_p": 0.8, "min_p": 0.01}
    for options in ({}, {"temperature": 0.0}, {"top_k": 30}, {"top_p": 0.9}, every):
        out += sample_tokens(x, seed=1, **options).ids.tolist()
print(fastalign.backend.native.active_isa(), *out)
"""


@on_its_day("levels: draws")
@pytest.mark.skipif(fastalign.backend.native is None, reason="the native extension is not built")
def test_every_instruction_set_draws_the_same_ids():
    rows = {}
    for isa in fastalign.backend.native.available_isas():
        done = subprocess.run(
            [sys.executable, "-c", LEVELS], env=os.environ | {"FASTALIGN_ISA": isa}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        name, *ids = done.stdout.split()
        assert name == isa and len(ids) == 4 * 5 * 64
        rows[isa] = ids
    assert all(row == rows["baseline"] for row in rows.values())


finite = st.sampled_from([NEG_INF, 0.0, 1.0, -1.0, 2.5, 1e30, -1e30, 3e38, -3e38, 1e-38, 88.0, -104.0])
edge = finite | finite | st.sampled_from([INF, NAN])


@given(
    st.integers(1, 9).flatmap(lambda v: st.lists(st.lists(edge, min_size=v, max_size=v), min_size=1, max_size=4)),
    st.sampled_from([0.0, 1e-40, 1e-3, 1.0, 50.0, 1e300]),
    st.sampled_from([0, 1, 2, 100]),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from([0.0, 1e-30, 0.5, 1.0]),
    st.integers(0, 2**64 - 1),
    st.sampled_from(BACKENDS),
)
def test_edge_values(values, temperature, top_k, top_p, min_p, seed, backend):
    logits = torch.tensor(values)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    ours, theirs = both(logits, backend, seed=seed, **options)
    assert torch.equal(ours.ids, theirs.ids)
    for row, id, log_prob in zip(logits, ours.ids.tolist(), ours.log_probs, strict=True):
        if row.isnan().any() or (row == INF).any() or (row == NEG_INF).all():
            assert id == -1 and log_prob.isnan()
        else:
            assert row[id] > NEG_INF and log_prob <= 1e-6


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32))
def test_top_k_of_any_size_keeps_exactly_the_ties(vocab, k, seed):
    logits = torch.randint(0, 1 + vocab // 2, (1, vocab), generator=torch.Generator().manual_seed(seed)).float()
    result = sample_tokens(logits, temperature=1e4, top_k=k, seed=seed)
    kth = logits.topk(min(k, vocab)).values.min()
    assert logits[0, result.ids[0]] >= kth
    kept = (logits / 1e4).masked_fill(logits < kth, NEG_INF).double().log_softmax(-1)[0, result.ids[0]]
    assert result.log_probs.item() == pytest.approx(kept.item(), abs=2e-5)


@pytest.mark.parametrize("k", [1, 1100, 3000, 4999])
def test_top_k_with_outliers(k):
    """Of a wide range most logits share a bin of the search; of an infinite one there are no bins."""
    torch.manual_seed(0)
    for odd in ([-3.4e38], [1e30, -1e30], [3.4e38, -3.4e38], [NEG_INF]):
        logits = torch.randn(3, 5000)
        logits[:, torch.randperm(5000)[: 40 * len(odd)]] = torch.tensor(odd * 40)
        result = assert_same(logits, top_k=k, seed=1, temperature=3.0)
        kth = logits.topk(k).values[:, -1:]
        truth = (logits.double() / 3).masked_fill(logits < kth, NEG_INF).log_softmax(-1).gather(1, result.ids[:, None])
        torch.testing.assert_close(result.log_probs, truth[:, 0].float(), rtol=1e-5, atol=1e-5)


def test_no_rows(each_backend):
    result = sample_tokens(torch.zeros(0, 5), top_p=0.5, seed=0)
    assert result.ids.shape == result.log_probs.shape == (0,)


def test_it_carries_no_gradient_and_compiles(each_backend):
    logits = torch.randn(3, 50, requires_grad=True)
    result = sample_tokens(logits, seed=1)
    assert not result.log_probs.requires_grad
    compiled = torch.compile(lambda x: sample_tokens(x, top_k=5, seed=1), backend="eager", fullgraph=True)
    assert torch.equal(compiled(logits).ids, sample_tokens(logits, top_k=5, seed=1).ids)


def test_the_op_is_registered_soundly():
    for rows in (None, torch.tensor([4, 5, 6])):
        torch.library.opcheck(sample_op, (torch.randn(3, 40), 1.0, 0, 0.9, 0.0, -5, 3, rows))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"logits": [[1.0]]}, TypeError, "logits must be a torch.Tensor, got list"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "got torch.int64"),
        ({"logits": torch.zeros(3)}, UserError, r"logits must have shape \(B, V\) with V below 2\^31, got \(3,\)"),
        ({"logits": torch.zeros(2, 0)}, UserError, r"V >= 1, got \(2, 0\)"),
        ({"temperature": -1.0}, UserError, "temperature must be a finite number, at least 0, got -1.0"),
        ({"temperature": INF}, UserError, "temperature must be a finite number, at least 0, got inf"),
        ({"temperature": NAN}, UserError, "temperature must be .* got nan"),
        ({"top_k": -1}, UserError, "top_k must be an integer, at least 0, got -1"),
        ({"top_k": 2.0}, UserError, r"top_k must be an integer, at least 0, got 2\.0"),
        ({"top_p": 1.5}, UserError, r"top_p must be in \[0, 1\], got 1.5"),
        ({"min_p": -0.1}, UserError, r"min_p must be in \[0, 1\], got -0.1"),
        ({"top_p": NAN}, UserError, r"top_p must be in \[0, 1\], got nan"),
        ({"seed": -1}, UserError, r"seed must be an integer in \[0, 2\^64\), got -1"),
        ({"seed": 2**64}, UserError, r"seed must be .* got 18446744073709551616"),
        ({"offset": -1}, UserError, r"offset must be an integer in \[0, 2\^63\), got -1"),
        ({"rows": torch.zeros(2)}, TypeError, "rows must be an int64 tensor, got torch.float32"),
        ({"rows": [0, 1]}, TypeError, "rows must be an int64 tensor, got list"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, UserError, r"rows.shape must be .* got \(3,\) and \(2, 3\)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_says_what_came(each_backend, change, error, message):
    good = {"logits": torch.zeros(2, 3), "seed": 0}
    with pytest.raises(error, match=message):
        sample_tokens(**(good | change))
