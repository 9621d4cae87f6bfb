"""Lazy imports (PEP 562): a package's names are imported on first use, so that the package itself stays light."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from fastalign._base.errors import UserError


def lazy(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for a package. homes: name -> the module below it that defines it; a module's own
    name gives the module."""

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{homes[name]}")
        value = module if name == homes[name] else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return __getattr__, __dir__


def pandas() -> Any:
    """The package. Raises UserError where it is not installed."""
    try:
        import pandas as package
    except ImportError:
        raise UserError("to_pandas needs the package pandas: pip install pandas") from None
    return package
