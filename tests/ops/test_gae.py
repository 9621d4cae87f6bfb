import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import HAIR, assert_as_good_as_torch
from turns import on_its_day

import fastalign.backend
from fastalign import UserError, reference, use_backend
from fastalign.ops import gae
from fastalign.ops.gae import gae_op

NAN = float("nan")
SHAPES = [(1, 1), (3, 7), (4, 16), (5, 33), (2, 3, 129), (3, 300), (6,), (0, 5)]


def masks(shape, seed=0):
    """Full, right-padded, left-padded, holes of every length, sparse, empty."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(shape[-1]).expand(shape)
    cut = torch.randint(0, shape[-1] + 1, (*shape[:-1], 1), generator=generator)
    noise = torch.rand(shape, generator=generator)
    blocks = torch.rand((*shape[:-1], shape[-1] // 11 + 1), generator=generator).repeat_interleave(11, -1)
    return {
        "full": torch.ones(shape, dtype=torch.bool),
        "right": place < cut,
        "left": place >= cut,
        "holes": blocks[..., : shape[-1]] > 0.4,
        "sparse": noise > 0.7,
        "empty": torch.zeros(shape, dtype=torch.bool),
    }


def problem(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return rewards, values


def by_definition(rewards, values, mask, gamma, lam):
    """Each advantage as the double sum of eq. 16 over the valid places of one row, in Python floats."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for row in range(len(rewards)):
        places = mask[row].nonzero().flatten().tolist()
        r, v = rewards[row, places].tolist(), values[row, places].tolist() + [0.0]
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(places))]
        for i, place in enumerate(places):
            advantages[row, place] = sum((gamma * lam) ** k * d for k, d in enumerate(delta[i:]))
            returns[row, place] = advantages[row, place] + v[i]
    return advantages, returns


