"""Several tasks at once, in threads: requests to a server."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def as_done(
    work: Callable[[Any, threading.Event], Any], tasks: Iterable[Any], threads: int
) -> Iterator[tuple[Any, Any]]:
    """(task, work(task, stop)) of each task as it finishes, `threads` at once; raises the first error.

    On early exit or an error, `stop` is set and no more tasks are started. The threads are daemons, so an interrupt
    does not wait for answers.
    """
    tasks, lock, stop = iter(tasks), threading.Lock(), threading.Event()
    done: queue.SimpleQueue[tuple[Any, Any, BaseException | None] | None] = queue.SimpleQueue()

    def run() -> None:
        while not stop.is_set():
            with lock:
                task = next(tasks, None)
            if task is None:
                break
            try:
                done.put((task, work(task, stop), None))
            except BaseException as error:
                done.put((task, None, error))
                stop.set()  # after it: what others raise because they were stopped is not the first
        done.put(None)

    try:
        for _ in range(threads):
            threading.Thread(target=run, daemon=True).start()
        running = threads
        while running:
            item = done.get()
            if item is None:
                running -= 1
                continue
            task, result, error = item
            if error is not None:
                raise error
            yield task, result
    finally:
        stop.set()
