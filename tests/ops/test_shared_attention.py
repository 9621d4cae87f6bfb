"""Attention over shared prompts and own tokens, in Triton's interpreter, against the reference in float64."""

import pytest
import torch

from fastalign import reference
from fastalign.ops import shared_attention as op

PROMPTS, ROWS = [70, 1, 9], [1, 0, 2, 0, 2, 2]  # of prompt 2 none are neighbours


def given(heads, kv, d, dv, own, dtype):
    """q, shared, own, lengths, with NaN where nobody may look."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=draw).to(dtype)

    count, total = len(ROWS), sum(PROMPTS)
    q = (3 * normal(count, d, heads)).transpose(1, 2) if own == 1 else 3 * normal(count, heads, d)
    shared = normal(kv, total, d), normal(kv, total, dv)
    lengths = torch.tensor([own - 1, 0, own // 2, 0, own - 1, own // 3])
    caches = normal(count + 2, kv, own + 3, d), normal(count + 2, kv, own + 3, dv)
    for cache in caches:
        for row, length in enumerate(lengths):
            cache[row, :, length + 1 :] = torch.nan
    return q, shared, caches, lengths


@pytest.mark.parametrize(
    ("heads", "kv", "d", "dv", "own", "window", "softcap", "dtype"),
    [
        (9, 3, 16, 16, 20, None, None, torch.float32),
        (2, 2, 7, 19, 70, None, 2.0, torch.float32),
        (4, 2, 24, 16, 40, 11, None, torch.bfloat16),
        (2, 1, 80, 80, 5, 43, 30.0, torch.float16),
        (40, 1, 5, 5, 1, 1, None, torch.float32),
    ],
)
@pytest.mark.parametrize("share", [32, 256])
def test_the_kernels_equal_the_reference(heads, kv, d, dv, own, window, softcap, dtype, share, monkeypatch):
    monkeypatch.setattr(op, "SHARE", share)
    q, shared, caches, lengths = given(heads, kv, d, dv, own, dtype)
    layout = op.Layout.of(ROWS, PROMPTS, q.device)
    assert op.takes(q, shared[1])
    result = op.shared_attention(q, shared, caches, lengths, layout, d**-0.5, window, softcap)
    ends = layout.bounds.tolist()
    spans = [(ends[prompt], ends[prompt + 1]) for prompt in ROWS]
    wide = [x.double() for x in (q, *shared, *(cache[: len(ROWS)] for cache in caches))]
    expected = reference.shared_attention(*wide, spans, lengths.tolist(), d**-0.5, window, softcap)
    assert result.dtype == dtype and result.shape == expected.shape == (len(ROWS), heads, dv)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), expected, rtol=max(1e-5, 2 * eps), atol=max(1e-5, eps))


def test_a_nan_stays_in_its_row():
    q, shared, caches, lengths = given(2, 1, 16, 16, 2, torch.float32)
    q[2, 1, 3] = torch.nan
    result = op.shared_attention(q, shared, caches, lengths, op.Layout.of(ROWS, PROMPTS, q.device), 0.25)
    wrong = torch.zeros(len(ROWS), 2, dtype=torch.bool)
    wrong[2, 1] = True
    assert torch.equal(result.isnan().any(-1), wrong)


def test_what_no_kernel_takes():
    x = torch.zeros(1, 1, 264)
    assert not op.takes(x, x) and not op.takes(x[..., :8].double(), x[..., :8].double())
