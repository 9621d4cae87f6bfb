"""Triton kernels, one file per op, imported only as `fastalign.kernels` and only when a GPU tensor arrives."""

from __future__ import annotations

import pkgutil


def names() -> list[str]:
    """The ops that have a Triton kernel in this installation."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
