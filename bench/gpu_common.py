"""Shared by the compile gate, the byte counter and the GPU benchmark: each kernel at the sizes it is made for.

bench/gpu_<op>.py yields the cases of one op. A case builds its tensors on any device: "meta" for the gate, which
compiles and runs nothing; "cpu", small, for the interpreter; "cuda" for real.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastalign import kernels


@dataclass(frozen=True)
class Work:
    """One call of a kernel's launcher on existing tensors."""

    run: Callable[[], Any]
    bytes: int  # that must move: each input read once, each output written once
    flops: int = 0  # of its matrix products
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)  # name -> the same work by others; "cuda" alone
    check: Callable[[], None] | None = None  # asserts that the result is right, against the reference in float64
    rounds: int | None = None  # timed at most so often


@dataclass(frozen=True)
class KernelCase:
    """`build(device, small)` makes the work; small: a size for the interpreter, odd where that matters."""

    name: str
    build: Callable[[str, bool], Work]
    streaming: bool = True  # bytes moved may not pass 1.05 of the minimum
    published: str = ""  # what others report for this shape: the line to beat


def cases() -> Iterator[tuple[str, KernelCase]]:
    """(op, case) of every op with a kernel."""
    for op in kernels.names():
        for case in importlib.import_module(f"fastalign.bench.gpu_{op}").cases():
            yield op, case
