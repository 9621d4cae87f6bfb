"""A training that is asked to stop, by Ctrl-C or SIGTERM, ends its step first, so that a checkpoint can be kept."""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
from typing import Any

import torch

from fastalign._base import outputs
from fastalign._base.errors import Terminated


class Stopping:
    """A context. Within it the first signal is noted, for `asked` to tell at the end of the step; a second one ends
    at once.

    Signals that are ignored stay so, and outside the main thread nothing is caught.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if (before := signal.getsignal(number)) not in (None, signal.SIG_IGN):
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def requested(self, accelerator: Any) -> bool:
        """Whether any process of the run was asked to stop; all call it at the same step and hear the same."""
        if accelerator.num_processes > 1:  # the launcher's signal reaches each in another moment
            noted = accelerator.gather(torch.tensor([self._signal], device=accelerator.device))
            self._signal = int(noted.max())
        return bool(self._signal)

    def end(self) -> None:
        """What the signal would have raised at once."""
        raise Terminated if self._signal == signal.SIGTERM else KeyboardInterrupt

    def _note(self, number: int, frame: object) -> None:
        self._signal = number
        self.__exit__()
        with suppress(RuntimeError):  # it came while a line was being written
            outputs.say("stopping after the step in progress; once more to stop at once")
