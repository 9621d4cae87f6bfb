"""What calls of paid services cost: each command ends with a line for each service that it called."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fastalign._base import outputs
from fastalign._base.units import counted

_SHOWN: ContextVar[dict[str, Spending] | None] = ContextVar("shown", default=None)


class Spending:
    """The calls of one service so far, from any thread. price: dollars per million tokens in and out, if known."""

    def __init__(self, name: str, price: tuple[float, float] | None = None):
        self.name: str = name
        self.price: tuple[float, float] | None = price
        self.calls: int = 0
        self.tokens_in: int = 0
        self.tokens_out: int = 0
        self._lock = threading.Lock()

    def add(self, tokens_in: int, tokens_out: int) -> None:
        with self._lock:
            self.calls += 1
            self.tokens_in += tokens_in
            self.tokens_out += tokens_out

    @property
    def dollars(self) -> float | None:
        """None if no price is known."""
        if self.price is None:
            return None
        return (self.tokens_in * self.price[0] + self.tokens_out * self.price[1]) / 1e6

    def __str__(self) -> str:
        text = f"{self.name}: {counted(self.calls, 'call')}"
        if self.tokens_in or self.tokens_out:
            text += f", {self.tokens_in:,} tokens in and {self.tokens_out:,} out"
        return text if self.dollars is None else f"{text}, ${self.dollars:,.4f}"


def of(name: str, price: tuple[float, float] | None) -> Spending:
    """A service's account: within `shown` the one of that name, so that one command ends with one line for it."""
    accounts = _SHOWN.get()
    account = Spending(name, price)
    return account if accounts is None else accounts.setdefault(name, account)


@contextmanager
def shown() -> Iterator[None]:
    """Ends with a line for each service that was called in it, even if an error ends it."""
    accounts: dict[str, Spending] = {}
    token = _SHOWN.set(accounts)
    try:
        yield
    finally:
        _SHOWN.reset(token)
        for account in accounts.values():
            if account.calls:
                outputs.say(str(account))
