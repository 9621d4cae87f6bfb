"""Counts the bytes that every Triton kernel loads and stores, in the interpreter, against the minimum.

    python tools/bytes_moved.py [OP ...] [--in-turn] [--table FILE]

The minimum reads each input once and writes each output once. A streaming kernel may move 1.05 times that; one that
multiplies matrices reads its operands once per block of rows, and is reported without a verdict. Within one load or
store an address counts once, and masked places do not count.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder

from fastalign._base.files import atomic_write

LIMIT = 1.05


@dataclass
class Tally:
    """Bytes of global memory."""

    loaded: int = 0
    stored: int = 0


@dataclass(frozen=True)
class Moved:
    """What one case moved, against the minimum."""

    op: str
    case: str
    tally: Tally
    least: int
    streaming: bool

    @property
    def ratio(self) -> float:
        return (self.tally.loaded + self.tally.stored) / self.least

    @property
    def fault(self) -> bool:
        return self.streaming and self.ratio > LIMIT


@contextmanager
def counted() -> Iterator[Tally]:
    """Count every load and store of the interpreter inside the block."""
    tally = Tally()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def size(pointers, mask) -> int:
        active = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]
        return len(np.unique(active)) * max(pointers.get_element_ty().primitive_bitwidth // 8, 1)

    def counted_load(self, ptrs, mask, *args):
        tally.loaded += size(ptrs, mask)
        return load(self, ptrs, mask, *args)

    def counted_store(self, ptrs, value, mask, *args):
        tally.stored += size(ptrs, mask)
        return store(self, ptrs, value, mask, *args)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counted_load, counted_store
    try:
        yield tally
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


def measure(op: str, case) -> Moved:
    """Run one case, small, and count."""
    work = case.build("cpu", True)
    with counted() as tally:
        work.run()
    return Moved(op, case.name, tally, work.bytes, case.streaming)


def table(found: list[Moved]) -> str:
    """Markdown, one line per case."""
    lines = ["| op | case | loaded | stored | least | ratio |", "| --- | --- | --- | --- | --- | --- |"]
    for m in found:
        ratio = f"{m.ratio:.3f}" if m.streaming else f"{m.ratio:.1f} (products)"
        lines.append(f"| {m.op} | {m.case} | {m.tally.loaded:,} | {m.tally.stored:,} | {m.least:,} | {ratio} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help="kernels to run; all by default")
    parser.add_argument("--in-turn", action="store_true", help="every fourth case, different ones each day")
    parser.add_argument("--table", type=Path, help="write the Markdown table there")
    options = parser.parse_args(argv)
    from fastalign.bench.gpu_common import cases

    wanted = [(op, case) for op, case in cases() if not options.ops or op in options.ops]
    if not wanted:
        parser.error(f"no kernel is named {', '.join(options.ops)}")
    if options.in_turn:
        wanted = wanted[int(time.time() // 86400) % 4 :: 4]
    result = []
    for op, case in wanted:
        result.append(measure(op, case))
        print(
            f"{op}: {case.name}: {result[-1].ratio:.3f} of the minimum{'  TOO MUCH' if result[-1].fault else ''}",
            flush=True,
        )
    if options.table:
        with atomic_write(options.table) as path:
            path.write_text(table(result))
    faults = [m for m in result if m.fault]
    print(f"{len(result)} cases, {len(faults)} over {LIMIT} of the minimum")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
