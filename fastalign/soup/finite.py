"""What a merge met of numbers that are not finite: NaN and infinities in its inputs, and what the output's type cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class NotFinite:
    """Counts, and the first tensor of each, by input and by output. As JSON: {"inputs": {name: [count, tensor]}, "outputs": ...}.

    An output's count is of elements whose inputs are all finite, or lie in other chunks: they are beyond its type's range.
    """

    def __init__(self, record: Mapping[str, Any] | None = None):
        self.record: dict[str, dict[str, list[Any]]] = {"inputs": {}, "outputs": {}}
        self.join(record or {})

    def __bool__(self) -> bool:
        return any(self.record.values())

    def add(self, side: str, name: str, count: int, tensor: str) -> None:
        """side: "inputs" or "outputs"; an output's name is its folder's, "" for a single one."""
        if count:
            self.record[side].setdefault(name, [0, tensor])[0] += count

    def join(self, record: Mapping[str, Any]) -> None:
        for side, held in record.items():
            for name, (count, tensor) in held.items():
                self.add(side, name, count, tensor)

    def told(self) -> str:
        """For people, in one line."""
        inputs = [
            f"{count:,} numbers of {name} are NaN or infinite (first in {tensor})"
            for name, (count, tensor) in self.record["inputs"].items()
        ]
        outputs = [
            f"{count:,} numbers of the output{f' {name}' if name else ''} are beyond its type's range (first in {tensor})"
            for name, (count, tensor) in self.record["outputs"].items()
        ]
        told = [*inputs[:3], *outputs[:3]]
        more = len(inputs) + len(outputs) - len(told)
        return "; ".join(told) + (f"; and so of {more} more models" if more else "")
