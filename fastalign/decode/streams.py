"""The random stream of each candidate, independent of what else is drawn."""

from __future__ import annotations

from collections.abc import Sequence

from fastalign._base.errors import UserError


def stream_of(prompt: int, candidate: int) -> int:
    """The random stream of a candidate, the same however many others there are: `rows` of `ops.sample_tokens`."""
    return prompt << 32 | candidate


def places_of(prompt_ids: Sequence[int] | None, count: int, *, rising: bool = False) -> list[int]:
    """The prompts' checked indices in the full set."""
    if prompt_ids is None:
        return list(range(count))
    places = [int(i) for i in prompt_ids]
    if len(places) != count or len(set(places)) != count or min(places) < 0 or max(places) >= 2**31:
        raise UserError(f"prompt_ids must be {count} different numbers, one per prompt, from 0 to 2^31 - 1")
    if rising and places != sorted(places):
        raise UserError(f"prompt_ids must be rising, got {places}")
    return places