@pytest.mark.parametrize("kind", list(masks((1, 1))))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.99, 0.0), (0.0, 0.5), (1.0, 1.0)])
def test_equals_the_papers_sum(each_backend, gamma, lam, kind):
    rewards, values = problem((9, 45))
    mask = masks((9, 45))[kind]
    result = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for ours, truth in zip(result, by_definition(rewards, values, mask, gamma, lam), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.slow_matrix
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_further_from_the_truth_than_torch(each_backend, shape, dtype):
    rewards, values = problem(shape, dtype)
    for kind, mask in masks(shape).items():
        truth = reference.gae(rewards.double(), values.double(), mask, 0.99, 0.95)
        theirs = reference.gae(rewards, values, mask, 0.99, 0.95)
        ours = gae(rewards, values, mask, gamma=0.99, lam=0.95)
        for name, a, b, c in zip(("advantages", "returns"), ours, theirs, truth, strict=True):
            assert a.dtype == dtype
            assert_as_good_as_torch(a, b, c, HAIR[dtype], f"{kind} {name}")
            assert (a[~mask] == 0).all()


@given(st.integers(1, 4), st.integers(1, 70), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_engine_equals_reference(rows, length, valid, gamma, lam, seed):
    rewards, values = problem((rows, length), seed=seed)
    mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < valid
    with use_backend("cpu"):
        ours = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for a, b in zip(ours, reference.gae(rewards, values, mask, gamma, lam), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    st.sampled_from([0.0, 1e-30, 0.5, 1.0]),
)
def test_extreme_rewards(numbers, lam):
    rewards = torch.tensor([numbers])
    values = rewards.flip(-1)
    mask = torch.ones_like(rewards).bool()
    truth = reference.gae(rewards.double(), values.double(), mask, 1.0, lam)
    size = rewards.abs().max().double() + 1
    for a, b in zip(gae(rewards, values, mask, lam=lam), truth, strict=True):
        assert ((a.double() - b).abs() <= 1e-6 * len(numbers) * size).all()


def test_masked_places_are_never_used(each_backend):
    rewards, values = problem((5, 50))
    mask = masks((5, 50))["holes"]
    expected = gae(rewards, values, mask)
    dirty = [x.masked_fill(~mask, bad) for x, bad in ((rewards, NAN), (values, float("inf")))]
    for a, b in zip(gae(*dirty, mask), expected, strict=True):
        assert torch.equal(a, b)
    packed = gae(rewards[1, mask[1]], values[1, mask[1]], mask[1][mask[1]])
    torch.testing.assert_close(expected[0][1, mask[1]], packed[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["full", "holes", "sparse"])
@pytest.mark.parametrize("length", [16, 32, 57])
def test_rows_of_many_blocks(monkeypatch, length, kind):
    """The Triton kernel in the interpreter, what is carried from one block to the one before it."""
    monkeypatch.setattr(pytest.importorskip("fastalign.kernels.gae"), "BLOCK_BYTES", 64)
    rewards, values = problem((3, length))
    mask = masks((3, length))[kind]
    mask[1, length // 2 - 8 : length // 2 + 16] = False  # a whole block
    rewards[2, length // 3] = NAN
    mask[2, length // 3] = True
    with use_backend("triton"):
        result = gae(rewards, values.T.contiguous().T, mask.T.contiguous().T, gamma=0.9, lam=0.8)
    for ours, truth in zip(result, reference.gae(rewards, values, mask, 0.9, 0.8), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_a_nan_stays_in_its_row_and_goes_only_back(each_backend):
    rewards, values = problem((3, 60))
    rewards[1, 37] = NAN
    advantages, returns = gae(rewards, values, torch.ones(3, 60))
    for x in (advantages, returns):
        assert x[1, :38].isnan().all() and x[1, 38:].isfinite().all() and x[[0, 2]].isfinite().all()


def test_dtypes_strides_and_number_masks(each_backend):
    rewards, values = problem((4, 30))
    mask = masks((4, 30))["right"]
    expected = gae(rewards, values, mask)
    wide = torch.cat([values, values.new_full((4, 1), NAN)], -1)
    for kind in (mask, mask.long(), mask.float()):
        assert torch.equal(gae(rewards, wide[:, :-1], kind)[0], expected[0])
    assert torch.equal(gae(rewards.T.contiguous().T, values, mask)[1], expected[1])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        advantages, returns = gae(rewards.to(dtype), values.float(), mask)
        assert advantages.dtype == returns.dtype == torch.float32
        torch.testing.assert_close(advantages, gae(rewards.to(dtype).float(), values.float(), mask)[0])
    assert gae(rewards, values.bfloat16(), mask)[0].dtype == torch.float64


def test_equals_the_python_loop_of_older_trl(each_backend):
    """The recurrence as PPO trainers wrote it out, on rows without holes."""
    rewards, values = problem((6, 40), torch.float32)
    last, reversed_advantages = 0, []
    for t in reversed(range(40)):
        nextvalues = values[:, t + 1] if t < 39 else 0.0
        delta = rewards[:, t] + 0.98 * nextvalues - values[:, t]
        last = delta + 0.98 * 0.9 * last
        reversed_advantages.append(last)
    expected = torch.stack(reversed_advantages[::-1], 1)
    advantages, returns = gae(rewards, values, torch.ones(6, 40), gamma=0.98, lam=0.9)
    torch.testing.assert_close(advantages, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(returns, expected + values, rtol=1e-6, atol=1e-6)


def test_the_same_bits_at_any_thread_count():
    rewards, values = problem((13, 301), torch.float32)
    mask = masks((13, 301))["holes"]
    before, result = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result.append(gae(rewards, values, mask))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in result[1:] for a, b in zip(other, result[0], strict=True))


LEVELS = """
import torch, fastalign.backend
from fastalign import reference
from fastalign.ops import gae
torch.manual_seed(0)
worst = 0.0
for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
    for length in (1, 15, 16, 67, 300):
        r, v = torch.randn(5, length, dtype=dtype), torch.randn(5, length, dtype=dtype)
        for mask in (torch.ones(5, length).bool(), torch.rand(5, length) > 0.1):
            truth = reference.gae(r.double(), v.double(), mask, 0.99, 0.95)
            for a, b in zip(gae(r, v, mask, gamma=0.99), truth):
                worst = max(worst, float((a - b).abs().max() / bound))
print(fastalign.backend.native.active_isa(), worst)
"""


@on_its_day("levels: losses")
@pytest.mark.skipif(fastalign.backend.native is None, reason="the native extension is not built")
def test_every_instruction_set():
    for isa in fastalign.backend.native.available_isas():
        done = subprocess.run(
            [sys.executable, "-c", LEVELS], env=os.environ | {"FASTALIGN_ISA": isa}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        name, worst = done.stdout.split()
        assert name == isa and float(worst) < 1, done.stdout


def test_no_gradient_compile_vmap_and_opcheck():
    rewards, values = problem((4, 20))
    mask = masks((4, 20))["holes"]
    values.requires_grad_()
    expected = gae(rewards, values, mask)
    assert not expected[0].requires_grad and not expected[1].requires_grad
    compiled = torch.compile(gae, fullgraph=True, backend="aot_eager")(rewards, values, mask)
    mapped = torch.func.vmap(gae)(rewards, values.detach(), mask)
    for a, b, c in zip(expected, compiled, mapped, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    # A loss on detached targets differentiates only through its own values.
    grad = torch.func.grad(lambda v: (v - gae(rewards, v, mask)[1]).square().sum())(values.detach())
    torch.testing.assert_close(grad, 2 * (values.detach() - expected[1]))
    arguments = (rewards, values.detach(), mask, 0.9, 0.8)
    torch.library.opcheck(gae_op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"rewards": [[0.0]]}, TypeError, "rewards must be a torch.Tensor, got list"),
        ({"values": torch.zeros(2, 3).long()}, TypeError, "values must be float32, float64, bfloat16 or float16"),
        ({"values": torch.zeros(2, 4)}, UserError, "values.shape must equal rewards.shape, got (2, 4) and (2, 3)"),
        ({"mask": torch.ones(3)}, UserError, "mask.shape must equal rewards.shape, got (3,) and (2, 3)"),
        ({"mask": None}, TypeError, "mask must be a torch.Tensor, got NoneType"),
        ({"gamma": 1.5}, UserError, "gamma must be a number in [0, 1], got 1.5"),
        ({"lam": NAN}, UserError, "lam must be a number in [0, 1], got nan"),
    ],
)
def test_mistakes_are_reported_in_one_line(each_backend, change, error, says):
    arguments = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3), "mask": torch.ones(2, 3)} | change
    with pytest.raises(error) as raised:
        gae(**arguments)
    assert says in str(raised.value) and "\n" not in str(raised.value)
