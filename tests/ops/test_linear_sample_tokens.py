import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

import fastalign
from fastalign import UserError, reference
from fastalign.ops import linear_sample_tokens, sample_tokens
from fastalign.ops.linear_sample_tokens import sample_op

head = sys.modules["fastalign.ops.linear_cpu"]
layout = pytest.importorskip("fastalign.kernels._head_layout")
NEG_INF, INF, NAN = float("-inf"), float("inf"), float("nan")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS = [{}, {"temperature": 0.3, "logit_scale": 2.0}, {"softcap": 4.0, "temperature": 1.3}, {"temperature": 0.0}]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that a few rows and a small vocabulary span several tiles, with odd ends."""
    monkeypatch.setattr(head, "TOKENS", 5)
    monkeypatch.setattr(head, "VOCAB", 48)
    monkeypatch.setattr(layout, "BLOCKS", dict.fromkeys(layout.BLOCKS, layout.Blocks(16, 32, 32, 1, 1)))


def problem(shape, dtype=torch.float32, scale=3.0, seed=0):
    count, width, vocab = shape
    torch.manual_seed(seed)
    hidden = torch.randn(count, width, dtype=torch.float64).to(dtype)
    weight = (torch.randn(vocab, width, dtype=torch.float64) * scale * width**-0.5).to(dtype)
    return hidden, weight, torch.randn(vocab, dtype=torch.float64).to(dtype)


def assert_drawn_from(found, logits, seed, offset=0, rows=None, temperature=1.0, slack=1e-5):
    """Each id is the one that the uniform number asks for, to within `slack` of the mass."""
    rows = torch.arange(len(logits)) if rows is None else rows
    u = reference.uniform(seed, rows, torch.full_like(rows, offset))
    p = (logits.double() / temperature).softmax(-1)
    after = p.cumsum(-1).gather(-1, found.ids[:, None])[:, 0]
    mass = p.gather(-1, found.ids[:, None])[:, 0]
    assert ((u <= after + slack) & (u >= after - mass - slack)).all()
    assert (mass > 0).all()
    torch.testing.assert_close(found.log_probs.double(), mass.log(), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 33, 301), (19, 16, 96), (1, 5, 1), (2, 3, 33)], ids=str)
def test_draws_what_sample_tokens_draws(each_backend, shape, dtype, options):
    hidden, weight, bias = problem(shape, dtype)
    result = linear_sample_tokens(hidden, weight, bias=bias, seed=5, offset=3, **options)
    exact = hidden.double() @ weight.double().T + bias.double()
    temperature = options.get("temperature", 1.0)
    logits = reference.transform_logits(exact * options.get("logit_scale", 1.0), 1.0, options.get("softcap"))
    expected = reference.sample_tokens(logits, temperature, seed=5, offset=3)
    assert result.ids.dtype == torch.int64
    assert result.log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if temperature == 0:
        assert torch.equal(result.ids, expected[0]) and (result.log_probs == 0).all()
    else:
        # A draw within rounding of a border may go to either side.
        assert (result.ids == expected[0]).float().mean() > 0.95
        assert_drawn_from(result, logits, 5, 3, temperature=temperature)


def test_an_adapter_equals_the_merged_weight(each_backend):
    hidden, weight, bias = problem((12, 20, 150), torch.float64)
    a, b = torch.randn(3, 20, dtype=torch.float64), torch.randn(150, 3, dtype=torch.float64)
    ours = linear_sample_tokens(hidden, weight, bias=bias, adapter=(a, b, 0.4), seed=1)
    merged = linear_sample_tokens(hidden, weight + 0.4 * b @ a, bias=bias, seed=1)
    assert torch.equal(ours.ids, merged.ids)
    torch.testing.assert_close(ours.log_probs, merged.log_probs)


def test_rows_that_cannot_be_drawn_from(each_backend):
    hidden, weight, bias = problem((6, 8, 120))
    hidden[2] = NAN
    result = linear_sample_tokens(hidden, weight, bias=bias, seed=0)
    assert result.ids[2] == -1 and result.log_probs[2].isnan()
    assert (result.ids[[0, 1, 3, 4, 5]] >= 0).all() and result.log_probs[[0, 1, 3, 4, 5]].isfinite().all()
    for value in (NAN, INF):
        for temperature in (1.0, 0.0):
            spoiled = bias.clone()
            spoiled[100] = value
            result = linear_sample_tokens(hidden, weight, bias=spoiled, seed=0, temperature=temperature)
            assert (result.ids == -1).all() and result.log_probs.isnan().all()
    result = linear_sample_tokens(hidden, weight, bias=torch.full((120,), NEG_INF), seed=0)
    assert (result.ids == -1).all() and result.log_probs.isnan().all()


def test_masked_tokens_are_never_drawn(each_backend):
    hidden, weight, bias = problem((40, 8, 120), scale=0.1)
    bias[:64], bias[64:70], bias[70:] = NEG_INF, 0, NEG_INF
    result = linear_sample_tokens(hidden, weight, bias=bias, seed=2)
    assert ((result.ids >= 64) & (result.ids < 70)).all() and len(result.ids.unique()) > 3
    bias[:] = NEG_INF
    bias[99] = 0
    result = linear_sample_tokens(hidden, weight, bias=bias, seed=2)
    assert (result.ids == 99).all() and (result.log_probs.abs() < 1e-6).all()


def test_greedy_takes_the_first_of_equals(each_backend):
    weight = torch.randn(130, 8)
    weight[[40, 41, 100]] = 0
    weight[:, 0] = -1.0
    weight[[40, 41, 100], 0] = 1.0
    hidden = torch.zeros(3, 8)
    hidden[:, 0] = 50.0
    assert (linear_sample_tokens(hidden, weight, temperature=0.0, seed=0).ids == 40).all()


def test_tiny_temperatures_do_not_overflow(each_backend):
    hidden, weight, _ = problem((5, 8, 100))
    for temperature in (1e-3, 1e-20, 1e-44):
        result = linear_sample_tokens(hidden, weight, temperature=temperature, seed=0)
        assert torch.equal(result.ids, (hidden @ weight.T).argmax(-1))


def test_streams_are_those_of_the_rows(each_backend):
    hidden, weight, _ = problem((9, 8, 200))
    rows = torch.tensor([5, 2**40, 7, 0, 3, 9, 8, 1, 2])
    result = linear_sample_tokens(hidden, weight, seed=2**64 - 1, offset=4, rows=rows)
    order = torch.randperm(9)
    again = linear_sample_tokens(hidden[order], weight, seed=2**64 - 1, offset=4, rows=rows[order])
    assert torch.equal(again.ids, result.ids[order])
    assert_drawn_from(result, hidden @ weight.T, 2**64 - 1, 4, rows)
    assert torch.equal(result.ids, sample_tokens(hidden @ weight.T, seed=2**64 - 1, offset=4, rows=rows).ids)
    pairs = torch.stack([rows, torch.arange(9) % 4], 1)  # and with steps of their own
    result = linear_sample_tokens(hidden, weight, seed=1, offset=4, rows=pairs)
    assert torch.equal(result.ids, sample_tokens(hidden @ weight.T, seed=1, offset=4, rows=pairs).ids)


def test_strided_inputs_and_mixed_dtypes(each_backend):
    base, weight, bias = problem((9, 24, 90))
    for hidden, w in (
        (base[::2], weight),
        (base.T.contiguous().T, weight.T.contiguous().T),
        (base[:1].expand(4, 24), weight),
    ):
        ours = linear_sample_tokens(hidden, w, bias=bias, seed=3)
        assert torch.equal(ours.ids, linear_sample_tokens(hidden.contiguous(), w.contiguous(), bias=bias, seed=3).ids)
    mixed = linear_sample_tokens(base.bfloat16(), weight, bias=bias.half(), seed=3)
    assert_drawn_from(mixed, base.bfloat16().float() @ weight.T + bias.half(), 3)
    assert linear_sample_tokens(base[:0], weight, seed=0).ids.shape == (0,)


def test_the_law_is_the_softmax(each_backend):
    count = 4000 if each_backend != "triton" else 250
    hidden, weight, bias = problem((1, 6, 60), scale=2.0)
    result = linear_sample_tokens(hidden.expand(count, 6), weight, bias=bias, seed=11)
    p = (hidden @ weight.T + bias).double().softmax(-1)[0]
    likely = p * count >= 5
    observed = torch.bincount(result.ids, minlength=60).double()
    seen = torch.cat([observed[likely], observed[~likely].sum()[None]])
    expected = torch.cat([p[likely], p[~likely].sum()[None]]) * count
    assert chisquare(seen, expected).pvalue > 1e-3


@given(
    count=st.integers(1, 20),
    width=st.integers(1, 40),
    vocab=st.integers(1, 200),
    seed=st.integers(0, 2**64 - 1),
    scale=st.sampled_from([0.0, 1e-3, 3.0, 100.0]),
    columns=st.sampled_from([16, 64]),
)
@settings(max_examples=15)
def test_any_shape_and_scale(count, width, vocab, seed, scale, columns):
    hidden, weight, bias = problem((count, width, vocab), scale=scale, seed=seed % 1000)
    logits = hidden.double() @ weight.double().T + bias.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "BLOCKS", {torch.float32: layout.Blocks(16, columns, 16, 1, 1)})
        patch.setattr(head, "VOCAB", columns)
        for name in ("cpu", "triton"):
            with fastalign.use_backend(name):
                result = linear_sample_tokens(hidden, weight, bias=bias, seed=seed)
            assert_drawn_from(result, logits, seed, slack=1e-4)


def test_has_no_gradient_and_heeds_no_autocast(each_backend):
    hidden, weight, _ = problem((8, 64, 100))
    plain = linear_sample_tokens(hidden, weight, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = linear_sample_tokens(hidden.requires_grad_(), weight.requires_grad_(), seed=1)
    assert not result.log_probs.requires_grad
    assert torch.equal(result.ids, plain.ids) and torch.equal(result.log_probs, plain.log_probs)


def test_opcheck_and_compile(each_backend):
    hidden, weight, bias = problem((5, 8, 70))
    if each_backend != "reference":
        arguments = (hidden, weight, bias, None, None, 1.0, 0.8, 0.0, 1.0, 7, 0, None)
        torch.library.opcheck(sample_op, arguments, test_utils=("test_schema", "test_faketensor"))
    draw = lambda h: linear_sample_tokens(h, weight, bias=bias, seed=7)  # noqa: E731
    result = torch.compile(draw, fullgraph=True, backend="aot_eager")(hidden)
    assert torch.equal(result.ids, draw(hidden).ids)


def test_equal_logits_follow_the_generator(each_backend):
    """Of 2^8 equally likely tokens the one drawn is the first 8 bits of the generator's first word."""
    words = reference.philox(9, torch.arange(20), torch.full((20,), 1))
    result = linear_sample_tokens(torch.zeros(20, 4), torch.randn(256, 4), seed=9, offset=1)
    assert torch.equal(result.ids, words[:, 0] >> 24)
    torch.testing.assert_close(result.log_probs, torch.full((20,), -8 * math.log(2)))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"hidden": torch.zeros(2, 2, 3)}, UserError, "hidden must have shape (B, H), got (2, 2, 3)"),
        ({"hidden": torch.zeros(2, 5)}, UserError, "hidden.shape[-1] must equal weight.shape[1], got 5 and 3"),
        ({"hidden": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "hidden must be float32, float64"),
        ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
        ({"bias": torch.zeros(5)}, UserError, "bias.shape[0] must equal weight.shape[0], got 5 and 4"),
        ({"temperature": -1.0}, UserError, "temperature must be a finite number, at least 0, got -1.0"),
        ({"softcap": 0.0}, UserError, "softcap must be a positive finite number, got 0.0"),
        ({"seed": -1}, UserError, "seed must be an integer in [0, 2^64), got -1"),
        ({"offset": -1}, UserError, "offset must be an integer in [0, 2^63), got -1"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, UserError, "rows.shape must be (B,) or (B, 2)"),
    ],
)
def test_mistakes_are_reported_in_one_line(each_backend, change, error, says):
    arguments = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(4, 3), "seed": 0} | change
    with pytest.raises(error) as raised:
        linear_sample_tokens(**arguments)
    assert says in str(raised.value) and "\n" not in str(raised.value)
