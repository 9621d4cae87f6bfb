"""The store of scores that servers gave."""

import threading

import pytest

from fastalign import UserError
from fastalign.rewards.kept import kept


def test_it_closes_while_other_threads_write(tmp_path, monkeypatch):
    """An error ends a command with requests in flight. SQLite crashes if it is closed within a statement."""
    monkeypatch.setenv("FASTALIGN_CACHE", str(tmp_path))
    begun = threading.Semaphore(0)

    def write(i):
        with pytest.raises(UserError, match="cannot keep scores"):
            for j in range(10**9):
                store.put({bytes([i, j % 200]): j})
                begun.release()
        ended.append(i)

    for _ in range(10):
        ended = []
        with kept() as store:
            threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for _ in range(20):
                begun.acquire()
        for thread in threads:
            thread.join()
        assert sorted(ended) == [0, 1, 2, 3]
