"""What a call takes of a GPU that need not be there: launches and peak memory, from a trace without one.

    python tools/gpu_costs.py [OP ...] [--table FILE]

Every kernel's cases are traced on "meta" tensors: the launchers run, torch makes shapes, and a Triton kernel's launch
is counted in place of being made. `traced` does so for any call. On CPU tensors a call keeps its values: our ops
compute there, and what their launchers would do on a GPU is traced beside it.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fastalign._base.files import atomic_write
from fastalign.ops import head

NO_LAUNCH = {  # they change how a tensor is seen, or only make room for one
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like",
    "empty_strided", "expand", "lift_fresh", "new_empty", "new_empty_strided", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip
WAITS = {"_local_scalar_dense", "equal", "masked_select", "nonzero", "unique_dim", "_unique2"}


@dataclass
class Traced:
    """bytes: the most held at one time beyond what was there before, results among it; operations: torch's, each at
    least one launch; kernels: launches of each Triton kernel; waits: how often the host needs a value."""

    bytes: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)

    @property
    def launches(self) -> int:
        return self.operations.total() + self.kernels.total()


def traced(run: Callable[[], Any], architecture: int = 90) -> Traced:
    """Of `run`, as on an NVIDIA GPU of that architecture; no kernel is compiled."""
    found = Traced()
    with _without_a_gpu(architecture, found.kernels), _Tracer(found):
        run()
    return found


class _Tracer(TorchDispatchMode):
    def __init__(self, found: Traced):
        super().__init__()
        self.found = found
        self.total, self.held, self.known = 0, {}, set()  # bytes of each storage made here; storages made before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.known.update(x._cdata for x in _storages((args, kwargs)) if x._cdata not in self.held)
        if func.namespace == "fastalign":
            return self._ours(func, args, kwargs)
        with self:
            result = func.decompose(*args, **kwargs)  # into what is launched, if it is no operation of its own
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name not in NO_LAUNCH:
            self.found.operations[name] += 1
        if name in WAITS or (name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])):
            self.found.waits[name] += 1
        self._hold(result)
        return result

    def _ours(self, func, args, kwargs):
        """What the launcher does on a GPU; where the tensors have values, the op's own results."""

        def launch(args):
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)

        if any(x.device.type == "meta" for x in tree_leaves(args) if isinstance(x, torch.Tensor)):
            return launch(args)
        result = func(*args, **kwargs)
        on_gpu = tree_map_only(torch.Tensor, _on_meta, args)
        self.known.update(x._cdata for x in _storages(on_gpu))
        launch(on_gpu)
        self._hold(result)
        return result

    def _hold(self, result: Any) -> None:
        for x in _storages(result):
            if x._cdata not in self.held and x._cdata not in self.known:
                self.held[x._cdata] = x.nbytes()
                self.total += x.nbytes()
                weakref.finalize(x, self._release, x._cdata)
        self.found.bytes = max(self.found.bytes, self.total)

    def _release(self, storage: int) -> None:
        self.total -= self.held.pop(storage)


def _on_meta(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor))


@contextmanager
def _without_a_gpu(architecture: int, kernels: Counter[str]) -> Iterator[None]:
    """Launches are counted in place of being made."""

    def count(self, *args, grid, warmup, **options):
        kernels[self.fn.__name__] += 1

    def budget(memory_budget, weight, learns, chosen, grad_filter):
        return on_device(memory_budget, weight, learns, "triton", grad_filter)

    on_device = head.budget
    gpu = mock.Mock(get_current_target=lambda: GPUTarget("cuda", architecture, 32))
    with ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(kind, "run", count))
        stack.enter_context(mock.patch.object(driver, "_active", gpu))
        stack.enter_context(mock.patch.object(head, "budget", budget))
        yield


def table(rows: list[tuple[str, str, Traced]]) -> str:
    """Markdown, one line per case."""
    lines = ["| op | case | kernels | torch's operations | launches | peak memory |", "| --- " * 6 + "|"]
    for op, case, found in rows:
        kernels = ", ".join(f"{name} {count}" for name, count in found.kernels.items())
        memory = f"{found.bytes / 2**20:,.1f} MB"
        lines.append(f"| {op} | {case} | {kernels} | {found.operations.total()} | {found.launches} | {memory} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help="kernels to trace; all by default")
    parser.add_argument("--table", type=Path, help="write the Markdown table there")
    options = parser.parse_args(argv)
    from fastalign.bench.gpu_common import cases

    rows = [
        (op, case.name, traced(case.build("meta", False).run))
        for op, case in cases()
        if not options.ops or op in options.ops
    ]
    if not rows:
        parser.error(f"no kernel is named {', '.join(options.ops)}")
    print(text := table(rows), end="")
    if options.table:
        with atomic_write(options.table) as path:
            path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
