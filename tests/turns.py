"""Slow sweeps take turns, one a day; FASTALIGN_TEST_ALL=1 runs them all.

By the day some take a part of their cases too, of 4 or 9: the number of sweeps shares no factor with those.
"""

import os
import time
from collections.abc import Iterable
from typing import TypeVar

import pytest

T = TypeVar("T")
ALL = bool(os.environ.get("FASTALIGN_TEST_ALL"))
DAY = int(time.time() // 86400)
SWEEPS = ("compile_gate", "bytes_moved", "sanitize", "clang", "readme", "resume", "ranks")


def by_the_day(cases: Iterable[T], parts: int) -> list[T]:
    """A part of the cases, another each day."""
    cases = list(cases)
    return cases if ALL else cases[DAY % parts :: parts]


def on_its_day(sweep: str) -> pytest.MarkDecorator:
    mine = DAY % len(SWEEPS) == SWEEPS.index(sweep)
    return pytest.mark.skipif(not (mine or ALL), reason="another day: slow sweeps take turns")
