"""Progress on stderr: a bar on a terminal; otherwise a line once the work takes seconds, and then at intervals."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

FIRST, EVERY = 5.0, 30.0  # without a terminal: seconds to the first line, and between lines
NEWS = 10.0  # in place of EVERY, if a step has extra text
TICK = 0.5

_open: list[Work] = []  # without a terminal; the outermost first
_doing: list[str] = []
_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


@dataclass(eq=False)
class Work:
    """total: None if unknown, infinite if something else ends the work."""

    description: str
    total: float | None
    unit: str = ""
    done: int = 0
    said: str = ""
    shown_at: float | None = None

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self._first = self.done

    def due(self, now: float) -> bool:
        if self.shown_at is not None:
            return now - self.shown_at >= EVERY
        return now - self.began >= (EVERY if self.total is None else FIRST)

    def line(self, now: float) -> str:
        gone = now - self.began
        if self.total is None:
            what = f"{_doing[-1]}, " if _doing else ""
            return f"{self.description}: {what}at work for {_clock(gone)}"
        rate = (self.done - self._first) / max(gone, 1e-9)
        of = f"/{self.total:,.0f}" if self.total < math.inf else ""
        parts = [f"{self.description}: {self.done:,.0f}{of} {self.unit}".rstrip()]
        if rate > 0:
            parts.append(_rate(rate, self.unit))
        if self.said:
            parts.append(self.said)
        if rate > 0 and self.done < self.total < math.inf:
            parts.append(f"{_clock((self.total - self.done) / rate)} left")
        return "  ".join(parts)


@contextmanager
def bar(
    description: str, *, total: float, unit: str = "", done: int = 0, show: bool = True
) -> Iterator[Callable[..., None]]:
    """Yield `advance(count=1, said=None)`: `count` more of `total` are done; `said` is extra text to show from now on.
    Shows nothing unless `show`.

    Shows count, rate (in `unit` per second) and, unless total is infinite, time left. done: finished earlier, not
    counted in the rate. Without a terminal, quick work shows nothing unless it has extra text: that is printed at once,
    every 10 seconds and at the end.
    """
    if not show or _hidden.get():
        yield lambda count=1, said=None: None
    elif sys.stderr.isatty():
        with _drawn(description, total, unit, done) as advance:
            yield advance
    else:
        work = Work(description, total, unit, done)
        with _shown(work):
            yield lambda count=1, said=None: _advance(work, count, said)


@contextmanager
def hidden() -> Iterator[None]:
    """Within it nothing is shown."""
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


@contextmanager
def at_work(description: str) -> Iterator[None]:
    """A line at intervals, without a terminal, as long as no inner bar prints one."""
    if sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":  # under torchrun only the first process prints
        yield
        return
    with _shown(Work(description, None)):
        yield


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Within it, `at_work`'s line says so: for steps whose length nobody knows."""
    _doing.append(what)
    try:
        yield
    finally:
        _doing.remove(what)


def _advance(work: Work, count: int, said: str | None) -> None:
    work.done += count
    if said is None:
        return
    work.said = said
    if work.shown_at is None or work.done >= (work.total or 0) or time.monotonic() - work.shown_at >= NEWS:
        _tell([work])


@contextmanager
def _shown(work: Work) -> Iterator[None]:
    _open.append(work)
    end = threading.Event()
    if _open[0] is work:
        threading.Thread(target=_watch, args=(end,), daemon=True).start()
    try:
        yield
    finally:
        _open.remove(work)
        end.set()


def _watch(end: threading.Event) -> None:
    """Prints due lines even if a single step takes minutes."""
    while not end.wait(TICK):
        _look()


def _look() -> None:
    now = time.monotonic()
    if any(work.due(now) for work in _open):
        _tell(list(_open))


def _tell(works: list[Work]) -> None:
    now = time.monotonic()
    shown = [work for work in works if work.total is not None] or works
    for work in {*works, *_open[:1]}:  # which also shows that the command is alive
        work.shown_at = now
    print("; ".join(work.line(now) for work in shown), file=sys.stderr, flush=True)


@contextmanager
def _drawn(description: str, total: float, unit: str, done: int) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task) -> Text:
            return Text(_rate(task.speed, unit) if task.speed and unit else "")

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TextColumn("{task.fields[said]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, markup=False, emoji=False)) as progress:
        task = progress.add_task(description, total=total if total < math.inf else None, completed=done, said="")
        yield lambda count=1, said=None: progress.update(
            task, advance=count, **({} if said is None else {"said": said})
        )


def _rate(rate: float, unit: str) -> str:
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
