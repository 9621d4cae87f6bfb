"""Parts of a collated batch of pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def split(pairs: int, tokens: Tensor, limit: int | None) -> list[slice]:
    """Groups of consecutive pairs with at most `limit` tokens (a single pair may have more); tokens (B,): per pair."""
    if limit is None:
        return [slice(0, pairs)]
    groups, begin, total = [], 0, 0
    for b, n in enumerate(tokens.tolist()):
        if b > begin and total + n > limit:
            groups.append(slice(begin, b))
            begin, total = b, 0
        total += n
    return [*groups, slice(begin, pairs)]


def take(inputs: dict[str, Any], pairs: int, group: slice) -> dict[str, Any]:
    """The pairs of `group` from a collated batch: rows (2B, ...) by halves, (B, ...) as they are."""
    result = {}
    for name, x in inputs.items():
        if isinstance(x, Tensor) and len(x) == 2 * pairs:
            result[name] = torch.cat((x[:pairs][group], x[pairs:][group]))
        else:
            result[name] = x[group] if isinstance(x, Tensor) and len(x) == pairs else x
    return result
