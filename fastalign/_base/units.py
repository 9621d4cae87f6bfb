"""Numbers as people write them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from fastalign._base.errors import UserError

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(name: str, value: int | str) -> int:
    """Bytes from a number, or from "512MB", "4 GB", "1.5GiB" (powers of 1000, of 1024 with an i).

    Raises UserError that names the argument.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", value.lower()) if isinstance(value, str) else None
    size = match and int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2]])
    if not size:
        raise UserError(f"{name} must be a size such as 4GB or 512MiB, or a number of bytes, got {value!r}")
    return size


def counted(count: int, noun: str) -> str:
    """ "1 prompt", "1,024 prompts"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def alternatives(groups: Sequence[Sequence[str]]) -> str:
    """ "a or b", "a and b together": of groups of words, each named as a whole."""
    return " or ".join(" and ".join(group) + " together" * (len(group) > 1) for group in groups)


def decimals(std: float) -> int:
    """Decimal places that show a hundredth of a standard deviation, two to six; three if it is zero."""
    return min(6, max(2, 2 - math.floor(math.log10(std)))) if std > 0 else 3


def size(nbytes: float) -> str:
    """Bytes in readable form."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:,.0f} {unit}" if unit == "B" else f"{nbytes:,.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.1f} TB"
