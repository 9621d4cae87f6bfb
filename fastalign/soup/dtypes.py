"""Storage types of safetensors files: their names there, in torch, and in the engine."""

from __future__ import annotations

import torch

from fastalign.errors import UserError

# In the order of SoupType in csrc/soup.h: what can be mixed.
FLOATS = ("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2")
TORCH = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TORCH.items()}
SIZES = {name: dtype.itemsize for name, dtype in TORCH.items()}
_SHORT = {
    "fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "e4m3": "float8_e4m3fn",
    "fp8": "float8_e4m3fn", "e5m2": "float8_e5m2",
}  # fmt: skip


def parse(dtype: str | torch.dtype) -> str:
    """The name in the file of a floating-point type, from a torch.dtype or "bfloat16", "bf16", "fp8", ..."""
    found = getattr(torch, _SHORT.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    name = NAMES.get(found) if isinstance(found, torch.dtype) else None
    if name not in FLOATS:
        wanted = ", ".join(str(TORCH[name]).removeprefix("torch.") for name in FLOATS)
        raise UserError(f"dtype must be one of {wanted}, got {dtype!r}")
    return name


def code(name: str) -> int:
    """The engine's number of a type that can be mixed."""
    return FLOATS.index(name)
