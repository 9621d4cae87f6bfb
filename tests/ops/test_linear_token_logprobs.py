import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import HAIR, assert_as_good_as_torch
from torch.utils.checkpoint import checkpoint
from turns import by_the_day

import fastalign
from fastalign import UserError, empty, reference
from fastalign.ops import checks, linear_token_logprobs, token_logprobs
from fastalign.ops.head import backward_op, forward_op
from fastalign.ops.token_logprobs import OUTPUTS

head = sys.modules["fastalign.ops.linear_cpu"]
gpu_head = pytest.importorskip("fastalign.kernels.linear_token_logprobs")
layout = pytest.importorskip("fastalign.kernels._head_layout")
kept_tiles = pytest.importorskip("fastalign.kernels._kept")
NEG_INF = float("-inf")
SHAPES = [((8,), 64, 1024), ((5,), 33, 1023), ((2, 7), 17, 301), ((3,), 5, 1), ((), 4, 9), ((1,), 1, 2)]
OPTIONS = [{}, {"temperature": 0.7, "logit_scale": 0.3}, {"softcap": 5.0, "temperature": 1.3, "logit_scale": 2.0}]
ids = lambda shape: "x".join(map(str, (*shape[0], *shape[1:])))  # noqa: E731


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a few rows span many of them, with odd ends in both directions."""
    monkeypatch.setattr(head, "TOKENS", 3)
    monkeypatch.setattr(head, "VOCAB", 37)
    smallest = layout.Blocks(rows=16, columns=64, width=32, warps=1, stages=1)
    monkeypatch.setattr(layout, "BLOCKS", dict.fromkeys(layout.BLOCKS, smallest))
    monkeypatch.setattr(layout, "WORKSPACE", 6 << 10)
    monkeypatch.setattr(layout, "WORKSPACE_WIDTH", 1)
    monkeypatch.setattr(kept_tiles, "STEP", 64)
    monkeypatch.setattr(gpu_head, "SPLIT", 2)


def problem(shape, dtype=torch.float32, scale=1.0, seed=0, weight_dtype=None):
    lead, width, vocab = shape
    torch.manual_seed(seed)
    hidden = torch.randn(*lead, width, dtype=torch.float64).to(dtype)
    weight = (torch.randn(vocab, width, dtype=torch.float64) * scale * width**-0.5).to(weight_dtype or dtype)
    bias = torch.randn(vocab, dtype=torch.float64).to(weight_dtype or dtype)
    labels = torch.randint(0, vocab, lead)
    if labels.numel() > 2:
        labels.view(-1)[1] = -100
    return hidden, weight, bias, labels


def leaves(*tensors, dtype=None):
    return [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in tensors]


def plain(hidden, weight, bias, labels, temperature=1.0, softcap=None, logit_scale=1.0, ignore_index=-100):
    """What torch does in the tensors' own dtype: the product there, the softmax in float32."""
    logits = F.linear(hidden, weight, bias) * logit_scale
    return reference.token_logprobs(logits, labels, temperature, softcap, ignore_index)


