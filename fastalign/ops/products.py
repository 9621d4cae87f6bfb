"""Matrix products on a CPU at the best rate that torch offers: with its own BLAS (MKL on x86) or with oneDNN.

Which is faster depends on the processor, the dtype and the kind of product: MKL uses AVX-512 only on Intel processors.
It is measured at first use, for some milliseconds, and cached on disk by processor, threads and torch's version;
FASTALIGN_PRODUCTS=torch or onednn decides without measuring. The two sum in different orders, so their results differ
by rounding.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign._base.cache import cache_dir
from fastalign._base.errors import UserError
from fastalign._base.files import write_json
from fastalign.ops.once import once_differentiable

PROVIDERS = ("torch", "onednn")
KINDS = ("linear", "packed", "grad_input", "grad_weight")
DTYPES = (torch.float32, torch.bfloat16)  # for which oneDNN is tried
ROWS = (1, 16, 256)  # measured; a product uses the nearest size up to its own; for one row no weight is packed
_CLASSES = tuple(f"{kind} {rows}" for kind in KINDS for rows in ROWS if (kind, rows) != ("packed", 1))
GAIN = 1.05  # torch's own product is replaced only by one this much faster,
SMALL = 10_000_000  # and only from this many multiplications on: a call of oneDNN's takes ten microseconds longer
_PLAIN = (Tensor, torch.nn.Parameter)  # not sharded over processes, nor traced
_WIDTHS = 1024, 512  # of the weight in the measurement
_SECONDS = 0.008  # of a spell of measurement, for each kind and number of rows
_SPELLS = 2, 12  # at least, and at most where other programs use the processor
_STEADY = 1.1  # the two best spells differ by less, for each provider


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, as `F.linear`: x (..., K), weight (N, K), bias (N,) or None -> (..., N).

    If oneDNN computes it, differentiable once, each derivative by its fastest provider.
    """
    if _provider("linear", x, weight) == "torch":
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _onednn(x, weight, bias)


def packs(weight: Tensor, rows: int) -> bool:
    """Whether `pack` returns a copy of such a weight."""
    plain = weight.device.type == "cpu" and type(weight) in _PLAIN and weight.dtype in DTYPES and weight.numel() > 0
    return plain and chosen("packed", rows, weight.dtype) != "torch"


def pack(weight: Tensor, rows: int) -> Tensor | None:
    """A copy of the weight in oneDNN's layout for `packed_linear` with that many rows; None if that is not faster than
    `linear`. For weights that do not change meanwhile."""
    return _reorder(weight.detach(), rows) if packs(weight, rows) else None


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, without derivatives, for a W of `pack`."""
    return _onednn(x, packed, bias)


def grad_input(dy: Tensor, weight: Tensor) -> Tensor:
    """dY W, the derivative of `linear` with respect to x: dy (..., N), weight (N, K) -> (..., K)."""
    return dy @ weight if _provider("grad_input", dy, weight.t()) == "torch" else _onednn(dy, weight.t())


def grad_weight(dy: Tensor, x: Tensor) -> Tensor:
    """dYᵀ X, the derivative of `linear` with respect to W: dy (..., N), x (..., K) -> (N, K)."""
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    return dy.t() @ x if _provider("grad_weight", dy, x.t()) == "torch" else _onednn(dy.t(), x.t())


def linear_into(out: Tensor, x: Tensor, weight: Tensor, *, kept: bool = True) -> Tensor:
    """x Wᵀ (M, N) for x (M, K), weight (N, K): in `out` if `kept`, else in any memory."""
    if _provider("linear", x, weight) == "torch":
        return torch.mm(x, weight.t(), out=out)
    made = _onednn(x, weight)
    return out.copy_(made) if kept else made


def add_grad_input(total: Tensor, dy: Tensor, weight: Tensor) -> None:
    """total (M, K) += dY W."""
    if _provider("grad_input", dy, weight.t()) == "torch":
        total.addmm_(dy, weight)
    else:
        total.add_(_onednn(dy, weight.t()))


def add_grad_weight(total: Tensor, dy: Tensor, x: Tensor, *, beta: float = 1.0) -> None:
    """total (N, K) = beta · total + dYᵀ X; with beta 0, `total` is overwritten."""
    if _provider("grad_weight", dy, x.t()) == "torch":
        total.addmm_(dy.t(), x, beta=beta)
    elif beta:
        total.mul_(beta).add_(_onednn(dy.t(), x.t()))
    else:
        total.copy_(_onednn(dy.t(), x.t()))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        return (
            grad_input(dy, weight) if ctx.needs_input_grad[0] else None,
            grad_weight(dy, x) if ctx.needs_input_grad[1] else None,
            dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None,
        )


def _reorder(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# ---- which provider ----


def forced() -> frozenset[str] | None:
    """The kinds of products that oneDNN computes by FASTALIGN_PRODUCTS; None if it leaves the choice to measurements.

    Raises UserError for a value that is none of auto, torch, onednn and what `choice` returns.
    """
    return _classes(os.environ.get("FASTALIGN_PRODUCTS", "auto"))


@functools.cache
def _classes(value: str) -> frozenset[str] | None:
    named = {"auto": None, "torch": frozenset[str](), "onednn": frozenset(_CLASSES)}
    if value in named:
        return named[value]
    classes = frozenset(name.strip() for name in value.split(","))
    if not classes <= {*_CLASSES}:
        every = ", ".join(_CLASSES)
        raise UserError(f"FASTALIGN_PRODUCTS must be auto, torch or onednn, or some of {every}; got {value!r}")
    return classes


def choice(dtype: torch.dtype) -> str:
    """The choice in force, as FASTALIGN_PRODUCTS takes it: with the same value, another run has the same products."""
    made = [name for name in _CLASSES if _made(name, dtype)]
    return {0: "torch", len(_CLASSES): "onednn"}.get(len(made), ",".join(made))


@functools.cache
@torch.no_grad()
def available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether oneDNN's products in this dtype run here: many processors with AVX2 alone have none in bfloat16."""
    try:
        x = torch.ones(16, 16, dtype=dtype)
        tried = (_onednn(x, weight) for weight in (x, x.t(), _reorder(x, 16)))
        return bool(torch.backends.mkldnn.is_available() and all((y == 16).all() for y in tried))
    except (AttributeError, RuntimeError):
        return False


