import pytest
import torch
from numerics import HAIR, assert_as_good_as_torch

from fastalign import UserError, reference
from fastalign.ops import linear_token_logratios, token_logratios


def problem(dtype=torch.float64, shape=(3, 7), sizes=(12, 20), vocab=61):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    hidden, weight = normal(*shape, sizes[0]), normal(vocab, sizes[0], scale=0.5)
    ref_hidden, ref_weight = normal(*shape, sizes[1]), normal(vocab, sizes[1], scale=0.4)
    labels = torch.randint(0, vocab, shape, generator=generator)
    labels[..., 0] = -100
    return hidden, weight, ref_hidden, ref_weight, labels


@pytest.mark.parametrize("dtype", HAIR, ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (1,), (2, 1, 33)], ids=str)
def test_values_and_gradients(each_backend, shape, dtype):
    *inputs, labels = problem(dtype, shape)
    bias = torch.linspace(-1, 1, 61, dtype=torch.float64).to(dtype)
    sides = {}
    for name, convert in (("truth", torch.float64), ("torch", dtype), ("ours", dtype)):
        h, w, rh, rw = (x.to(convert, copy=True).requires_grad_() for x in inputs)
        b = bias.to(convert)
        if name == "ours":
            out = linear_token_logratios(h, w, rh, rw, labels, bias=b, ref_bias=-b, temperature=0.8)
        else:
            z, z0 = (torch.nn.functional.linear(*pair) for pair in ((h, w, b), (rh, rw, -b)))
            out = reference.token_logratios(z, z0.detach(), labels, 0.8)
        out.double().pow(2).sum().backward()
        sides[name] = (out.detach(), h.grad, w.grad)
        assert name != "ours" or (rh.grad is None and rw.grad is None)
    size = 1 + float(sides["truth"][2].abs().max())
    hairs = [
        HAIR[torch.float64 if dtype == torch.float64 else torch.float32] * 4,
        HAIR[dtype] * 4,
        HAIR[dtype] * 4 * size,
    ]
    for what, hair, ours, theirs, truth in zip(
        ("ratio", "hidden grad", "weight grad"), hairs, sides["ours"], sides["torch"], sides["truth"], strict=True
    ):
        assert_as_good_as_torch(ours, theirs, truth, hair, what)


def test_equals_the_ratios_of_the_logits(each_backend):
    hidden, weight, ref_hidden, ref_weight, labels = problem()
    expected = token_logratios(hidden @ weight.T, ref_hidden @ ref_weight.T, labels, temperature=1.3)
    result = linear_token_logratios(hidden, weight, ref_hidden, ref_weight, labels, temperature=1.3)
    torch.testing.assert_close(result, expected)
    assert (result[..., 0] == 0).all()
    assert (linear_token_logratios(hidden, weight, hidden, weight, labels) == 0).all()


def test_options_reach_both_sides(each_backend):
    hidden, weight, ref_hidden, ref_weight, labels = problem()
    a, b = torch.randn(2, 12, dtype=torch.float64), torch.randn(61, 2, dtype=torch.float64)
    z, z0 = hidden @ (weight + 0.5 * b @ a).T, ref_hidden @ ref_weight.T
    softcapped = [reference.transform_logits(0.7 * x, 1.0, 4.0) for x in (z, z0)]
    result = linear_token_logratios(
        hidden, weight, ref_hidden, ref_weight, labels, softcap=4.0, logit_scale=0.7, adapter=(a, b, 0.5)
    )
    torch.testing.assert_close(result, token_logratios(*softcapped, labels))


def test_gradcheck_compile_and_func_grad():
    hidden, weight, ref_hidden, ref_weight, labels = problem(shape=(2, 3), vocab=9)
    loss = lambda h, w: linear_token_logratios(h, w, ref_hidden, ref_weight, labels).square().sum()  # noqa: E731
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    assert torch.autograd.gradcheck(loss, leaves)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(hidden, weight), expected)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


def test_mistakes_are_reported_in_one_line(each_backend):
    hidden, weight, ref_hidden, ref_weight, labels = problem()
    for change, says in (
        (
            (hidden, weight, ref_hidden[:2], ref_weight),
            r"ref_hidden.shape\[:-1\] must equal hidden.shape\[:-1\], got \(2, 7\) and \(3, 7\)",
        ),
        (
            (hidden, weight, ref_hidden, ref_weight[:5]),
            r"ref_weight.shape\[0\] must equal weight.shape\[0\], got 5 and 61",
        ),
        ((hidden, weight, ref_hidden, weight), r"ref_hidden.shape\[-1\] must equal ref_weight.shape\[1\]"),
        (
            (hidden, ref_weight, ref_hidden, ref_weight),
            r"hidden.shape\[-1\] must equal weight.shape\[1\], got 12 and 20",
        ),
    ):
        with pytest.raises(UserError, match=says):
            linear_token_logratios(*change, labels)
    with pytest.raises(TypeError, match=r"ref_hidden must be a torch.Tensor, got NoneType"):
        linear_token_logratios(hidden, weight, None, ref_weight, labels)