@pytest.mark.slow_matrix
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", HAIR, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_values_and_gradients(each_backend, small_tiles, shape, dtype, options):
    *tensors, labels = problem(shape, dtype, 3.0)
    a, b, c = leaves(*tensors, dtype=torch.float64), leaves(*tensors), leaves(*tensors)
    truth, theirs = plain(*a, labels, **options), plain(*b, labels, **options)
    ours = linear_token_logprobs(c[0], c[1], labels, bias=c[2], outputs=OUTPUTS, **options)
    hair = HAIR[torch.float64] if dtype == torch.float64 else HAIR[torch.float32]
    for name in OUTPUTS[:4]:
        assert_as_good_as_torch(getattr(ours, name).detach(), theirs[name].detach(), truth[name].detach(), hair, name)
    assert torch.equal(ours.is_top1, truth["is_top1"])
    weights = torch.randn(labels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for result in (truth, theirs, ours._asdict()):
        (result["log_probs"].double() * weights + 0.3 * result["entropy"].double()).sum().backward()
    for name, x, y, z in zip(("hidden", "weight", "bias"), c, b, a, strict=True):
        assert x.grad.dtype == dtype
        assert_as_good_as_torch(x.grad, y.grad, z.grad, HAIR[dtype], name)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", HAIR, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_frozen_head_makes_its_gradient_going_forward(each_backend, small_tiles, shape, dtype, options):
    hidden, weight, bias, labels = problem(shape, dtype, 3.0)
    (a,), (b,), (c,) = leaves(hidden, dtype=torch.float64), leaves(hidden), leaves(hidden)
    weights = torch.randn(labels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    truth = plain(a, weight.double(), bias.double(), labels, **options)["log_probs"]
    theirs = plain(b, weight, bias, labels, **options)["log_probs"]
    ours = linear_token_logprobs(c, weight, labels, bias=bias, **options)
    for result in (truth, theirs, ours):
        (result.double() * weights).sum().backward()
    assert_as_good_as_torch(c.grad, b.grad, a.grad, HAIR[dtype], "hidden")


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy")], ids=len)
@pytest.mark.parametrize("dtype", HAIR, ids=str)
@pytest.mark.parametrize("budget", [0, 9000, 1 << 20])  # no tile, some, all
def test_kept_tiles_give_the_same_gradients(each_backend, small_tiles, budget, dtype, outputs):
    """Among them rows without a gradient, confident ones, and a second backward pass."""
    hidden, weight, bias, labels = problem(((2, 8), 17, 301), dtype, 3.0)
    labels.view(-1)[3:8] = torch.tensor([7, 7, 300, -100, 12])
    hidden[1] *= 2
    weights = torch.randn(labels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights[0, 4] = weights[1, 2] = 0
    a, b, c = (
        leaves(hidden, weight, bias, dtype=torch.float64),
        leaves(hidden, weight, bias),
        leaves(hidden, weight, bias),
    )
    truth, theirs = plain(*a, labels), plain(*b, labels)
    ours = linear_token_logprobs(c[0], c[1], labels, bias=c[2], memory_budget=budget, outputs=outputs)
    ours = {"log_probs": ours} if len(outputs) == 1 else ours._asdict()
    if each_backend != "reference" and len(outputs) == 1:
        arguments = (hidden, weight, bias, None, None, labels, 1.0, 1.0, 0.0, 1.0, -100, 0, False, budget)
        torch.library.opcheck(forward_op, arguments, test_utils="test_faketensor")
    for result in (truth, theirs, ours):
        total = (result["log_probs"].double() * weights).sum()
        if len(outputs) == 2:
            total = total + 0.3 * (result["entropy"].double() * weights).sum()
        total.backward(retain_graph=True)
        total.backward()
    for name, x, y, z in zip(("hidden", "weight", "bias"), c, b, a, strict=True):
        assert_as_good_as_torch(x.grad, y.grad, z.grad, 2 * HAIR[dtype], name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_rounded_tiles(dtype):
    """Of narrow exponentials, as a GPU keeps them: no further off than one more rounding, with p near 1 too."""
    torch.manual_seed(0)
    z = torch.randn(32, 128, dtype=torch.float64) * 4
    z[:8, 5] = z[:8].amax(-1) + torch.linspace(0.5, 12, 8, dtype=torch.float64)  # ever more confident
    labels = torch.randint(0, 128, (32,))
    labels[:4] = 5
    x = z.clone().requires_grad_()
    result = reference.token_logprobs(x, labels)
    grad, grad_entropy = torch.randn(2, 32, dtype=torch.float64)
    (result["log_probs"] @ grad + result["entropy"] @ grad_entropy).backward()
    largest, total = z.amax(-1), (z - z.amax(-1, keepdim=True)).exp().sum(-1)
    tops = torch.stack([z[:, :64].amax(-1), z[:, 64:].amax(-1)])
    exps = (z - tops.T.repeat_interleave(64, 1)).exp() * kept_tiles.SCALE.get(dtype, 1.0)
    given = torch.stack([grad, grad_entropy, largest, total, result["entropy"].detach()]).float()
    tile, rows = torch.empty(32, 128, dtype=torch.float32), torch.arange(32)
    kept_tiles.gradient_of_kept[(2, 2)](
        tile, given, exps.to(dtype), tops.float(), rows, labels, rows, torch.tensor(32), 32, 0, 128, 128,
        kept_tiles.SCALE.get(dtype, 1.0), 1.0, ENTROPY=True, COMPUTE=kept_tiles.tl.float32, BLOCK_M=16, BLOCK_N=64,
    )  # fmt: skip
    off = (tile - x.grad).norm(dim=1) / x.grad.norm(dim=1)
    assert off.max() < 2 * torch.finfo(dtype).eps


def test_what_a_gpu_keeps_is_within_the_budget():
    hidden, weight = (torch.empty(*shape, device="meta", dtype=torch.bfloat16) for shape in ((1000, 64), (5000, 64)))
    labels = torch.empty(1000, device="meta", dtype=torch.int64)
    size = lambda budget, softcap=0.0: 4 * kept_tiles.kept_size(hidden, weight, labels, softcap, budget)  # noqa: E731
    whole = 1000 * 10 * (512 * 2 + 4)  # ten blocks of 512 bfloat16 numbers, and a number for each
    assert size(1 << 40) == size(whole) == whole and size(whole - 1) == 0.9 * whole
    assert size(0) == size(1000) == size(1 << 40, softcap=5.0) == 0


@pytest.mark.slow_matrix
@pytest.mark.parametrize("shape", [((1030,), 16, 9000), ((4, 300), 16, 4097)], ids=ids)
@pytest.mark.parametrize("budget", [None, 0, 20 << 20, 1 << 30])
def test_real_tiles_and_kept_ones(shape, budget):
    hidden, weight, bias, labels = problem(shape, scale=4.0)
    a, b = leaves(hidden, weight, bias, dtype=torch.float64), leaves(hidden, weight, bias)
    truth = plain(*a, labels)
    ours = linear_token_logprobs(b[0], b[1], labels, bias=b[2], outputs=("log_probs", "entropy"), memory_budget=budget)
    assert (ours.log_probs - truth["log_probs"]).abs().max() < 1e-5
    for result in (truth, ours._asdict()):
        total = result["log_probs"].sum() + result["entropy"].sum()
        total.backward(retain_graph=True)
        total.backward()  # the kept tiles are not used up
    for x, y in zip(b, a, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-4)


def test_kept_tiles_spare_the_products(monkeypatch):
    made = []
    project = head.Tiles.project
    monkeypatch.setattr(head.Tiles, "project", lambda *a, **k: (made.append(1), project(*a, **k))[1])
    hidden, weight, _, labels = problem(((40,), 8, 10_000))
    counts = []
    for budget in (0, 39 * 4096 * 4, 1 << 30, None):  # one of the 40 labels is ignored
        made.clear()
        a, b = leaves(hidden, weight)
        out = linear_token_logprobs(a, b, labels, memory_budget=budget).sum()
        out.backward(retain_graph=True)
        once, grads = len(made), (a.grad.clone(), b.grad.clone())
        out.backward()  # the tiles are given up: they are made again, and give the same
        counts.append((once, len(made) - once))
        assert torch.equal(a.grad, 2 * grads[0]) and torch.equal(b.grad, 2 * grads[1])
    assert counts == [(6, 3), (5, 3), (3, 3), (3, 3)]
    made.clear()
    (a,) = leaves(hidden)
    linear_token_logprobs(a, weight, labels).sum().backward()
    assert len(made) == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("provider", by_the_day(["torch", "onednn"], 2))
def test_memory_beyond_the_gradients_is_bounded(provider, monkeypatch):
    monkeypatch.setenv("FASTALIGN_PRODUCTS", provider)

    def kilobytes(field):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field))

    hidden, weight = torch.randn(1024, 192), torch.randn(40_000, 192)  # gradients 31 MB, logits 164 MB
    labels = torch.randint(0, 40_000, (1024,))
    for frozen in (False, True):
        grown = []
        for _attempt in range(8):  # the first ones bring the libraries' own buffers
            a, b = leaves(hidden, weight)
            b.requires_grad_(not frozen)
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            before = kilobytes("VmRSS")
            linear_token_logprobs(a, b, labels).sum().backward()
            grown.append((kilobytes("VmHWM") - before) / 1024)
        # The allocator may return what earlier tests freed just before, so that a call seems to take it again.
        assert min(grown[1:]) < 64 + (0 if frozen else 31), (frozen, grown)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradcheck_in_float64(each_backend, small_tiles, frozen):
    hidden, weight, bias, labels = problem(((3, 5), 4, 50), torch.float64)
    a, b = torch.randn(2, 4, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64)
    options = {"temperature": 0.7, "softcap": 4.0, "logit_scale": 1.5}

    def everything(hidden, weight, bias, a, b):
        result = linear_token_logprobs(
            hidden, weight, labels, bias=bias, adapter=(a, b, 0.5), outputs=("log_probs", "entropy"), **options
        )
        return result.log_probs, result.entropy

    fast = each_backend == "triton"  # along random directions
    if frozen:

        def one(x):
            return linear_token_logprobs(x, weight, labels, bias=bias, adapter=(a, b, 0.5), **options)

        assert torch.autograd.gradcheck(one, leaves(hidden), fast_mode=fast)
        assert torch.autograd.gradcheck(lambda x: everything(x, weight, bias, a, b), leaves(hidden), fast_mode=fast)
    else:
        assert torch.autograd.gradcheck(everything, leaves(hidden, weight, bias, a, b), fast_mode=fast)


def test_only_requested_gradients_are_made(each_backend, small_tiles):
    hidden, weight, bias, labels = problem(((7,), 6, 90))
    a, b = torch.randn(2, 6), torch.randn(90, 2)
    tensors = [hidden, weight, bias, a, b]

    def run(tensors):
        return linear_token_logprobs(*tensors[:2], labels, bias=tensors[2], adapter=(*tensors[3:], 0.5))

    everything = leaves(*tensors)
    run(everything).sum().backward()
    for i in range(5):
        alone = [x.detach().clone().requires_grad_(i == j) for j, x in enumerate(tensors)]
        run(alone).sum().backward()
        assert [x.grad is not None for x in alone] == [i == j for j in range(5)]
        torch.testing.assert_close(alone[i].grad, everything[i].grad, rtol=1e-5, atol=1e-5)
    options = (0.5, 1.0, 0.0, 1.0, -100)
    log_probs, row_max, row_sum, entropy, *_, kept, unit = forward_op(*tensors, labels, *options, 0, False, 0)
    given = (log_probs, log_probs, row_max, row_sum, entropy, kept, unit)
    result = backward_op(*given, *tensors, labels, *options, 0.0, [False, False, True, False, False])
    assert [x.numel() for x in result] == [0, 0, 90, 0, 0]


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mixed_dtypes_are_widened(each_backend, small_tiles, dtype, weight_dtype):
    *tensors, labels = problem(((9,), 12, 100), dtype, weight_dtype=weight_dtype)
    a, b = leaves(*tensors, dtype=torch.float64), leaves(*tensors)
    truth = plain(*a, labels)["log_probs"]
    ours = linear_token_logprobs(b[0], b[1], labels, bias=b[2])
    assert ours.dtype == torch.float32 and (ours - truth).abs().max() < 1e-5
    truth.sum().backward()
    ours.sum().backward()
    for x, y in zip(b, a, strict=True):
        torch.testing.assert_close(x.grad, y.grad.to(x.dtype), rtol=2 * HAIR[x.dtype], atol=2 * HAIR[x.dtype])


def test_the_weight_gradient_is_summed_in_float32(small_tiles):
    hidden, weight, _, _ = problem(((600,), 4, 3), torch.bfloat16)
    labels = torch.zeros(600, dtype=torch.int64)
    a, b = leaves(hidden, weight)
    truth = leaves(hidden, weight, dtype=torch.float64)
    linear_token_logprobs(a, b, labels).sum().backward()
    plain(*truth, None, labels)["log_probs"].sum().backward()
    torch.testing.assert_close(b.grad, truth[1].grad.bfloat16(), rtol=2**-8, atol=0)  # one rounding, not 200


def test_ignored_positions_are_not_looked_at(each_backend, small_tiles):
    hidden, weight, bias, labels = problem(((3, 7), 8, 60))
    labels[:, :4] = -100
    hidden[:, :4] = float("nan")
    a, b, c = leaves(hidden, weight, bias)
    adapter = leaves(torch.randn(2, 8), torch.randn(60, 2))
    result = linear_token_logprobs(a, b, labels, bias=c, adapter=(*adapter, 1.0), outputs=OUTPUTS)
    (result.log_probs.sum() + result.entropy.sum()).backward()
    for name in OUTPUTS:
        assert (getattr(result, name)[:, :4] == 0).all()
    assert (a.grad[:, :4] == 0).all() and (a.grad[:, 4:] != 0).any()
    assert all(x.grad.isfinite().all() for x in (a, b, c, *adapter))
    (d,) = leaves(hidden)
    linear_token_logprobs(d, weight, labels, bias=bias).sum().backward()
    assert (d.grad[:, :4] == 0).all() and d.grad.isfinite().all()


@pytest.mark.parametrize(
    "labels", [torch.full((2, 3), -100), torch.zeros(0, 3, dtype=torch.int64)], ids=["ignored", "none"]
)
@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_to_score(each_backend, labels, frozen):
    hidden, weight, _, _ = problem((tuple(labels.shape), 4, 9))
    a, b = leaves(hidden, weight)
    b.requires_grad_(not frozen)
    result = linear_token_logprobs(a, b, labels, outputs=OUTPUTS, memory_budget=1 << 20)
    (result.log_probs.sum() + result.entropy.sum()).backward()
    assert result.log_probs.shape == labels.shape and not result.log_probs.any() and not result.is_top1.any()
    assert a.grad.shape == hidden.shape and not a.grad.any()
    assert frozen or (b.grad.shape == weight.shape and not b.grad.any())


@pytest.mark.parametrize("frozen", [False, True])
def test_the_entropy_alone_is_as_among_all_statistics(each_backend, small_tiles, frozen):
    hidden, weight, _, labels = problem(((9,), 8, 200), scale=3.0)
    results = []
    for outputs in (("log_probs", "entropy"), OUTPUTS):
        a, b = leaves(hidden, weight)
        b.requires_grad_(not frozen)
        result = linear_token_logprobs(a, b, labels, outputs=outputs)
        (result.log_probs.sum() + result.entropy.sum()).backward()
        results.append((result.log_probs.detach(), result.entropy.detach(), a.grad))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert result.mean_logits is not None
    if each_backend != "reference":
        made = forward_op(hidden, weight, None, None, None, labels, 1.0, 1.0, 0.0, 1.0, -100, empty.ENTROPY, frozen, 0)
        assert [x.shape == labels.shape for x in made[:7]] == [True] * 4 + [False] * 3


def test_another_ignore_index(each_backend):
    hidden, weight, _, labels = problem(((6,), 4, 9))
    labels[1] = labels[2] = 0
    result = linear_token_logprobs(hidden, weight, labels, ignore_index=0)
    assert result[1] == 0 and result[2] == 0
    torch.testing.assert_close(result, token_logprobs(hidden @ weight.T, labels, ignore_index=0))


def test_strided_hidden_and_weight(each_backend, small_tiles):
    hidden, weight, _, _ = problem(((3, 6, 2), 8, 50))
    for ignored in (False, True):
        labels = torch.randint(0, 50, (3, 5, 2))
        if ignored:
            labels[1, 2:] = -100
        for view in (hidden[:, :-1], hidden.transpose(0, 1)[:-1].transpose(0, 1), hidden[:1, :-1].expand(3, 5, 2, 8)):
            a, b = leaves(view.contiguous(), weight)
            whole, w = view.detach().requires_grad_(), weight.T.contiguous().T.requires_grad_()
            expected, result = linear_token_logprobs(a, b, labels), linear_token_logprobs(whole, w, labels)
            torch.testing.assert_close(result, expected)
            for x, y in zip(
                torch.autograd.grad(result.sum(), (whole, w)), torch.autograd.grad(expected.sum(), (a, b)), strict=True
            ):
                torch.testing.assert_close(x, y)
    label = torch.tensor(3)
    torch.testing.assert_close(
        linear_token_logprobs(torch.stack([hidden[0, 0, 0]] * 2, -1)[:, 0], weight, label),
        linear_token_logprobs(hidden[:1, 0, 0], weight, label[None])[0],
    )


def test_adapter_equals_the_merged_weight(each_backend, small_tiles):
    hidden, weight, bias, labels = problem(((4, 5), 8, 100))
    a, b = torch.randn(3, 8), torch.randn(100, 3)
    h, w, a, b = leaves(hidden, weight, a, b)
    options = {"bias": bias, "softcap": 6.0, "outputs": ("log_probs", "entropy")}
    merged = linear_token_logprobs(h, w + 0.7 * b @ a, labels, **options)
    ours = linear_token_logprobs(h, w, labels, adapter=(a, b, 0.7), **options)
    for x, y in zip(merged[:2], ours[:2], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    loss = lambda found: (found.log_probs * 0.5 + found.entropy).sum()  # noqa: E731
    expected, found = (torch.autograd.grad(loss(x), (h, w, a, b), retain_graph=True) for x in (merged, ours))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    (frozen,) = leaves(hidden)
    linear_token_logprobs(frozen, weight, labels, adapter=(a.detach(), b.detach(), 0.7)).sum().backward()
    (expected,) = torch.autograd.grad(linear_token_logprobs(h, weight + 0.7 * b @ a, labels).sum(), (h,))
    torch.testing.assert_close(frozen.grad, expected, rtol=1e-4, atol=1e-5)


def test_rows_without_a_gradient_are_skipped(each_backend, small_tiles):
    hidden, weight, _, labels = problem(((9,), 8, 100))
    weights = torch.tensor([1.0, 0, 0, 2, 0, 0, 0, 1, 0])
    a, b = leaves(hidden, weight)
    (linear_token_logprobs(a, b, labels) * weights).sum().backward()
    c, d = leaves(hidden, weight)
    (token_logprobs(c @ d.T, labels) * weights).sum().backward()
    torch.testing.assert_close(a.grad, c.grad)
    torch.testing.assert_close(b.grad, d.grad)
    assert (a.grad[weights == 0] == 0).all()
    if each_backend == "reference":
        return
    hidden[2] = float("nan")  # its loss has no weight: neither has its NaN
    for memory_budget in (0, 1 << 20):
        a, b = leaves(hidden, weight)
        (linear_token_logprobs(a, b, labels, memory_budget=memory_budget)[[0, 3, 7]]).sum().backward()
        assert a.grad.isfinite().all() and b.grad.isfinite().all()


def test_masked_vocabulary_and_nan_stay_in_their_row(each_backend, small_tiles):
    hidden, weight, bias, labels = problem(((5,), 8, 100))
    labels[:] = torch.tensor([2, 3, 90, 1, 4])
    bias[50:90] = NEG_INF
    hidden[3] = float("nan")
    for frozen in (False, True):
        (a,) = leaves(hidden)
        (b,) = leaves(weight)
        result = linear_token_logprobs(a, weight if frozen else b, labels, bias=bias)
        result.sum().backward()
        expected = (hidden @ weight.T + bias).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        torch.testing.assert_close(result, expected, equal_nan=True)
        assert result[3].isnan() and a.grad[3].isnan().all() and a.grad[[0, 1, 2, 4]].isfinite().all()
    (a,) = leaves(hidden)
    everything = linear_token_logprobs(a, weight, labels, bias=torch.full((100,), NEG_INF))
    everything[:3].sum().backward()
    assert (everything[:3] == 0).all() and (a.grad[:3] == 0).all()


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.8}, {"logit_scale": 0.25}], ids=str)
def test_equals_trls_chunked_head(each_backend, options):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    hidden, weight, bias, labels = problem(((9,), 16, 301), scale=3.0)
    labels = labels.clamp(min=0)
    a, b = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    requested = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    theirs = ChunkedLogProbFunction.apply(
        *a,
        labels,
        options.get("temperature", 1.0),
        128,
        options.get("softcap"),
        options.get("logit_scale", 1.0),
        requested,
    )
    ours = linear_token_logprobs(b[0], b[1], labels, bias=b[2], outputs=OUTPUTS, **options)
    for name, value in zip(("log_probs", *requested), theirs, strict=True):
        torch.testing.assert_close(
            getattr(ours, name), value, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    (theirs[0].sum() + 0.2 * theirs[1].sum()).backward()
    (ours.log_probs.sum() + 0.2 * ours.entropy.sum()).backward()
    for x, y in zip(b, a, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)


@given(
    tokens=st.integers(0, 9),
    width=st.integers(1, 40),
    vocab=st.integers(1, 300),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-10, 1.0, 30.0, 1e3]),
    ignored=st.floats(0, 1),
    rows=st.integers(1, 10),
    columns=st.integers(1, 300),
)
@settings(max_examples=80)
def test_any_shape_tile_and_scale(tokens, width, vocab, seed, scale, ignored, rows, columns):
    hidden, weight, bias, labels = problem(((tokens,), width, vocab), scale=scale, seed=seed)
    labels[torch.rand(tokens) < ignored] = -100
    before = head.TOKENS, head.VOCAB
    head.TOKENS, head.VOCAB = rows, columns
    try:
        for learns in ((True, True, True), (True, False, False)):
            a, b, c = (
                leaves(hidden, weight, bias, dtype=torch.float64),
                leaves(hidden, weight, bias),
                leaves(hidden, weight, bias),
            )
            for group in (a, b, c):
                for x, learn in zip(group, learns, strict=True):
                    x.requires_grad_(learn)
            truth, theirs = plain(*a, labels)["log_probs"], plain(*b, labels)["log_probs"]
            ours = linear_token_logprobs(c[0], c[1], labels, bias=c[2])
            assert_as_good_as_torch(ours.detach(), theirs.detach(), truth.detach(), 3e-6)
            for result in (truth, theirs, ours):
                result.sum().backward()
            for x, y, z, learn in zip(c, b, a, learns, strict=True):
                if learn:
                    assert_as_good_as_torch(x.grad, y.grad, z.grad, 5e-6 * max(1.0, scale))
    finally:
        head.TOKENS, head.VOCAB = before


