"""Calls that run in separate processes, for benchmarks of whole jobs. pytest shows what these print to stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastalign.bench.job import ANSWER
from fastalign.bench.machine import status_kb

EVERY_SECONDS = 0.005


class Commands:
    """A call that runs commands one after the other, each from its start to its end.

    peak_mb: the largest anonymous memory (Linux) of any of them, without the page cache.
    """

    def __init__(self, commands: Callable[[], list[list[str]]]):
        self.make, self.ready, self.peak_mb = commands, [], 0.0

    def prepare(self) -> None:
        """The untimed preparation."""
        self.ready = self.make()
        os.sync()  # so that this job does not wait for earlier jobs' writes

    def __call__(self) -> None:
        for command in self.ready:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            with self._watched(process):
                process.wait()
            _succeeded(process)

    @contextmanager
    def _watched(self, process: subprocess.Popen, before_kb: int = 0) -> Iterator[None]:
        over = threading.Event()

        def watch():
            while not over.wait(EVERY_SECONDS):
                self.peak_mb = max(self.peak_mb, (_anonymous_kb(process.pid) - before_kb) / 1024)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


class Worker(Commands):
    """A job in a process that waits for the call, so that imports are not timed; memory is that above the imports'.

    Runs `job(*arguments())` of a script beside this file, see job.py. answer: its result; a "peak_mb" in it is used as
    the memory.
    """

    def __init__(self, script: str, arguments: Callable[[], list], python: str = sys.executable):
        here = Path(__file__).parent
        start = [python, "-W", "ignore", str(here / "job.py"), str(here / script)]
        super().__init__(lambda: [[*start, json.dumps(arguments())]])
        self.answer: dict[str, Any] = {}

    def prepare(self) -> None:
        super().prepare()
        self.process = subprocess.Popen(self.ready[0], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if not any(line == "ready\n" for line in self.process.stdout):
            self.process.wait()
            _succeeded(self.process)

    def __call__(self) -> None:
        with self._watched(self.process, _anonymous_kb(self.process.pid)):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            line = next((line for line in self.process.stdout if line.startswith(ANSWER)), "")
        self.process.communicate()
        _succeeded(self.process)
        self.answer = json.loads(line.removeprefix(ANSWER))
        self.peak_mb = self.answer.get("peak_mb", self.peak_mb)


def _succeeded(process: subprocess.Popen) -> None:
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(process.args)}")


def _anonymous_kb(pid: int) -> int:
    try:
        return status_kb("RssAnon", pid)
    except OSError:
        return 0
