"""How long a job may take: "20m", "90s", "1h", or "200000t" tokens."""

from __future__ import annotations

import re
from typing import NamedTuple

from fastalign._base.errors import UserError

_FORM = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([smht])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Budget(NamedTuple):
    """What may be spent: of time or of tokens, the other is infinite."""

    seconds: float = float("inf")
    tokens: float = float("inf")

    @classmethod
    def parse(cls, text: str | None) -> Budget:
        """Raises UserError, one line. Tokens count where a model draws, scores or is trained on them."""
        if text is None:
            return cls()
        found = _FORM.fullmatch(str(text).strip())
        if found is None or not float(found[1]) > 0:
            raise UserError(f"budget must be a time or tokens, such as 20m, 90s, 1h or 200000t, got {text!r}")
        amount, unit = float(found[1]), found[2]
        return cls(tokens=amount) if unit == "t" else cls(seconds=amount * _SECONDS[unit])

    def less(self, seconds: float, tokens: float) -> Budget:
        return Budget(max(0.0, self.seconds - seconds), max(0.0, self.tokens - tokens))

    def spent(self, seconds: float, tokens: float) -> bool:
        """Whether that is all of it."""
        return seconds >= self.seconds or tokens >= self.tokens

    @property
    def limited(self) -> bool:
        return min(self) < float("inf")

    def __str__(self) -> str:
        return f"{self.tokens:,.0f} tokens" if self.tokens < float("inf") else f"{self.seconds:,.0f} s"
