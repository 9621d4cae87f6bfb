"""Streaming merges: soups of models larger than memory, many in one read, and safe to interrupt.

The outputs are written to a work folder beside the target, one shard of each at a time: written, flushed to disk,
renamed. When all are complete, the work folder becomes the target. A stopped merge resumes after its last finished
shards; the result does not depend on interruptions.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastalign import backend
from fastalign._base import files, progress
from fastalign._base.errors import printable
from fastalign._base.former import renamed
from fastalign._base.units import size
from fastalign.soup.checkpoint import FLOATS, SIZES, allow_open_files, opened, unchanged
from fastalign.soup.outputs import already_made, chunk_of, growing, recorded
from fastalign.soup.plan import Plan, make
from fastalign.soup.stacks import Model
from fastalign.soup.steps import NotFinite, Tasks
from fastalign.soup.stream import merge_tasks, weighted_sums

if TYPE_CHECKING:
    import torch
    from numpy.typing import ArrayLike


class Merged(NamedTuple):
    """The result of a merge. resumed: shards that were already finished; seconds: from the first read to the last
    rename; not_finite: how many numbers are NaN or infinite and in which tensors, one line, "" for none."""

    out: Path
    models: int
    read_bytes: int
    written_bytes: int
    resumed: int
    seconds: float
    not_finite: str = ""


@renamed(progress="show_progress")
def merge(
    models: Sequence[Model],
    weights: ArrayLike | Sequence[float | Mapping[str, Any]] | None,
    out: str | os.PathLike[str],
    *,
    method: str = "linear",
    base: Model | None = None,
    parameters: Mapping[str, Any] | None = None,
    sidecar_from: str = "first",
    tokenizer: str | None = None,
    pad_to_multiple_of: int | None = None,
    chat_template: str | None = None,
    dtype: str | torch.dtype | None = None,
    normalize: bool | None = None,
    max_shard_size: int | str = "5GB",
    memory_limit: int | str | None = None,
    force: bool = False,
    sync: bool = True,
    strict: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Merged:
    """Merge checkpoints of one architecture into one soup, or into many with a single read.

    Args:
        models: m folders, *.safetensors files or hub names; or stacks: lists of (model, first, last) from the bottom
            up, whose layers first ... last - 1 are stacked; tensors before the layers come from the lowest model, those
            after them from the highest.
        weights: (m,) for one model at `out`; (K, m) for K models at `out`/0 ... `out`/(K-1), each input byte is read
            once. A weight of (m,) may be {pattern: weight or weights over the layers}. None: equal weights, if the
            method needs none.
        out: the output folder. It must not exist, be empty, or contain exactly this merge, finished; with overwrite, it
            may contain another merge, which is replaced once this one is complete.
        method: one of METHODS, whose docstrings (`help(soup.METHODS["ties"])`) say what each does: "linear", Σ ρ w;
            "task_arithmetic", base + Σ λ (w - base); of task vectors some elements, "ties", "dare_linear",
                "dare_ties", "della",
            "della_linear", "breadcrumbs", "breadcrumbs_ties"; means on spheres, "slerp", "nuslerp", "multislerp",
                "karcher", "warp",
            "model_stock"; "ema", the moving average of checkpoints; mergekit's "sce", "nearswap", "arcee_fusion",
                "ram".
        base: the model from which the others were trained, for methods that work on the differences.
        parameters: the method's own, such as {"density": 0.3, "lambda": 0.7}. A number may also be {pattern: number},
            or {pattern: numbers over the layers}, and density, epsilon and gamma a list with one for each model.
        sidecar_from: the model whose configuration and tokenizer the outputs get: "first", "base", or a model as named
            in models.
        tokenizer: "sidecar", that model's; the folder of another; or "union", that model's with the others' tokens
            added. Embeddings and heads get one row per token, in its order: a model's own row; for a token that it does
            not have, the base's (or the named model's) row, else the mean of the models that have it. None leaves
            embeddings unchanged, with that model's tokenizer.
        pad_to_multiple_of: with a tokenizer, pads the number of rows to a multiple of it, with rows that are the mean
            of the others.
        chat_template: the text of another chat template, or "auto" for the most common one among the models.
        dtype: the stored type of floating-point tensors; None keeps the first model's, tensor by tensor.
        normalize: linear only. True divides the weights by their sum, False uses them unchanged, None requires that
            they sum to 1.
        max_shard_size: of one output file, such as "5GB"; a larger tensor gets its own file.
        memory_limit: for buffers, such as "512MB" (the default).
        force: merge even if configurations or tokenizers differ; the first model's are copied.
        sync: False lets the operating system decide when the outputs reach the disk, which is as fast as memory; use it
            for temporary soups. A power cut may then corrupt them, so an interrupted merge starts again from the
            beginning.

        strict: raise UserError, before the output gets its name, if an input has NaN or infinity or a number is outside
            the output type's range. Otherwise these are counted: a warning, `Merged.not_finite`, and "not_finite" in
            soup.json.

    Sums are computed in float32 (float64 if an input or the output is float64) and rounded once, to nearest even.
    Integer and boolean tensors are copied, and must be equal. The first model's configuration, tokenizer, generation
    configuration and chat template are copied, so that transformers loads the output; the files' metadata and soup.json
    record the recipe.

    Raises:
        UserError, FileNotFoundError: invalid arguments or files, before a byte is written; also too little disk space,
            and an input that changes during the merge.
        OSError: a disk error. Inputs and finished shards stay; the same call resumes from them.
    """
    made = make(
        models, weights, out, method=method, base=base, parameters=parameters, sidecar_from=sidecar_from,
        tokenizer=tokenizer, pad_to_multiple_of=pad_to_multiple_of, chat_template=chat_template, dtype=dtype,
        normalize=normalize, max_shard_size=max_shard_size, memory_limit=memory_limit, force=force,
    )  # fmt: skip
    for note in made.notes:
        warnings.warn(printable(note), stacklevel=3)
    return warned(execute(made, sync=sync, strict=strict, overwrite=overwrite, show_progress=show_progress))


def warned(merged: Merged) -> Merged:
    """Warns Python callers of a merge about non-finite numbers."""
    if merged.not_finite:
        warnings.warn(printable(f"{merged.out}: {merged.not_finite}"), stacklevel=4)
    return merged


@renamed(progress="show_progress")
def execute(
    plan: Plan, *, sync: bool = True, strict: bool = False, overwrite: bool = False, show_progress: bool = True
) -> Merged:
    """Run a plan, or the rest of it. sync, strict, overwrite: see `merge`."""
    with nullcontext() if sync else files.unflushed():
        return _execute(plan, strict, overwrite, show_progress)


def _execute(plan: Plan, strict: bool, overwrite: bool, show_progress: bool) -> Merged:
    began = time.perf_counter()
    chunk_of(plan)  # first, to report a memory limit that is too low
    count, seen, resumed, read, written = len(plan.weights), NotFinite(), 0, 0, 0
    if already_made(plan, overwrite=overwrite):
        seen.join((recorded(plan.target) or {}).get("not_finite") or {}, strict=strict)
        return Merged(plan.out, count, 0, 0, len(plan.layout), time.perf_counter() - began, seen.message())
    allow_open_files(count + sum(len(one.files) for one in plan.inputs))
    with growing(plan) as outputs:
        outputs.check_space()
        if plan.embeddings and outputs.todo:
            plan.embeddings.write(outputs.work.making)
            unchanged(plan.sources)
        total = plan.read_bytes + plan.written_bytes
        with (
            progress.bar("merge", total=total // 10**6, unit="MB", show=show_progress) as advance,
            opened(plan.inputs if outputs.todo else ()) as inputs,
        ):
            moved = _Megabytes(advance)
            for shard in plan.layout:
                nbytes_in = sum(one[name].nbytes for name in shard.tensors for one in plan.inputs)
                if shard in outputs.done:
                    resumed += 1
                    seen.join(outputs.work.note(plan.files_of(shard)[0]), strict=strict)
                    moved(nbytes_in + shard.nbytes * count)
                else:
                    seen.join(outputs.write(shard, inputs, moved).record, strict=strict)
                    read, written = read + nbytes_in, written + shard.nbytes * count
        if plan.embeddings:
            plan.embeddings.remove()
        outputs.accompany(seen)
        outputs.work.become(plan.target)
        files.sync(plan.target.parent)
    return Merged(plan.out, count, read, written, resumed, time.perf_counter() - began, seen.message())


class _Megabytes:
    """Collects bytes, and passes whole megabytes to the progress bar."""

    def __init__(self, advance: Callable[[int], None]):
        self.advance, self.bytes = advance, 0

    def __call__(self, nbytes: int) -> None:
        before, self.bytes = self.bytes, self.bytes + nbytes
        self.advance(self.bytes // 10**6 - before // 10**6)


# ---- how long it will take ----


_SAMPLE = 64_000_000  # bytes, read and written


class Estimate(NamedTuple):
    """seconds: for the whole merge; rate: bytes read and written per second; sample: bytes moved to measure it."""

    seconds: float
    rate: float
    sample: int


def estimate(plan: Plan) -> Estimate | None:
    """Estimates the time from a sample of the inputs that is merged, written to the output's disk, flushed, and
    removed; for methods that torch computes tensor by tensor, from the largest tensor, which is not written.

    None if no tensor of the plan is floating-point. Raises OSError if the inputs cannot be read or the sample cannot be
    written.
    """
    tensors = {
        name: tensor for shard in plan.layout for name, tensor in shard.tensors.items() if tensor.dtype in FLOATS
    }
    there = tensors.keys() - (plan.embeddings.names if plan.embeddings else set())
    name = max(there, key=lambda one: tensors[one].numel, default=None)
    if name is None or tensors[name].numel == 0:
        return None
    tensor, outputs = tensors[name], len(plan.weights)
    width = sum(SIZES[one[name].dtype] for one in plan.inputs) + SIZES[tensor.dtype] * outputs
    row = tensor.shape[-1] if tensor.shape else 1
    n = min(tensor.numel, max(1, _SAMPLE // width // row) * row)
    began = time.perf_counter()
    step = plan.step_of(name)
    if callable(step):
        for _ in step():
            pass
        each, moved = (time.perf_counter() - began) / tensor.numel, tensor.numel * width
    else:
        prepared = time.perf_counter() - began
        moved, took = n * width, _time_of(plan, name, step, n, tensor.dtype)
        each = prepared / tensor.numel + took / n
    seconds = each * sum(one.numel for one in tensors.values())
    return Estimate(seconds, (plan.read_bytes + plan.written_bytes) / seconds, moved)


def _time_of(plan: Plan, name: str, step: list[float] | Tasks, n: int, dtype: str) -> float:
    """Seconds to merge and flush the first n elements of a tensor."""
    outputs, options = len(plan.weights), {"chunk": chunk_of(plan), "threads": backend.threads()}
    folder = next(one for one in (plan.out.absolute(), *plan.out.absolute().parents) if one.is_dir())
    with opened(plan.sources) as inputs, tempfile.TemporaryFile(dir=folder) as out:
        offsets, weights = [k * n * SIZES[dtype] for k in range(outputs)], step if isinstance(step, list) else []
        part = plan.segment(name, inputs, [out.fileno()] * outputs, offsets, weights)._replace(n=n)
        began = time.perf_counter()
        if isinstance(step, Tasks):
            merge_tasks(part, _shortened(step, n, plan.inputs[0][name].numel), dtype, **options)
        else:
            weighted_sums([part], dtype, **options)
        os.fsync(out.fileno())
        return time.perf_counter() - began


def estimated(plan: Plan) -> str:
    """For people, on one line."""
    try:
        result = estimate(plan)
    except OSError as error:
        return f"time: unknown, a sample could not be merged ({error.strerror})"
    if result is None:
        return "time: negligible, nothing is mixed"
    return f"time: about {_duration(result.seconds)}, {size(result.rate)}/s, measured on {size(result.sample)} of it"


def _shortened(tasks: Tasks, n: int, whole: int) -> Tasks:
    """The same step for the first n elements only, with ranks in proportion."""
    choices = (one._replace(first=one.first * n // whole, last=one.last * n // whole) for one in tasks.choices)
    return tasks._replace(choices=tuple(choices))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