def test_grad_filter_drops_what_is_small(each_backend, monkeypatch):
    """Against the definition: entries with p below the filter are 0, save the label's; and columns are left out."""
    if each_backend == "reference":
        pytest.skip("the reference has no filter")
    monkeypatch.setitem(layout.BLOCKS, torch.float32, layout.Blocks(16, 1024, 16, 1, 1))
    hidden, weight, bias, labels = problem(((40,), 8, 3000), scale=6.0)
    eps = 2.0**-8
    for chosen in (bias, torch.arange(3000) * -0.02):  # the second: half the vocabulary falls out whole
        logits = hidden @ weight.T + chosen
        p = logits.softmax(-1)
        scored = (labels != -100).float()[:, None]
        d = F.one_hot(labels.clamp(min=0), 3000) - p
        d = d * ((p >= eps) | (F.one_hot(labels.clamp(min=0), 3000) == 1)) * scored
        a, b, c = leaves(hidden, weight, chosen)
        exact = linear_token_logprobs(a, b, labels, bias=c)
        result = linear_token_logprobs(a, b, labels, bias=c, grad_filter=eps)
        assert torch.equal(result, exact)
        grads = torch.autograd.grad(result.sum(), (a, b, c))
        for x, y in zip(grads, (d @ weight, d.T @ hidden, d.sum(0)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert (grads[1][2500:].abs().sum(-1) == 0).float().mean() > 0.9
    tiny = torch.autograd.grad(linear_token_logprobs(a, b, labels, bias=c, grad_filter=1e-30).sum(), (a, b, c))
    for x, y in zip(tiny, torch.autograd.grad(exact.sum(), (a, b, c)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=3e-6)


@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 40),
    vocab=st.integers(1, 300),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-10, 1.0, 30.0, 1e3]),
    ignored=st.floats(0, 1),
    columns=st.sampled_from([16, 64]),
    workspace=st.integers(1, 1 << 14),
    group=st.integers(1, 3),
    split=st.integers(1, 3),
    frozen=st.booleans(),
    budget=st.sampled_from([0, 2000, 1 << 20]),
)
@settings(max_examples=8)
def test_any_grid_of_triton_blocks(
    tokens, width, vocab, seed, scale, ignored, columns, workspace, group, split, frozen, budget
):
    hidden, weight, bias, labels = problem(((tokens,), width, vocab), scale=scale, seed=seed)
    labels[torch.rand(tokens) < ignored] = -100
    a, b = leaves(hidden, weight, bias, dtype=torch.float64), leaves(hidden, weight, bias)
    with pytest.MonkeyPatch.context() as patch, fastalign.use_backend("triton"):
        blocks = layout.Blocks(16, columns, 16, 1, 1)
        patch.setattr(layout, "BLOCKS", {torch.float32: blocks})
        sizes = {"WORKSPACE": workspace, "WORKSPACE_WIDTH": 1, "GROUP_BYTES": group * 16 * width * 4}
        for name, value in sizes.items():
            patch.setattr(layout, name, value)
        patch.setattr(kept_tiles, "STEP", columns)
        for name, value in (("SPLIT", split), ("PROGRAMS", 1)):
            patch.setattr(gpu_head, name, value)
        if frozen:
            b = [b[0], b[1].detach(), b[2].detach()]
        options = {"outputs": ("log_probs", "entropy"), "memory_budget": budget}
        ours = linear_token_logprobs(b[0], b[1], labels, bias=b[2], **options)
        (ours.log_probs.sum() + 0.1 * ours.entropy[::2].sum()).backward()
    truth = plain(*a, labels)
    (truth["log_probs"].sum() + 0.1 * truth["entropy"][::2].sum()).backward()
    torch.testing.assert_close(ours.log_probs.double(), truth["log_probs"], rtol=1e-6, atol=1e-5 * max(1.0, scale))
    for x, y in zip(b, a, strict=True):
        if x.requires_grad:
            torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-4 * max(1.0, scale))


