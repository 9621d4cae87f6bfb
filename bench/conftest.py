"""The fixture `compare`, on top of pytest-benchmark's: ours and its peers in one process, in turn, so that drift of the
machine cancels."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from fastalign.bench import commits
from fastalign.bench.machine import machine, peak_mb, read_bandwidth
from fastalign.bench.tables import GROUPS, line, quantiles

MIN_SECONDS = 0.02  # a shorter call is repeated until a measurement takes this long
# numpy's BLAS threads spin for about 20 ms after a call: they must not occupy the next call's core.
REST_SECONDS = 0.1
LONG_SECONDS = 20.0  # a peer's first call of this length counts, without a warm-up
OURS = "fastalign"
Call = Callable[[], Any]


def pytest_addoption(parser):
    parser.addoption("--against", metavar="FOLDER", help="a build of another commit: the one peer; see commits.py")


def pytest_configure(config):
    for name in GROUPS:
        config.addinivalue_line("markers", f"{name}: a group of benchmarks")


@pytest.fixture
def compare(benchmark, request):
    """`compare(ours, peers)` measures one case and stores everything but our own times in `benchmark.extra_info`."""
    gc.collect()
    gc.freeze()  # so that garbage collection skips imported objects
    request.addfinalizer(gc.unfreeze)

    def run(
        ours: Call,
        peers: Mapping[str, Call],
        *,
        floor: Call | int | None = None,
        bars: Mapping[str, float] | None = None,
        check: Callable[[], str | None] | None = None,
        rounds: int = 7,
    ) -> None:
        """Call everything once, check, then time ours and every peer in turn.

        Args:
            ours, peers: functions without arguments. Their `prepare`, if any, is called, untimed, before each call; one
            with `peak_mb` reports its own memory (worker.py).
            floor: what ours cannot beat: a function, timed in the same turn, or the bytes of memory that must be read.
            If ours beats it, it is left out.
            bars: peer -> the ratio to reach.
            check: raises if ours and a peer disagree, which fails the benchmark; may return a text to store.
            rounds: all are timed in each; ratios are computed per round.
        """
        if commits.questions:
            return commits.answer(lambda repeats: _seconds(ours, repeats))
        if other := request.config.getoption("against"):
            build = commits.OtherBuild(other, request.node)
            request.addfinalizer(build.close)
            peers, floor, bars = {build.name: build}, None, None
        timed = {**peers, "floor": floor} if callable(floor) else dict(peers)
        first, peaks = {}, {}
        for name, call in {OURS: ours, **timed}.items():
            first[name], peaks[name] = _warm(call)
        result = check() if check else None
        if benchmark.disabled:
            return benchmark.pedantic(lambda: None)
        repeats = {name: max(1, min(1000, int(MIN_SECONDS / seconds))) for name, seconds in first.items()}
        if other:
            repeats = dict.fromkeys(repeats, repeats[OURS])  # the same call, measured in the same way
        times = {name: [first[name]] if first[name] > LONG_SECONDS else [] for name in timed}

        def one_round_of_each_peer():
            own = benchmark.stats.stats.data
            for name, call in timed.items():
                if len(times[name]) < len(own):
                    times[name].append(_seconds(call, repeats[name]))
            if len(own) < rounds:
                _rest(ours)

        benchmark.group = request.node.path.stem.removeprefix("bench_")
        _rest(ours)
        # As `teardown`, since pytest-benchmark repeats no call within a round that has a `setup`.
        benchmark.pedantic(ours, teardown=one_round_of_each_peer, rounds=rounds, iterations=repeats[OURS])
        own = benchmark.stats.stats.data
        benchmark.extra_info |= machine() | {
            "rounds": rounds,
            "ratio": {name: quantiles([x / y for x, y in zip(times[name], own, strict=True)]) for name in peers},
            "peers": {name: quantiles(times[name]) for name in peers},  # seconds
            "bars": dict(bars or {}),
            "peak_mb": {name: peaks[name] for name in (OURS, *peers)},
        }
        least = statistics.median(times["floor"]) if callable(floor) else floor and floor / read_bandwidth()
        if least and least <= statistics.median(own):
            benchmark.extra_info["floor"] = least  # seconds
        if result:
            benchmark.extra_info["check"] = result
        with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
            print(line(benchmark.stats.as_dict()), flush=True)

    return run


def _warm(call: Call) -> tuple[float, float | None]:
    """Seconds and MB of a first call; if it is short, the seconds of a second one, after the set-up."""
    seconds: list[float] = []
    peak = peak_mb(lambda: seconds.append(_seconds(call, 1)))
    if seconds[0] < 1:
        seconds.append(_seconds(call, 1))
    return max(seconds[-1], 1e-7), getattr(call, "peak_mb", peak)


def _seconds(call: Call, repeats: int) -> float:
    """Seconds per call."""
    if isinstance(call, commits.OtherBuild):
        return call.seconds(repeats)
    _rest(call)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def _rest(call: Call) -> None:
    gc.collect()
    getattr(call, "prepare", lambda: None)()
    time.sleep(REST_SECONDS)
