"""The GPU library's products in full float32, whatever the user allows elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

WHOLE_SUMS = {
    "fp32_precision": "ieee",
    "allow_bf16_reduced_precision_reduction": False,
    "allow_fp16_reduced_precision_reduction": False,
}


@contextmanager
def whole_sums() -> Iterator[None]:
    """The library's products in full float32, with partial sums of narrow ones in float32: whatever the user allows."""
    switches, before = torch.backends.cuda.matmul, {}
    for name, value in WHOLE_SUMS.items():
        before[name] = getattr(switches, name)
        setattr(switches, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(switches, name, value)
