"""Draw docs/architecture.md: the layers from the packages' imports, their purposes from their docstrings.

`python tools/draw_architecture.py` rewrites it; a test compares the file with its output.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "fastalign_kernels"  # installed as fastalign.kernels
PAGE = ROOT / "docs" / "architecture.md"
HEAD = """# Architecture

One sentence for each package, from the top layer down. Imports go down only, which `make lint` enforces, with one
exception within a layer: `data` ranks its bundled pairs by a reward, and `rewards` reads texts with `data`. The last
column leaves out the imports that nearly all packages have, of `_base` and `backend`.
"""
TAIL = """
Ops run in one of three places (`fastalign/backend.py`):

- `csrc/`: the native C++17 extension for CPUs, imported as `fastalign._C`. Only `bindings.cpp` depends on Python.
  Kernels are compiled once per instruction set and chosen at run time.
- `kernels/`: Triton kernels, one file per op, imported as `fastalign.kernels` when a GPU tensor arrives.
- `fastalign/reference.py`: every op in plain torch, the definition against which both are tested.

An op has a definition in `reference`, a file `ops/<op>.py` (checks, choice of backend, autograd), a Triton kernel,
`tests/ops/test_<op>.py`, and a C++ kernel where that is faster than torch. All have the op's name, except for the fused
head's C++ kernels (`csrc/linear_logprobs.cpp`). `fastalign info` lists the available kernels.

From a prompt to a selected text: `data.prompts` → `decode.Sampler` (with `decode.shared_prompt` and
`decode.token_loop`) → `rewards.score` → `palette.solve` → `decode.select` → `report`. `jobs.align` does this from file
to file, and the commands of `cli` run its steps.
"""


def layers() -> list[list[str]]:
    """The layers of the contract in pyproject.toml, top first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    ordered = next(one["layers"] for one in contracts if one["type"] == "layers")
    return [[name.strip() for name in layer.replace("|", ":").split(":")] for layer in ordered]


def files() -> Iterator[tuple[str, Path]]:
    """Every source file, and the package or module at the top of fastalign/ that it belongs to."""
    for path in (ROOT / "fastalign").rglob("*.py"):
        yield path.relative_to(ROOT / "fastalign").parts[0].removesuffix(".py"), path
    for path in KERNELS.glob("*.py"):
        yield "kernels", path


def imports(path: Path) -> set[str]:
    result = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastalign"):
            inner = node.module.split(".")[1:2]
            result.update(inner or [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            result.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fastalign."))
    return result


def purpose(name: str) -> str:
    package = KERNELS if name == "kernels" else ROOT / "fastalign" / name
    source = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
    text = ast.get_docstring(ast.parse(source.read_text())) or ""
    return " ".join(text.partition("\n\n")[0].split())


def page() -> str:
    names = [name for layer in layers() for name in layer if name != "__main__"]
    uses: dict[str, set[str]] = {name: set() for name in names}
    for own, path in files():
        if own in uses:
            uses[own] |= imports(path) & uses.keys() - {own, "_base", "backend"}
    imported = {name: ", ".join(f"`{other}`" for other in names if other in uses[name]) for name in names}
    rows = [f"| `{name}` | {purpose(name)} | {imported[name]} |" for name in names]
    return "\n".join([HEAD, "| package | what it is | imports |", "| --- | --- | --- |", *rows, TAIL])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}\n")
