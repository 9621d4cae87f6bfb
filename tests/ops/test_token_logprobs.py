import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import HAIR, assert_as_good_as_torch

from fastalign import UserError, empty, reference, use_backend
from fastalign.ops import token_logprobs
from fastalign.ops.token_logprobs import OUTPUTS, backward_op, forward_op

NEG_INF = float("-inf")
SHAPES = [(8, 1024), (5, 1023), (2, 3, 257), (7, 1), (1, 3, 2050), (4,), (0, 5)]
ids = lambda shape: "x".join(map(str, shape))  # noqa: E731


def problem(shape, dtype, scale=3.0, seed=0):
    torch.manual_seed(seed)
    logits = (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1])
    flat = labels.view(-1)
    if flat.numel() > 2:
        flat[1] = -100
    return logits, labels


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"softcap": 5.0, "temperature": 1.3}], ids=str)
@pytest.mark.parametrize("dtype", HAIR, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_values_and_gradients(each_backend, shape, dtype, options):
    logits, labels = problem(shape, dtype)
    truth_in = logits.to(torch.float64, copy=True).requires_grad_()
    torch_in = logits.clone().requires_grad_()
    ours_in = logits.clone().requires_grad_()
    truth = reference.token_logprobs(truth_in, labels, **options)
    # What torch does in this dtype: the tensor arithmetic of the reference, begun and ended in `dtype`.
    theirs = reference.token_logprobs(torch_in, labels, **options)
    ours = token_logprobs(ours_in, labels, outputs=OUTPUTS, **options)
    for name in OUTPUTS[:4]:
        hair = max(HAIR[dtype], 1e-12) if dtype == torch.float64 else HAIR[torch.float32]
        assert_as_good_as_torch(getattr(ours, name).detach(), theirs[name].detach(), truth[name].detach(), hair, name)
    assert torch.equal(ours.is_top1, theirs["is_top1"])
    weights = torch.randn(labels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for result in (truth, theirs, ours._asdict()):
        (result["log_probs"].double() * weights + 0.3 * result["entropy"].double()).sum().backward()
    assert ours_in.grad.dtype == dtype
    assert_as_good_as_torch(ours_in.grad, torch_in.grad, truth_in.grad, HAIR[dtype], "gradient")


@pytest.mark.parametrize("dtype", HAIR, ids=str)
def test_dtypes_of_the_result(each_backend, dtype):
    logits, labels = problem((3, 9), dtype)
    assert token_logprobs(logits, labels).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    result = token_logprobs(logits, labels, outputs=("entropy", "is_top1"))
    assert result.log_probs is None and result.entropy.shape == (3,) and result.is_top1.dtype == torch.bool


def test_gradcheck_in_float64(each_backend):
    logits, labels = problem((2, 2, 5), torch.float64)
    logits.requires_grad_()

    def f(x):
        result = token_logprobs(x, labels, temperature=0.7, softcap=4.0, outputs=("log_probs", "entropy"))
        return result.log_probs, result.entropy

    assert torch.autograd.gradcheck(f, logits)
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, labels), logits)


