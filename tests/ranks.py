"""A few gloo processes on this machine that run a function together, for tests of what is distributed."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, wait
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = 60  # seconds, after which a process that waits for another gives up


class Ranks:
    """`count` processes that live from the first call to `close`."""

    def __init__(self, count: int, store):
        context = multiprocessing.get_context("spawn")
        self.pools = [
            ProcessPoolExecutor(1, mp_context=context, initializer=_start, initargs=(rank, count, str(store)))
            for rank in range(count)
        ]

    def __call__(self, function, *args):
        """function(*args) in every process at once, a function of a test module; what went wrong in any is raised."""
        futures = [pool.submit(function, *args) for pool in self.pools]
        wait(futures)
        return [future.result() for future in futures]

    def close(self) -> None:
        self(dist.destroy_process_group)
        for wait_for_it in (False, True):  # all at once, then one by one
            for pool in self.pools:
                pool.shutdown(wait=wait_for_it)


def _start(rank: int, count: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=TIMEOUT)
    )
