"""Slow tests take turns by the day; FASTALIGN_TEST_ALL=1 runs them all, FASTALIGN_TEST_DAY=n those due on day n."""

import os
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

import pytest

T = TypeVar("T")
ALL = bool(os.environ.get("FASTALIGN_TEST_ALL"))
DAY = int(os.environ.setdefault("FASTALIGN_TEST_DAY", str(int(time.time() // 86400))))  # workers inherit it
# Of each row one a day. The first row's length shares no factor with those of parts (4, 6, 9, 12 and 25).
TURNS = (
    ("compile_gate", "bytes_moved", "sanitize", "clang", "site", "ray", "bench"),
    (
        "killed: train dpo", "killed: train ppo", "killed: train grpo", "killed: train distill", "killed: DPOTrainer",
        "killed: PPOTrainer", "killed: soup",
    ),
    ("ranks: train dpo", "ranks: train distill", "ranks: DDP", "ranks: FSDP2", "ranks: PPO", "ranks: GRPO"),
    ("script: DPO", "script: GRPO", "wheel"),
    ("signal: SIGINT", "signal: SIGTERM"),
    ("levels: losses", "levels: draws", "levels: layers and soups", "levels: palettes"),
)  # fmt: skip


def on_its_day(name: str) -> pytest.MarkDecorator:
    row = next(row for row in TURNS if name in row)
    mine = DAY % len(row) == row.index(name)
    return pytest.mark.skipif(not (mine or ALL), reason="another day: slow tests take turns")


def by_the_day(cases: Iterable[T], parts: int) -> list[T]:
    """A part of the cases, another each day."""
    cases = list(cases)
    return cases if ALL else cases[DAY % parts :: parts]


def not_today(cases: Iterable[T], group: Callable[[T], Hashable], name: Callable[[T], str], parts: int) -> set[T]:
    """Of each group of cases all but a part, another each day, whose members have nothing in common."""
    groups: dict[Hashable, list[T]] = defaultdict(list)
    for case in cases:
        groups[group(case)].append(case)
    result: set[T] = set()
    for members in groups.values():
        members.sort(key=lambda case: zlib.crc32(name(case).encode()))
        result.update(set(members) - set(by_the_day(members, parts)))
    return result
