"""The Triton kernels' random numbers are those of the reference and the native extension, to the last bit."""

import pytest
import torch
import triton
import triton.language as tl
from fastalign.kernels._philox import philox_uniform

from fastalign import backend, reference

pytestmark = pytest.mark.skipif(not backend.interpreted(), reason="CPU tensors need Triton's interpreter")


@triton.jit
def _fill(out, rows, offsets, seed, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    row, offset = tl.load(rows + at), tl.load(offsets + at)
    tl.store(out + at[:, None] * COUNT + at[None, :], philox_uniform(seed, row[:, None], offset[None, :]))


@pytest.mark.parametrize("seed", [0, 1, 16, 2**31 - 1, 2**31, 2**32 + 5, 2**63 - 1, -1, -(2**63), -(2**31) - 7])
def test_uniform_is_the_reference_to_the_last_bit(seed):
    edges = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, -1, -(2**63)]
    generator = torch.Generator().manual_seed(3)
    rows = torch.cat([torch.tensor(edges), torch.randint(-(2**62), 2**62, (22,), generator=generator)])
    offsets = rows.flip(0).contiguous()
    result = torch.empty(32, 32, dtype=torch.float64)
    _fill[(1,)](result, rows, offsets, seed, COUNT=32)
    assert torch.equal(result, reference.uniform(seed, rows[:, None], offsets[None, :]))
    assert result.min() > 0 and result.max() < 1


@triton.jit
def _one(out, row, offset, seed):
    tl.store(out, philox_uniform(seed, row, offset))


@pytest.mark.parametrize("row, offset, seed", [(0, 0, 0), (3, 2**40, 7), (2**33, 5, -9)])
def test_scalars_of_any_width(row, offset, seed):
    result = torch.empty((), dtype=torch.float64)
    _one[(1,)](result, row, offset, seed)
    assert result == reference.uniform(seed, torch.tensor(row), torch.tensor(offset))
