"""Which code runs an op: the native CPU extension, a Triton kernel, or the plain torch reference.

CPU tensors use the native extension, and CUDA or ROCm tensors use Triton; `use_backend` or the environment variable
FASTALIGN_BACKEND overrides this. A backend requested by name raises if it is not available; a default one falls back to
the reference, with one warning. With TRITON_INTERPRET=1 set before the first kernel runs, backend "triton" also takes
CPU tensors and runs its kernels in Triton's interpreter: slow, for tests. On "meta" tensors it does what it would do on
a GPU, but for the numbers: for counting.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from fastalign._base.errors import UserError

if TYPE_CHECKING:
    import torch


def _use_openmp_of_torch() -> None:
    """Load torch's copy of the OpenMP runtime without importing torch. The extension must use the same copy, because
    two thread pools would spin against each other."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = os.path.join(folder, "lib", "libgomp.so.1")
        if os.path.exists(path):
            ctypes.CDLL(path)


try:
    _use_openmp_of_torch()
    from fastalign import _C as native
except ImportError:
    native = cast(Any, None)  # ops reach it only if `choose` says so

BACKENDS = ("auto", "cpu", "triton", "reference")
HOW_TO_BUILD = "with a C++ compiler: pip install -e ."

_forced = os.environ.get("FASTALIGN_BACKEND", "auto")
_checked = False  # read on first use: an import raises nothing
_warned: set[str] = set()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run ops on `name` ("auto", "cpu", "triton" or "reference") inside the block, in the whole process.

    Raises:
        UserError: an unknown name; "cpu" if the extension is not built, "triton" if Triton is not installed.
    """
    global _forced
    _check(name, "backend")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose(device: torch.device) -> str:
    """The backend for tensors on `device`: "cpu", "triton" or "reference"."""
    return _choose(device.type, device)


def native_runs() -> bool:
    """Whether the native extension runs CPU work without tensors, such as merges of files."""
    return _choose("cpu", "cpu") == "cpu"


def threads() -> int:
    """How many threads the extension uses: as many as torch, or, if torch is not loaded, OMP_NUM_THREADS or one per
    processor.

    One in a forked process: OpenMP's threads exist only in the parent, and waiting for them would never end.
    """
    global _had_threads
    count = 1 if _forked else _wanted_threads()
    _had_threads |= count > 1
    return count


_forked = _had_threads = False


def _after_fork() -> None:
    """Runs in the child. If the extension's threads had been started, torch, which shares them, must not use them
    either."""
    global _forked
    _forked = True
    torch = sys.modules.get("torch")
    if _had_threads and torch is not None:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _wanted_threads() -> int:
    torch = sys.modules.get("torch")
    if torch is not None:
        return torch.get_num_threads()
    requested = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if requested.isdigit() and int(requested):
        return int(requested)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _choose(kind: str, device: torch.device | str) -> str:
    requested = forced()
    if requested == "reference":
        return "reference"
    if requested == "cpu" and kind != "cpu":
        raise UserError(f"backend 'cpu' takes CPU tensors, got one on {device}")
    if requested == "triton" or kind == "cuda":
        if requested == "triton" and kind not in ("cuda", "meta") and not (kind == "cpu" and interpreted()):
            raise UserError(f"backend 'triton' takes GPU tensors (others with TRITON_INTERPRET=1), got one on {device}")
        if has_triton():
            return "triton"
        _warn_once(
            "triton", "fastalign's GPU kernels need Triton (pip install triton); the slow reference runs instead"
        )
    elif kind == "cpu":
        if native is not None:
            return "cpu"
        _warn_once(
            "native", f"fastalign's native extension is not built; the slow reference runs instead ({HOW_TO_BUILD})"
        )
    else:
        _warn_once(kind, f"fastalign has no compiled kernel for {kind}; the torch reference runs instead")
    return "reference"


def forced() -> str:
    """The backend requested by `use_backend` or the environment; "auto" if none. Raises UserError if the environment
    requests one that is unavailable."""
    global _checked
    if not _checked:
        _check(_forced, "FASTALIGN_BACKEND")
        _checked = True
    return _forced


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _check(name: str, argument: str) -> None:
    if name not in BACKENDS:
        raise UserError(f"{argument} must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "cpu" and native is None:
        raise UserError(f"{argument} 'cpu' needs the native extension, which is not built: {HOW_TO_BUILD}")
    if name == "triton" and not has_triton():
        raise UserError(f"{argument} 'triton' needs Triton, which is not installed: pip install triton")


def _warn_once(key: str, message: str) -> None:
    import torch

    if key not in _warned and not torch.compiler.is_compiling():
        _warned.add(key)
        warnings.warn(message, RuntimeWarning, stacklevel=5)
