"""This machine: processor and software, the memory that a call takes, and the rate of reading memory."""

from __future__ import annotations

import datetime
import functools
import gc
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

import fastalign
from fastalign import backend

PACKAGES = ("torch", "transformers", "trl", "peft", "numpy", "scipy", "cvxpy", "clarabel")


def machine() -> dict[str, Any]:
    """The machine and the date of a measurement."""
    processor = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            named = (line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
            processor = next(named, processor)
    if kind := generation():  # AMD's virtual processors bear no number
        processor += f" ({kind.replace('zen', 'Zen ')})"
    versions = {"python": platform.python_version(), "fastalign": fastalign.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "isa": backend.native.active_isa() if backend.native else "none",
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


@functools.cache
def generation() -> str | None:
    """ "zen4" or "zen5" of AMD's processors, on which oneDNN and MKL differ by a factor; None: another one."""
    try:
        with open("/proc/cpuinfo") as file:
            first = file.read().partition("\n\n")[0]
    except OSError:
        return None
    fields = dict(line.split("\t", 1) for line in first.splitlines() if "\t" in line)
    fields = {name.strip(): value.strip(": \t") for name, value in fields.items()}
    if fields.get("vendor_id") != "AuthenticAMD" or "avx512f" not in fields.get("flags", ""):
        return None
    return {"25": "zen4", "26": "zen5"}.get(fields.get("cpu family", ""))


def bar(elsewhere: float | None, *, zen4: float | None = None, zen5: float | None = None) -> float | None:
    """The ratio to reach on this processor."""
    return {"zen4": zen4, "zen5": zen5}.get(generation() or "") or elsewhere


@functools.cache
def read_bandwidth() -> float:
    """Bytes per second of a sum over 256 MB with torch's threads: the best of seven."""
    data, times = torch.ones(1 << 26), []
    for _ in range(8):  # the first makes the threads
        began = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - began)
    return data.nbytes / min(times[1:])


def peak_mb(call: Callable[[], Any]) -> float | None:
    """Growth of the resident set over one call; None if unknown."""
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


def status_kb(field: str, pid: int | str = "self") -> int:
    """A figure of a process from Linux's /proc; 0 if the process is ending. OSError on other systems."""
    with open(f"/proc/{pid}/status") as file:
        return next((int(line.split()[1]) for line in file if line.startswith(field + ":")), 0)
