"""Checks of mappings read from untrusted files."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from fastalign._base.errors import UserError


def known(mapping: Mapping[Any, Any], keys: set[str], where: str) -> None:
    """Raises UserError for a key that is none of `keys`."""
    unknown = [key for key in mapping if key not in keys]
    if unknown:
        raise UserError(f"{where} may have {', '.join(map(repr, sorted(keys)))}, got {reprlib.repr(unknown[0])}")


def entries(mapping: Mapping[str, Any], key: str) -> list[Any]:
    """A list that is not empty."""
    value = mapping.get(key)
    if not isinstance(value, list) or not 1 <= len(value) <= 1000:
        raise UserError(f"{key} must be a list of 1 to 1000 entries, got {reprlib.repr(value)}")
    return value


def text(mapping: Mapping[str, Any], key: str, where: str) -> str:
    value = mapping.get(key)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: {key} must be text, got {reprlib.repr(value)}")
    return value


def layer_range(value: Any, where: str) -> tuple[int, int]:
    """[first, last]: the layers from first to last - 1."""
    if not (isinstance(value, list) and len(value) == 2 and all(type(x) is int for x in value) and value[0] < value[1]):
        raise UserError(f"{where} must be two whole numbers, got {reprlib.repr(value)}")
    return value[0], value[1]
