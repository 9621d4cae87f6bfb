"""How everything is measured: ours and the peers in one process, in turn, so that the machine's drift cancels.

A ratio is taken round by round and quoted as its median with the 20th and 80th percentiles. Single times are only
given beside it. Peak memory is the growth of the resident set over one call (Linux). A floor is what the hardware
cannot beat, from the bandwidth measured in the same run.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

import fastalign
from fastalign import backend

MIN_SECONDS = 0.02  # a shorter call is repeated until one measurement lasts so long
# The BLAS under numpy keeps its threads spinning for some 20 ms after a call: they must not take the next one's core.
REST_SECONDS = 0.1
LONG_SECONDS = 20.0  # a first call of that length needs no warming up: it counts


class Apart(NamedTuple):
    """What a call returns that did its work in a process of its own and measured itself there."""

    seconds: float
    peak_mb: float


@dataclass
class Case:
    """One comparison. `peers`: name -> call; `bars`: peer -> the ratio to reach; `floor_bytes`: memory traffic that
    cannot be avoided; `check`: asserts that ours and the peers agree before anything is timed."""

    name: str
    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any]]
    bars: dict[str, float] = field(default_factory=dict)
    floor_bytes: int | None = None
    floor: Callable[[], Any] | None = None  # or a call that does only what cannot be avoided, timed in the same turn
    check: Callable[[], None] | None = None
    rounds: int = 7
    note: Callable[[], str] | None = None
    apart: bool = False  # ours and peers return `Apart`


def measure(case: Case) -> dict[str, Any]:
    """Check, warm up, time in turn; a JSON value."""
    if case.check:
        case.check()
    calls = {"fastalign": case.ours, **case.peers} | ({"floor": case.floor} if case.floor else {})
    if case.apart:
        return _measure_apart(case, calls)
    repeats, peaks = {}, {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        spent: list[float] = []
        peaks[name] = _peak_mb(lambda call=call, spent=spent: spent.append(_seconds(call, 1)))  # also warms up
        repeats[name] = max(1, min(1000, int(MIN_SECONDS / max(spent[0], 1e-7))))
        if spent[0] > LONG_SECONDS:
            times[name] = spent
    for done in range(1, case.rounds + 1):
        for name, call in calls.items():
            if len(times[name]) < done:
                times[name].append(_seconds(call, repeats[name]))
    result: dict[str, Any] = {
        "name": case.name,
        "ms": {name: _spread([1e3 * t for t in ts]) for name, ts in times.items()},
        "ratio": {
            name: _spread([peer / ours for peer, ours in zip(times[name], times["fastalign"], strict=True)])
            for name in case.peers
        },
        "bars": case.bars,
        "peak_mb": {name: peak for name, peak in peaks.items() if name != "floor"},
        "rounds": case.rounds,
    }
    if case.floor_bytes:
        result["floor_ms"] = 1e3 * case.floor_bytes / read_bandwidth()
    elif case.floor:
        result["floor_ms"] = result["ms"].pop("floor")["p50"]
    if case.note:
        result["note"] = case.note()
    return result


def _measure_apart(case: Case, calls: dict[str, Callable[[], Apart]]) -> dict[str, Any]:
    found: dict[str, list[Apart]] = {name: [] for name in calls}
    for _ in range(case.rounds):
        for name, call in calls.items():
            found[name].append(call())
    result = {
        "name": case.name,
        "ms": {name: _spread([1e3 * x.seconds for x in xs]) for name, xs in found.items()},
        "ratio": {
            name: _spread(
                [peer.seconds / ours.seconds for peer, ours in zip(found[name], found["fastalign"], strict=True)]
            )
            for name in case.peers
        },
        "bars": case.bars,
        "peak_mb": {name: max(x.peak_mb for x in xs) for name, xs in found.items()},
        "rounds": case.rounds,
    }
    return result | ({"note": case.note()} if case.note else {})


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    versions = {}
    for name in ("torch", "transformers", "trl", "numpy", "scipy", "cvxpy", "clarabel"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "isa": backend.engine.active_isa() if backend.engine else "none",
        "fastalign": fastalign.__version__,
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


_bandwidth: float | None = None


def read_bandwidth() -> float:
    """Bytes per second of a sum over 256 MB with torch's threads: the best of seven."""
    global _bandwidth
    if _bandwidth is None:
        data = torch.ones(1 << 26)
        data.sum()
        _bandwidth = data.numel() * 4 / min(_seconds(data.sum, 1) for _ in range(7))
    return _bandwidth


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    gc.collect()
    time.sleep(REST_SECONDS)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def _spread(values: list[float]) -> dict[str, float]:
    values = sorted(values)
    if len(values) == 1:
        return {"p20": values[0], "p50": values[0], "p80": values[0]}
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"p20": fifths[0], "p50": statistics.median(values), "p80": fifths[3]}


def _peak_mb(call: Callable[[], Any]) -> float | None:
    """Growth of the resident set over one call; None where the system does not tell."""
    gc.collect()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the high-water mark
    except OSError:
        call()
        return None
    before = status_kb("VmRSS")
    call()
    return max(0.0, (status_kb("VmHWM") - before) / 1024)


def status_kb(field: str) -> int:
    """A figure of this process as Linux tells it; OSError elsewhere."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))
