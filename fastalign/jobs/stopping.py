"""On Ctrl-C or SIGTERM, training finishes its step first, so that a checkpoint can be saved."""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
from typing import Any

import torch

from fastalign._base import outputs
from fastalign._base.errors import Terminated


class Stopping:
    """A context in which the first signal is only noted, for `requested` at the end of the step; a second one stops at
    once.

    Ignored signals stay ignored, and outside the main thread none is caught.
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
        """Whether any process of the run was asked to stop. All call it at the same step and get the same answer."""
        if accelerator.num_processes > 1:  # the launcher's signal reaches them at different times
            noted = accelerator.gather(torch.tensor([self._signal], device=accelerator.device))
            self._signal = int(noted.max())
        return bool(self._signal)

    def end(self) -> None:
        """Raise what the signal would have raised."""
        raise Terminated if self._signal == signal.SIGTERM else KeyboardInterrupt

    def _note(self, number: int, frame: object) -> None:
        self._signal = number
        self.__exit__()
        with suppress(RuntimeError):  # the signal came while a line was being written
            outputs.say("stopping after the current step; a second signal stops at once")
