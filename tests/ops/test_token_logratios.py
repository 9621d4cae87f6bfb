import pytest
import torch
from numerics import HAIR, assert_as_good_as_torch

from fastalign import UserError, reference, use_backend
from fastalign.ops import token_logprobs, token_logratios
from fastalign.ops.token_logratios import forward_op


def problem(shape, dtype):
    torch.manual_seed(3)
    policy, ref = (torch.randn(shape, dtype=torch.float64).mul(3).to(dtype) for _ in range(2))
    labels = torch.randint(0, shape[-1], shape[:-1])
    labels.view(-1)[0] = -100
    return policy, ref, labels


@pytest.mark.parametrize("dtype", HAIR, ids=str)
@pytest.mark.parametrize("shape", [(4, 1024), (2, 3, 501), (5, 1)], ids=str)
def test_values_and_gradients_of_both_sides(each_backend, shape, dtype):
    policy, ref, labels = problem(shape, dtype)
    sides = {}
    for name, convert in (("truth", torch.float64), ("torch", dtype), ("ours", dtype)):
        pair = [x.to(convert, copy=True).requires_grad_() for x in (policy, ref)]
        f = token_logratios if name == "ours" else reference.token_logratios
        out = f(*pair, labels, temperature=0.8)
        out.pow(2).sum().backward()
        sides[name] = [out.detach(), *(x.grad for x in pair)]
    hairs = [HAIR[torch.float64 if dtype == torch.float64 else torch.float32] * 4] + [HAIR[dtype] * 4] * 2
    for what, hair, ours, theirs, truth in zip(
        ("ratio", "policy grad", "ref grad"), hairs, sides["ours"], sides["torch"], sides["truth"], strict=True
    ):
        assert_as_good_as_torch(ours, theirs, truth, hair, what)


def test_is_the_difference_of_log_probs_and_zero_for_equals(each_backend):
    policy, ref, labels = problem((3, 4, 77), torch.float32)
    expected = token_logprobs(policy, labels) - token_logprobs(ref, labels)
    torch.testing.assert_close(token_logratios(policy, ref, labels), expected)
    assert (token_logratios(policy, policy, labels) == 0).all()


def test_only_the_asked_gradient_is_made():
    policy, ref, labels = problem((3, 50), torch.float32)
    policy.requires_grad_()
    token_logratios(policy, ref, labels).sum().backward()
    assert policy.grad is not None and ref.grad is None
    assert (policy.grad[0] == 0).all()  # ignored


def test_gradcheck_compile_and_opcheck():
    policy, ref, labels = problem((2, 3, 9), torch.float64)
    policy.requires_grad_()
    ref.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: token_logratios(a, b, labels, temperature=1.7), (policy, ref))
    compiled = torch.compile(token_logratios, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(policy, ref, labels), token_logratios(policy, ref, labels))
    arguments = (policy.detach(), ref.detach(), labels, 1.0, -100)
    torch.library.opcheck(forward_op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_mistakes_are_reported_in_one_line(each_backend):
    a, y = torch.zeros(2, 4), torch.tensor([0, 3])
    with pytest.raises(UserError, match=r"ref_logits.shape must equal policy_logits.shape, got \(2, 5\) and \(2, 4\)"):
        token_logratios(a, torch.zeros(2, 5), y)
    with pytest.raises(UserError, match=r"ref_logits.dtype must equal policy_logits.dtype"):
        token_logratios(a, a.double(), y)
    with pytest.raises(UserError, match=r"labels must be in \[0, 4\)"):
        token_logratios(a, a, torch.tensor([0, 9]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_many_blocks_and_two_strides(monkeypatch, dtype):
    monkeypatch.setattr(pytest.importorskip("fastalign.kernels._rows"), "THREADS", 4)
    policy, ref, labels = problem((3, 5, 301), dtype)
    policy[1, 2] = float("-inf")
    ref[2, 1, 7] = float("nan")
    labels[2, 1] = 3
    wide = torch.stack([ref.transpose(0, 1)] * 2, -1)[..., 0]  # other strides than the policy's, the last one 2
    pair = [policy[:, 1:].requires_grad_(), wide.transpose(0, 1)[:, 1:].requires_grad_()]
    truth_in = [x.detach().double().requires_grad_() for x in pair]
    with use_backend("triton"):
        ours = token_logratios(*pair, labels[:, 1:])
        ours[:2].sum().backward()
    truth = reference.token_logratios(*truth_in, labels[:, 1:])
    truth[:2].sum().backward()
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5, equal_nan=True)
    for x, y in zip(pair, truth_in, strict=True):
        torch.testing.assert_close(x.grad[:2].double(), y.grad[:2], rtol=1e-2, atol=HAIR[dtype])
