"""Which code runs an op: the compiled CPU engine, a Triton kernel, or the plain torch reference.

A CPU tensor goes to the engine and a CUDA or ROCm tensor to Triton; `use_backend` or the environment variable
FASTALIGN_BACKEND overrides. A backend that was asked for by name and is not there raises; one that was only the
default falls back to the reference with a warning, once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastalign.errors import UserError

try:
    from fastalign import _C as engine
except ImportError:
    engine = None

BACKENDS = ("auto", "cpu", "reference")
BUILD_COMMAND = "pip install -e ."

_forced = os.environ.get("FASTALIGN_BACKEND", "auto")
_warned: set[str] = set()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run ops on `name` ("auto", "cpu" or "reference") inside the block, in the whole process.

    Raises:
        UserError: an unknown name, or "cpu" where the extension is not built.
    """
    global _forced
    _check(name, "backend")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose(device: torch.device) -> str:
    """The backend for tensors on `device`: "cpu" or "reference"."""
    if _forced == "reference":
        return "reference"
    if _forced == "cpu" and device.type != "cpu":
        raise UserError(f"backend 'cpu' takes CPU tensors, got one on {device}")
    if device.type == "cpu":
        if engine is not None:
            return "cpu"
        _warn_once("engine", f"fastalign's CPU engine is not built; the slow reference runs instead ({BUILD_COMMAND})")
    else:
        _warn_once(
            device.type, f"fastalign has no compiled kernel for {device.type} yet; the torch reference runs instead"
        )
    return "reference"


def _check(name: str, argument: str) -> None:
    if name not in BACKENDS:
        raise UserError(f"{argument} must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "cpu" and engine is None:
        raise UserError(f"{argument} 'cpu' needs the compiled engine, which is not built: {BUILD_COMMAND}")


def _warn_once(key: str, message: str) -> None:
    if key not in _warned and not torch.compiler.is_compiling():
        _warned.add(key)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


_check(_forced, "FASTALIGN_BACKEND")