def test_equals_what_torch_and_trl_compute():
    from trl.trainer.utils import selective_log_softmax

    logits, labels = problem((4, 7, 501), torch.float32)
    labels = labels.clamp(min=0)
    plain = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(token_logprobs(logits, labels), plain, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(
        token_logprobs(logits, labels), selective_log_softmax(logits, labels), rtol=1e-6, atol=2e-6
    )


def test_statistics_equal_trls_chunked_head():
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    torch.manual_seed(2)
    hidden, weight, labels = torch.randn(9, 16), torch.randn(301, 16), torch.randint(0, 301, (9,))
    logits = hidden @ weight.T
    labels[:4] = logits[:4].argmax(-1)
    requested = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    theirs = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 0.8, 128, 3.0, 1.0, requested)
    ours = token_logprobs(logits, labels, temperature=0.8, softcap=3.0, outputs=OUTPUTS)
    for name, value in zip(("log_probs", *requested), theirs, strict=True):
        torch.testing.assert_close(
            getattr(ours, name), value, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_a_slice_is_read_in_place(each_backend):
    logits, _ = problem((3, 6, 40), torch.float32)
    labels = torch.randint(0, 40, (3, 5))
    expected = token_logprobs(logits[:, :-1].contiguous(), labels)
    assert torch.equal(token_logprobs(logits[:, :-1], labels), expected)
    assert torch.equal(token_logprobs(logits.transpose(0, 1)[:-1], labels.T), expected.T)
    wide = torch.stack([logits, logits], -1)[..., 0]  # last stride 2
    assert torch.equal(token_logprobs(wide[:, :-1], labels), expected)
    assert torch.equal(token_logprobs(logits[:1, :-1].expand(3, 5, 40), labels)[0], expected[0])


def test_masked_vocabulary_masked_rows_and_nan(each_backend):
    logits = torch.randn(6, 33)
    logits[0, 5:] = NEG_INF  # a masked vocabulary, label inside
    logits[1] = NEG_INF  # everything masked
    logits[2, 7] = float("nan")
    logits[3, 4] = NEG_INF  # the label itself
    logits[5, 2] = float("inf")
    labels = torch.tensor([2, 3, 1, 4, -100, 1])
    logits.requires_grad_()
    result = token_logprobs(logits, labels, outputs=OUTPUTS)
    result.log_probs[[0, 1, 2, 3, 4]].sum().backward()
    torch.testing.assert_close(result.log_probs[0], logits[0, :5].log_softmax(0)[2])
    assert result.log_probs[1] == 0 and result.entropy[1] == 0 and (logits.grad[1] == 0).all()
    assert result.log_probs[2].isnan() and logits.grad[2].isnan().all() and not result.is_top1[2]
    assert result.log_probs[3] == NEG_INF
    assert result.log_probs[4] == 0 and (logits.grad[4] == 0).all()
    assert result.log_probs[5].isnan()
    assert (logits.grad[0, 5:] == 0).all() and logits.grad[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nan_stays_nan_in_narrow_types(each_backend, dtype):
    logits, labels = problem((4, 130), dtype)
    labels = labels.clamp(min=0)
    logits[2, 5] = float("nan")
    logits.requires_grad_()
    result = token_logprobs(logits, labels)
    weird = torch.tensor([1.0, 1.0, 1.0, 0.0])
    weird[1] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # a NaN that rounding could overflow
    result.backward(weird)
    assert result[2].isnan() and result[[0, 1, 3]].isfinite().all()
    assert logits.grad[2].isnan().all() and logits.grad[1].isnan().all() and logits.grad[[0, 3]].isfinite().all()


def test_one_word_vocabulary_is_certain(each_backend):
    x = torch.tensor([[1e30], [-5.0]], requires_grad=True)
    result = token_logprobs(x, torch.tensor([0, 0]), outputs=OUTPUTS)
    result.log_probs.sum().backward()
    assert (result.log_probs == 0).all() and (x.grad == 0).all() and result.is_top1.all()


def test_top1_is_the_first_of_equals(each_backend):
    logits = torch.zeros(1, 5000)
    logits[0, [1200, 3000]] = 2.0
    labels = torch.tensor([1200, 3000, 0])
    assert token_logprobs(logits.expand(3, -1), labels, outputs=("is_top1",)).is_top1.tolist() == [True, False, False]


@given(
    vocab=st.integers(1, 2100),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 30.0, 1e4, 1e30]),
    seed=st.integers(0, 2**16),
    masked=st.floats(0, 1),
)
def test_any_vocabulary_and_scale(vocab, scale, seed, masked):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, vocab, generator=generator) * scale
    logits[torch.rand(2, vocab, generator=generator) < masked * 0.9] = NEG_INF
    labels = torch.randint(0, vocab, (2,), generator=generator)
    a, b, c = (logits.to(t, copy=True).requires_grad_() for t in (torch.float64, torch.float32, torch.float32))
    truth = reference.token_logprobs(a, labels)
    theirs = reference.token_logprobs(b, labels)
    ours = token_logprobs(c, labels, outputs=OUTPUTS)
    for name in ("log_probs", "entropy", "log_sum_sq_probs"):
        assert_as_good_as_torch(getattr(ours, name).detach(), theirs[name].detach(), truth[name].detach(), 3e-6, name)
    alive = truth["log_probs"].isfinite()
    for result in (truth, theirs, ours._asdict()):
        result["log_probs"][alive].sum().backward()
    assert_as_good_as_torch(c.grad, b.grad, a.grad, 3e-6, "gradient")