@pytest.mark.parametrize("frozen", [False, True])
def test_small_gradients_survive_float16_tiles(small_tiles, frozen):
    """A mean over many tokens: the gradient of a logit is far below what float16 can hold."""
    hidden, weight, _, labels = problem(((20,), 12, 1500), torch.float16)
    a, b = leaves(hidden, weight), leaves(hidden, weight, dtype=torch.float64)
    a[1].requires_grad_(not frozen)
    with fastalign.use_backend("triton"):
        result = linear_token_logprobs(*a, labels, outputs=("log_probs", "entropy"))
        inputs = a[: 1 if frozen else 2]
        grads = torch.autograd.grad(result.log_probs.sum() * 1e-3, inputs)
    expected = torch.autograd.grad(plain(*b, None, labels)["log_probs"].sum() * 1e-3, b)
    for x, y in zip(grads, expected, strict=False):
        # The result is float16 itself: 2^-24 apart where it is small.
        assert ((x.double() - y).abs() <= 2.0**-24 + 2e-3 * y.abs().clamp_min(1e-4)).all()


def test_triton_gives_nan_where_it_cannot_raise(monkeypatch, small_tiles):
    hidden, weight, _, _ = problem(((4,), 8, 100))
    labels = torch.tensor([3, 100, -1, 99])
    monkeypatch.setattr(checks, "labels_in_range", lambda *_: None)
    for frozen in (False, True):
        (a,) = leaves(hidden)
        with fastalign.use_backend("triton"):
            result = linear_token_logprobs(a, weight.clone().requires_grad_(not frozen), labels)
        result[[0, 3]].sum().backward()
        assert result.isnan().tolist() == [False, True, True, False] and a.grad[[0, 3]].isfinite().all()