def rates(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """GFLOP/s of each provider, by kind and number of rows ("linear 256"); measured if not known yet. For a dtype that
    is `available`."""
    every = (name.split() for name in _CLASSES)
    return {f"{kind} {rows}": _rates(kind, int(rows), dtype, torch.get_num_threads()) for kind, rows in every}


def chosen(kind: str, rows: int, dtype: torch.dtype) -> str:
    """The provider of products of this kind, dtype and number of rows."""
    return "onednn" if _made(f"{kind} {_measured_rows(rows)}", dtype) else "torch"


def quicker(dtype: torch.dtype) -> bool:
    """Whether `linear` uses oneDNN for this dtype with any number of rows."""
    return any(chosen("linear", rows, dtype) != "torch" for rows in ROWS)


def _measured_rows(rows: int) -> int:
    return max(least for least in ROWS if least <= max(rows, 1))


def _made(name: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN computes products of this class, such as "linear 256"."""
    if name not in _CLASSES or dtype not in DTYPES or not available(dtype):
        return False
    if (classes := forced()) is not None:
        return name in classes
    return _faster(name, dtype, torch.get_num_threads())


def _may_be_quicker(x: Tensor, weight: Tensor) -> bool:
    return (
        x.numel() * len(weight) >= SMALL
        and x.device.type == "cpu"
        and x.dtype in DTYPES
        and weight.dtype == x.dtype
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _provider(kind: str, x: Tensor, other: Tensor) -> str:
    """The provider of x's product with `other`."""
    return chosen(kind, x.numel() // x.shape[-1], x.dtype) if _may_be_quicker(x, other) else "torch"


@functools.cache
def _faster(name: str, dtype: torch.dtype, threads: int) -> bool:
    kind, _, rows = name.partition(" ")
    rates = _rates(kind, int(rows), dtype, threads)
    others = _rates("linear", int(rows), dtype, threads).values() if kind == "packed" else [rates["torch"]]
    return rates["onednn"] > GAIN * max(others)


@functools.cache
def _rates(kind: str, rows: int, dtype: torch.dtype, threads: int) -> dict[str, float]:
    """The rates that the first process measured, for all processes: one choice per machine."""
    name, path = f"{kind} {rows} {str(dtype).removeprefix('torch.')}", _file(threads)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if name not in (kept := _kept(path)):
                write_json(path, kept := kept | {name: _measured(kind, rows, dtype)})
        return kept[name]
    except OSError:  # no cache folder
        return _measured(kind, rows, dtype)


@torch.no_grad()
def _measured(kind: str, rows: int, dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of each provider, the best of several products of random matrices.

    Another program can slow one provider in all products of a spell, so the best of it must be seen twice.
    """
    n, k = _WIDTHS
    draw = torch.Generator().manual_seed(0)
    x, dy, w = (torch.randn(shape, generator=draw).to(dtype) for shape in ((rows, k), (rows, n), (n, k)))
    packed = _reorder(w, rows) if kind == "packed" else w
    calls: dict[str, Callable[[], Tensor]] = {
        "linear": {"torch": lambda: F.linear(x, w), "onednn": lambda: _onednn(x, w)},
        "packed": {"torch": lambda: F.linear(x, w), "onednn": lambda: _onednn(x, packed)},
        "grad_input": {"torch": lambda: dy @ w, "onednn": lambda: _onednn(dy, w.t())},
        "grad_weight": {"torch": lambda: dy.t() @ x, "onednn": lambda: _onednn(dy.t(), x.t())},
    }[kind]
    for call in calls.values():
        call()
    spells: list[dict[str, float]] = []
    for _ in range(_SPELLS[1]):
        spells.append(_spell(calls))
        best = {provider: sorted(spell[provider] for spell in spells)[:2] for provider in calls}
        if len(spells) >= _SPELLS[0] and all(second < _STEADY * first for first, second in best.values()):
            break
    return {provider: round(2e-9 * rows * n * k / seconds[0], 1) for provider, seconds in best.items()}


def _spell(calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """The least time of each call, made in turn for _SECONDS."""
    least = dict.fromkeys(calls, float("inf"))
    until = time.perf_counter() + _SECONDS
    while time.perf_counter() < until:
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            least[name] = min(least[name], time.perf_counter() - began)
    return least


def _kept(path: Path) -> dict[str, dict[str, float]]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) and all(map(_is_rates, kept.values())) else {}


def _is_rates(value: object) -> bool:
    return isinstance(value, dict) and {*value} == {*PROVIDERS} and all(type(x) is float for x in value.values())


def _file(threads: int) -> Path:
    words = f"{_processor()} {threads} torch {torch.__version__}"
    return cache_dir() / "products" / f"{''.join(c if c.isalnum() else '-' for c in words)}.json"


@functools.cache
def _processor() -> str:
    """The processor's make and model from Linux, else from Python."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("vendor_id", "cpu family", "model", "model name", "CPU implementer", "CPU part")
    lines = [line.partition(":") for line in text.partition("\n\n")[0].splitlines()]
    return " ".join(value.strip() for name, _, value in lines if name.strip() in wanted)