def test_the_same_bits_at_any_thread_count():
    logits, labels = problem((13, 3001), torch.float32)
    before, result = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x = logits.clone().requires_grad_()
            out = token_logprobs(x, labels)
            out.sum().backward()
            result.append((out.detach(), x.grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, result[0][0]) and torch.equal(g, result[0][1]) for a, g in result)


def test_compile_in_one_graph(each_backend):
    logits, labels = problem((3, 40), torch.float32)
    compiled = torch.compile(lambda x: token_logprobs(x, labels).sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), token_logprobs(logits, labels).sum())


def test_func_grad_vmap_and_compile():
    logits, labels = problem((4, 6, 31), torch.float32)
    labels = labels.clamp(min=0)
    loss = lambda x, y: token_logprobs(x, y).sum()  # noqa: E731
    expected = logits.softmax(-1).neg().scatter_add(-1, labels.unsqueeze(-1), torch.ones(4, 6, 1))
    torch.testing.assert_close(torch.func.grad(loss)(logits, labels), expected, atol=1e-6, rtol=1e-5)
    per_sample = torch.func.vmap(torch.func.grad(loss))(logits, labels)
    torch.testing.assert_close(per_sample, expected, atol=1e-6, rtol=1e-5)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = logits.clone().requires_grad_()
    compiled(x, labels).backward()
    torch.testing.assert_close(x.grad, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(RuntimeError):  # never a silent zero
        torch.func.jvp(lambda x: loss(x, labels), (logits,), (logits,))
    # Torch inlines the function and loses its backward pass.
    with pytest.raises(Exception, match=r"without its gradient"):
        torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(logits, labels)


@pytest.mark.parametrize("statistics", [0, empty.ENTROPY, empty.ALL])
def test_opcheck(statistics):
    logits, labels = problem((3, 17), torch.float32)
    arguments = (logits, labels, 0.9, 0.0, -100, statistics)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward_op, arguments, test_utils=checks)
    log_probs, row_max, row_sum, entropy, *_ = forward_op(*arguments)
    backward_arguments = (log_probs, torch.zeros_like(log_probs), row_max, row_sum, entropy, *arguments)
    torch.library.opcheck(backward_op, backward_arguments, test_utils=checks)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"logits": torch.zeros(2, 4, dtype=torch.int32)}, TypeError, "logits must be float32, float64"),
        ({"logits": [[0.0]]}, TypeError, "logits must be a torch.Tensor, got list"),
        ({"logits": torch.zeros(2, 0)}, UserError, "V >= 1, got (2, 0)"),
        (
            {"labels": torch.zeros(3, dtype=torch.int64)},
            UserError,
            "labels.shape must equal logits.shape[:-1], got (3,) and (2,)",
        ),
        ({"labels": torch.zeros(2)}, TypeError, "labels must be int64, got torch.float32"),
        (
            {"labels": torch.tensor([0, 4])},
            UserError,
            "labels must be in [0, 4) or ignore_index -100, got 4 at position 1",
        ),
        ({"labels": torch.tensor([-1, 0])}, UserError, "got -1 at position 0"),
        ({"temperature": 0.0}, UserError, "temperature must be a positive finite number, got 0.0"),
        ({"softcap": -1.0}, UserError, "softcap must be a positive finite number, got -1.0"),
        ({"outputs": ("logprobs",)}, UserError, "outputs must be some of log_probs, entropy"),
    ],
)
def test_mistakes_are_reported_in_one_line(each_backend, change, error, says):
    arguments = {"logits": torch.zeros(2, 4), "labels": torch.tensor([0, 3])} | change
    logits, labels = arguments.pop("logits"), arguments.pop("labels")
    with pytest.raises(error) as raised:
        token_logprobs(logits, labels, **arguments)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_backends_are_named_exactly():
    with (
        pytest.raises(UserError, match="backend must be one of auto, cpu, triton, reference, got 'cuda'"),
        use_backend("cuda"),
    ):
        pass


