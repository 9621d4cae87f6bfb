"""Triton kernels, one file per op, imported only as `fastalign.kernels` and only when a GPU tensor arrives."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any


def names() -> list[str]:
    """The ops that have a Triton kernel in this installation."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def launcher(name: str) -> Callable[..., Any]:
    """The function of that name, "file.function", that launches an op's kernels."""
    file, function = name.split(".")
    return getattr(importlib.import_module(f"{__name__}.{file}"), function)