def test_same_bits_again_and_near_ones_at_any_thread_count():
    hidden, weight, _, labels = problem(((70,), 24, 5000), scale=3.0)
    before, result = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 2, 3):
            torch.set_num_threads(threads)
            a, b = leaves(hidden, weight)
            out = linear_token_logprobs(a, b, labels)
            out.sum().backward()
            result.append((out.detach(), a.grad, b.grad))
    finally:
        torch.set_num_threads(before)
    for i, j in ((0, 1), (2, 3)):
        assert all(torch.equal(x, y) for x, y in zip(result[i], result[j], strict=True))
    for other in result[2:]:  # the native kernels give the same bits; torch's products may not
        for x, y in zip(other, result[0], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_func_grad_vmap_and_compile(frozen):
    hidden, weight, _, labels = problem(((4, 6), 8, 31))
    labels = labels.clamp(min=0)
    loss = lambda x, w, y: linear_token_logprobs(x, w, y).sum()  # noqa: E731
    wanted = 0 if frozen else (0, 1)
    a, b = leaves(hidden, weight)
    expected = torch.autograd.grad(token_logprobs(a @ b.T, labels).sum(), (a, b))
    result = torch.func.grad(loss, argnums=wanted)(hidden, weight, labels)
    result = (result,) if frozen else result
    for x, y in zip(result, expected, strict=False):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    result = torch.func.vmap(torch.func.grad(loss, argnums=wanted), in_dims=(0, None, 0))(hidden, weight, labels)
    result = (result,) if frozen else (result[0], result[1].sum(0))
    for x, y in zip(result, expected, strict=False):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    a, b = leaves(hidden, weight)
    b.requires_grad_(not frozen)
    torch.compile(loss, fullgraph=True, backend="aot_eager")(a, b, labels).backward()
    torch.testing.assert_close(a.grad, expected[0], atol=1e-5, rtol=1e-5)
    if not frozen:
        torch.testing.assert_close(b.grad, expected[1], atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError):  # never a silent zero
        torch.func.jvp(lambda x: loss(x, weight, labels), (hidden,), (hidden,))


def test_compiles_with_every_option():
    hidden, weight, bias, labels = problem(((4, 6), 8, 31))
    a, b = torch.randn(2, 8), torch.randn(31, 2)

    def run(hidden, weight, bias, a, b, labels):
        return linear_token_logprobs(
            hidden,
            weight,
            labels,
            bias=bias,
            adapter=(a, b, 0.5),
            temperature=0.9,
            softcap=5.0,
            logit_scale=1.1,
            outputs=OUTPUTS,
            memory_budget=1 << 20,
            grad_filter=1e-6,
        )

    one, two = leaves(hidden, weight, bias, a, b), leaves(hidden, weight, bias, a, b)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    expected, result = run(*one, labels), compiled(*two, labels)
    for x, y in zip(expected, result, strict=True):
        torch.testing.assert_close(x, y)
    for out in (expected, result):
        (out.log_probs.sum() + out.entropy.sum()).backward()
    for x, y in zip(one, two, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("statistics", [0, empty.ENTROPY, empty.ALL])
def test_opcheck(each_backend, statistics, unit):
    if each_backend == "reference":
        pytest.skip("it is no op")
    hidden, weight, bias, labels = problem(((3, 2), 8, 17))
    a, b = torch.randn(2, 8), torch.randn(17, 2)
    checks = ("test_schema", "test_faketensor")
    tensors, options = (hidden, weight, bias, a, b, labels), (0.5, 0.9, 0.0, 1.0, -100)
    forward = (*tensors, *options, statistics, unit, 0)  # kept tiles are given up, which a schema cannot say
    torch.library.opcheck(forward_op, forward, test_utils=checks)
    log_probs, row_max, row_sum, entropy, *_, kept, unit_gradient = forward_op(*forward)
    for needs in ([True] * 5, [True] + [False] * 4):
        backward = (
            log_probs,
            torch.zeros_like(log_probs),
            row_max,
            row_sum,
            entropy,
            kept,
            unit_gradient,
            *tensors,
            *options,
            0.0,
            needs,
        )
        torch.library.opcheck(backward_op, backward, test_utils=checks)


def test_autocast_changes_nothing(each_backend):
    hidden, weight, _, labels = problem(((6,), 64, 100), scale=3.0)
    results = []
    for enabled in (False, True):
        a, b, c, d = leaves(hidden, weight, torch.ones(2, 64), torch.ones(100, 2))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = linear_token_logprobs(a, b, labels, adapter=(c, d, 0.1))
        out.sum().backward()
        results.append((out.detach(), a.grad, b.grad, c.grad, d.grad))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # what a model hands on under it
        mixed = linear_token_logprobs(hidden.bfloat16(), weight, labels)
    assert mixed.dtype == torch.float32 and (mixed - results[0][0]).abs().max() < 20


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing(each_backend, reentrant, frozen):
    hidden, weight, _, labels = problem(((6,), 8, 100))
    grads = []
    for saved in (False, True):
        a, b = leaves(hidden, weight)
        b.requires_grad_(not frozen)
        step = lambda x, b=b: linear_token_logprobs(torch.tanh(x), b, labels)  # noqa: E731
        out = checkpoint(step, a, use_reentrant=reentrant) if saved else step(a)
        out.sum().backward()
        grads.append((a.grad, b.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert frozen or torch.equal(grads[0][1], grads[1][1])


def test_entropy_that_is_only_looked_at_costs_no_exactness(each_backend):
    hidden, weight, _, labels = problem(((6,), 8, 100))
    (a,), (b,) = leaves(hidden), leaves(hidden)
    linear_token_logprobs(a, weight, labels).sum().backward()
    linear_token_logprobs(b, weight, labels, outputs=OUTPUTS).log_probs.sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    (c,), (d,) = leaves(hidden), leaves(hidden)
    linear_token_logprobs(c, weight, labels, outputs=("entropy",)).entropy.sum().backward()
    token_logprobs(d @ weight.T, labels, outputs=("entropy",)).entropy.sum().backward()
    torch.testing.assert_close(c.grad, d.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"hidden": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "hidden must be float32, float64"),
        ({"hidden": torch.zeros(2, 0)}, UserError, "hidden must have shape (..., H) with H >= 1, got (2, 0)"),
        ({"hidden": torch.zeros(2, 5)}, UserError, "hidden.shape[-1] must equal weight.shape[1], got 5 and 3"),
        ({"hidden": torch.zeros(2, 3).double()}, TypeError,
         "weight must be float64 if hidden is torch.float64, got torch.float32"),
        ({"weight": torch.zeros(4, 3).double()}, TypeError,
         "weight must be float32, bfloat16 or float16 if hidden is torch.float32"),
        ({"weight": torch.zeros(3)}, UserError, "weight must have shape (V, H) with no size 0, got (3,)"),
        ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, UserError,
         "labels.shape must equal hidden.shape[:-1], got (3,) and (2,)"),
        ({"labels": torch.zeros(2)}, TypeError, "labels must be int64, got torch.float32"),
        ({"labels": torch.tensor([0, 4])}, UserError,
         "labels must be in [0, 4) or ignore_index -100, got 4 at position 1"),
        ({"bias": torch.zeros(5)}, UserError, "bias.shape[0] must equal weight.shape[0], got 5 and 4"),
        ({"adapter": torch.zeros(5)}, TypeError, "adapter must be (A, B, scale) with a number as scale, got Tensor"),
        ({"adapter": (torch.zeros(2, 3), torch.zeros(5, 2), 1.0)}, UserError,
         "must fit weight (V, H), got (2, 3), (5, 2) and (4, 3)"),
        ({"temperature": 0.0}, UserError, "temperature must be a positive finite number, got 0.0"),
        ({"logit_scale": -1.0}, UserError, "logit_scale must be a positive finite number, got -1.0"),
        ({"softcap": -1.0}, UserError, "softcap must be a positive finite number, got -1.0"),
        ({"outputs": ("logprobs",)}, UserError, "outputs must be some of log_probs, entropy"),
        ({"grad_filter": 1.5}, UserError, "grad_filter must be a number between 0 and 1, or None, got 1.5"),
        ({"memory_budget": -1}, UserError, "memory_budget must be a number of bytes, at least 0, or None, got -1"),
    ],
)  # fmt: skip
def test_mistakes_are_reported_in_one_line(each_backend, change, error, says):
    arguments = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(4, 3), "labels": torch.tensor([0, 3])} | change
    with pytest.raises(error) as raised:
        linear_token_logprobs(**arguments)
    assert says in str(raised.value) and "\n" not in str(raised.value)