@pytest.fixture
def in_small_blocks(monkeypatch):
    """The Triton kernels in the interpreter, a row being many blocks and the last of them odd."""
    monkeypatch.setattr(pytest.importorskip("fastalign.kernels._rows"), "THREADS", 4)
    with use_backend("triton"):
        yield


@pytest.mark.slow_matrix
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", HAIR, ids=str)
@pytest.mark.parametrize("vocab", [64, 129, 300])
def test_rows_of_many_blocks(in_small_blocks, vocab, dtype, softcap):
    logits, labels = problem((7, vocab), dtype)
    top = logits.argmax(-1)
    labels[[0, 3]] = top[[0, 3]]
    labels[5] = top[5]
    logits[5, [0, -1]] = logits[5].max().item()  # not the first of the largest any more
    logits[6, : vocab // 2] = NEG_INF
    logits[2] = NEG_INF
    a, b, c = (logits.to(t, copy=True).requires_grad_() for t in (torch.float64, dtype, dtype))
    truth, theirs = (reference.token_logprobs(x, labels, 1.0, softcap) for x in (a, b))
    ours = token_logprobs(c, labels, softcap=softcap, outputs=OUTPUTS)._asdict()
    for name in OUTPUTS[:4]:
        hair = HAIR[torch.float64 if dtype == torch.float64 else torch.float32]
        assert_as_good_as_torch(ours[name].detach(), theirs[name].detach(), truth[name].detach(), hair, name)
    assert torch.equal(ours["is_top1"], theirs["is_top1"]) and ours["is_top1"].any()
    torch.testing.assert_close(token_logprobs(c, labels, softcap=softcap), ours["log_probs"])
    for result in (truth, theirs, ours):
        alive = truth["log_probs"].isfinite()
        (result["log_probs"][alive].sum() + 0.3 * result["entropy"].sum()).backward()
    assert_as_good_as_torch(c.grad, b.grad, a.grad, HAIR[dtype], "gradient")


def test_lowest_logit_of_all_can_be_the_first(in_small_blocks):
    logits = torch.full((2, 200), NEG_INF)
    logits[:, 100:] = torch.finfo(torch.float32).min
    result = token_logprobs(logits, torch.tensor([100, 101]), outputs=OUTPUTS)
    assert result.is_top1.tolist() == [True, False]
    torch.testing.assert_close(result.entropy, torch.full((2,), 100.0).log())


@pytest.mark.parametrize("statistics", [0, empty.ENTROPY, empty.ALL])
def test_gradient_in_the_logits_place(in_small_blocks, statistics):
    from fastalign.kernels import token_logprobs as kernel

    logits, labels = problem((3, 4, 301), torch.bfloat16)
    options = (1.3, 0.0, -100, statistics)
    log_probs, row_max, row_sum, entropy, *_ = kernel.forward(logits, labels, *options)
    small = (log_probs, 0.1 * log_probs, row_max, row_sum, entropy)
    expected = kernel.backward(*small, logits, labels, *options)
    wide = torch.stack([logits, logits], -1)[:, 1:, :, 0]  # any strides
    part = [x[:, 1:] for x in (*small, labels)]
    assert kernel.backward(*part[:5], wide, part[5], *options, out=wide) is wide
    assert torch.equal(wide, expected[:, 1:])
    assert kernel.backward(*small, logits, labels, *options, out=logits) is logits
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("bad", [-1, 40, 2**40])
def test_an_unknown_label_is_nan_where_nobody_waits(monkeypatch, bad):
    """A GPU cannot raise without the host waiting for it."""
    pytest.importorskip("triton")
    from fastalign.ops import checks

    monkeypatch.setattr(checks, "labels_in_range", lambda *_: None)
    logits = torch.randn(3, 40, requires_grad=True)
    with use_backend("triton"):
        result = token_logprobs(logits, torch.tensor([3, bad, -100]), outputs=OUTPUTS)
        (result.log_probs.sum() + result.entropy.sum()).backward()
    assert result.log_probs[1].isnan() and result.entropy[1].isnan() and not result.is_top1[1]
    assert logits.grad[1].isnan().all()
    assert logits.grad[[0, 2]].isfinite().all() and result.log_probs[[0, 2]].isfinite().all()
