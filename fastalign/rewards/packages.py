"""Imports an optional package, with one clear line if it is missing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from fastalign._base.errors import UserError


def require(module: str, distribution: str, reward: str) -> ModuleType:
    """Import `module` (from `distribution`) for `reward`; UserError with the install command if it is missing."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = "" if error.name == module.partition(".")[0] else f" ({error.name} is missing)"
        raise UserError(
            f"reward {reward!r} needs the package {distribution}{missing}: pip install 'fastalign[demo]'"
        ) from None
