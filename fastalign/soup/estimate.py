"""How long a merge will take: a part of its largest tensor merged for real, into a file that is never seen."""

from __future__ import annotations

import os
import tempfile
import time
from typing import NamedTuple

from fastalign import backend
from fastalign.soup.dtypes import FLOATS, SIZES
from fastalign.soup.inputs import opened
from fastalign.soup.plan import Plan
from fastalign.soup.shard import chunk_of, segment
from fastalign.soup.stream import merge_tasks, stream
from fastalign.soup.tasks import Tasks

_SAMPLE = 64_000_000  # bytes, read and written


class Estimate(NamedTuple):
    """seconds: of the whole merge; rate: bytes read and written a second; sample: bytes that were moved to know it."""

    seconds: float
    rate: float
    sample: int


def estimate(plan: Plan) -> Estimate | None:
    """From the rate of a sample of the inputs, written to the disk where the output will be, flushed, and removed; of what
    torch makes tensor by tensor, from the largest one, which is not written.

    None where nothing of the plan is floating-point. Raises OSError where the inputs cannot be read or nothing be written.
    """
    tensors = {
        name: tensor for shard in plan.layout for name, tensor in shard.tensors.items() if tensor.dtype in FLOATS
    }
    there = tensors.keys() - (plan.embeddings.names if plan.embeddings else set())
    name = max(there, key=lambda one: tensors[one].count, default=None)
    if name is None or tensors[name].count == 0:
        return None
    tensor, outputs, threads = tensors[name], len(plan.weights), backend.threads()
    width = sum(SIZES[one[name].dtype] for one in plan.inputs) + SIZES[tensor.dtype] * outputs
    row = tensor.shape[-1] if tensor.shape else 1
    n = min(tensor.count, max(1, _SAMPLE // width // row) * row)
    if name in plan.blocks_of:
        began = time.perf_counter()
        for _ in plan.blocks_of[name]():
            pass
        seconds = (time.perf_counter() - began) / tensor.count * sum(one.count for one in tensors.values())
        return Estimate(seconds, (plan.read_bytes + plan.written_bytes) / seconds, tensor.count * width)
    folder = next(one for one in (plan.out.absolute(), *plan.out.absolute().parents) if one.is_dir())
    with opened(plan.sources) as files, tempfile.TemporaryFile(dir=folder) as out:
        began = time.perf_counter()
        step = plan.step_of(name)
        prepared = time.perf_counter() - began
        offsets = [k * n * SIZES[tensor.dtype] for k in range(outputs)]
        weights = [] if isinstance(step, Tasks) else step
        part = segment(plan, name, n, [out.fileno()] * outputs, offsets, files, weights)
        began = time.perf_counter()
        chunk = chunk_of(plan, threads)
        if isinstance(step, Tasks):
            merge_tasks(part, _shortened(step, n, tensor.count), tensor.dtype, chunk=chunk, threads=threads)
        else:
            stream([part], tensor.dtype, chunk=chunk, threads=threads)
        os.fsync(out.fileno())
        took = time.perf_counter() - began
    each = prepared / tensor.count + took / n
    seconds = each * sum(one.count for one in tensors.values())
    return Estimate(seconds, (plan.read_bytes + plan.written_bytes) / seconds, n * width)


def told(plan: Plan) -> str:
    """For people, on one line."""
    from fastalign.soup.plan import size

    try:
        found = estimate(plan)
    except OSError as error:
        return f"time: unknown, a sample could not be merged ({error.strerror})"
    if found is None:
        return "time: none to speak of, nothing is mixed"
    return f"time: about {_duration(found.seconds)}, {size(found.rate)}/s, measured on {size(found.sample)} of it"


def _shortened(tasks: Tasks, n: int, whole: int) -> Tasks:
    """For the first n elements only, ranks in proportion."""
    choices = (one._replace(first=one.first * n // whole, last=one.last * n // whole) for one in tasks.choices)
    return tasks._replace(choices=tuple(choices))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
