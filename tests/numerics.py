"""The numeric bound every op is held to: no further from float64 truth than torch in the same dtype, plus a hair."""

from __future__ import annotations

import torch
from torch import Tensor

HAIR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def assert_as_good_as_torch(ours: Tensor, torchs: Tensor, truth: Tensor, hair: float, name: str = "") -> None:
    """|ours - truth| <= max |torch's - truth| + hair (1 + |truth|) elementwise; non-finite values must agree
    exactly."""
    assert ours.shape == truth.shape, (name, ours.shape, truth.shape)
    ours, torchs, truth = ours.double(), torchs.double(), truth.double()
    odd = ~truth.isfinite()
    torch.testing.assert_close(ours[odd], truth[odd], rtol=0, atol=0, equal_nan=True)
    error = (ours - truth)[~odd].abs()
    allowed = (torchs - truth)[~odd].abs().nan_to_num(0).max() if error.numel() else 0
    bound = allowed + hair * (1 + truth[~odd].abs())
    assert (error <= bound).all(), f"{name}: error {error.max():.3g}, torch's {allowed:.3g}, hair {hair:.3g}"
