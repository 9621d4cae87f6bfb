"""Checks names of devices and dtypes without torch; and the available memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastalign._base.errors import UserError

DTYPES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp64": "float64"}


def check_loading(dtype: Any, device: Any) -> None:
    """Raise UserError for unknown device or dtype names; whether a device exists is checked when a model is loaded."""
    if isinstance(device, str) and not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", device):
        raise UserError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:<n>', got {device!r}")
    if isinstance(dtype, str) and DTYPES.get(dtype, dtype).removeprefix("torch.") not in ("auto", *DTYPES.values()):
        raise UserError(f"dtype must be 'auto', 'float32', 'bfloat16', 'float16' or 'float64', got {dtype!r}")


def free_memory() -> int:
    """Bytes of memory available without swapping; 0 if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0)
