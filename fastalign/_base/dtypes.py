"""The storage types that ops take, and the type that they compute in."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which ops accumulate and return results: float64 for float64, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32
