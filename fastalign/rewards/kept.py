"""Scores that servers gave, kept on disk by a hash of what they were asked: an interrupted command asks nothing twice.

They lie in rewards.sqlite in the cache folder ($FASTALIGN_CACHE, else ~/.cache/fastalign), which may be removed at any
time. It holds hashes and numbers, no texts.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastalign._base.cache import cache_dir
from fastalign._base.errors import UserError
from fastalign._base.files import flushes
from fastalign._base.in_flight import as_done

C = TypeVar("C", bound=Hashable)


def key_of(asked: Any) -> bytes:
    """The hash of a JSON value."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest()


class Kept:
    """An open store, for the threads of one process; other processes may have it open too."""

    def __init__(self, connection: sqlite3.Connection, path: Path):
        self._connection, self._path, self._lock = connection, path, threading.Lock()

    def get(self, key: bytes) -> Any:
        """What was put under the key; None if nothing was."""
        with self._lock, _one_line(self._path):
            row = self._connection.execute("SELECT value FROM kept WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, values: dict[bytes, Any]) -> None:
        """Keep JSON values, all of them or none; they outlive the process from now on."""
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        with self._lock, _one_line(self._path), self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?)", rows)

    def close(self) -> None:
        """Later uses raise UserError: requests that an error or an interrupt left in flight may still end."""
        with self._lock:  # SQLite crashes if it is closed in the middle of another thread's statement
            self._connection.close()


@contextmanager
def kept() -> Iterator[Kept]:
    """The user's store, created if needed. Raises UserError, one line, if it cannot be used."""
    path = cache_dir() / "rewards.sqlite"
    with _one_line(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=60.0, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(f"PRAGMA synchronous={'NORMAL' if flushes() else 'OFF'}")
            connection.execute("CREATE TABLE IF NOT EXISTS kept (key BLOB PRIMARY KEY, value TEXT) WITHOUT ROWID")
        except BaseException:
            connection.close()
            raise
    store = Kept(connection, path)
    try:
        yield store
    finally:
        store.close()


def answers(
    calls: Mapping[C, bytes], ask: Callable[[C, threading.Event], Any], in_flight: int
) -> Iterator[tuple[C, Any]]:
    """(call, answer) of each call: first those kept under its key, then the others as they come, which are kept.

    ask(call, stop) -> the answer, a JSON value; up to `in_flight` at once, until `stop` is set.
    """
    with kept() as store:
        missing = []
        for call, key in calls.items():
            if (had := store.get(key)) is None:
                missing.append(call)
            else:
                yield call, had

        def work(call: C, stop: threading.Event) -> Any:
            answer = ask(call, stop)
            store.put({calls[call]: answer})
            return answer

        yield from as_done(work, missing, min(in_flight, len(missing)))


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        hint = "remove it, or set FASTALIGN_CACHE to another folder"
        raise UserError(f"{path}: cannot keep scores in it ({error}): {hint}") from None
