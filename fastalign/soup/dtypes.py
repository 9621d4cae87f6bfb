"""Storage types of safetensors files: their names there, in torch, and in the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastalign._base.errors import UserError

if TYPE_CHECKING:
    import torch

# In the order of SoupType in csrc/soup.h: what can be mixed.
FLOATS = ("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2")
WORDS = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
SIZES = {
    "F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_NAMES = {word: name for name, word in WORDS.items()}
_SHORT = {
    "fp64": "float64", "double": "float64", "fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16",
    "half": "float16", "e4m3": "float8_e4m3fn", "fp8": "float8_e4m3fn", "e5m2": "float8_e5m2",
}  # fmt: skip


def parse(dtype: str | torch.dtype) -> str:
    """The name in the file of a floating-point type, from a torch.dtype or "bfloat16", "bf16", "fp8", ..."""
    word = str(dtype).removeprefix("torch.")
    name = _NAMES.get(_SHORT.get(word, word))
    if name not in FLOATS:
        raise UserError(f"dtype must be one of {', '.join(WORDS[name] for name in FLOATS)}, got {dtype!r}")
    return name


def in_torch(name: str) -> torch.dtype:
    """torch's type for a name in the file."""
    import torch

    return getattr(torch, WORDS[name])


def of_torch(dtype: torch.dtype) -> str | None:
    """The name in the file of torch's type, None where the format has none."""
    return _NAMES.get(str(dtype).removeprefix("torch."))


def code(name: str) -> int:
    """The engine's number of a type that can be mixed."""
    return FLOATS.index(name)
