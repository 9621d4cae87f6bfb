"""Prompts in two parts: λ and models are made on one, the result is measured on the other."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fastalign._base.errors import UserError
from fastalign._base.units import counted


def split(prompts: Sequence[str], heldout: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the prompts to train on and of the held-out ones, in their order. Of equal prompts only the first is
    in either, so that the proof counts none twice.

    heldout: the share held out. Raises UserError, one line, if either part would be empty.
    """
    if not (isinstance(heldout, int | float) and 0 < heldout < 1):
        raise UserError(f"heldout must be a share between 0 and 1: the palette is proved on it, got {heldout!r}")
    different = sorted(set(prompts))
    if len(different) < 2:
        alike = "1 prompt" if len(prompts) == 1 else f"{counted(len(prompts), 'prompt')}, all alike"
        raise UserError(f"prompts must be two different ones at least, one of them held out, got {alike}")
    random.Random(seed).shuffle(different)
    count = min(max(1, round(heldout * len(different))), len(different) - 1)
    held = set(different[:count])
    first = {prompt: i for i, prompt in reversed(list(enumerate(prompts)))}
    return sorted(i for prompt, i in first.items() if prompt not in held), sorted(first[prompt] for prompt in held)
