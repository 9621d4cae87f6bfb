"""Draw docs/architecture.md and its diagram: layers from the packages' imports, purposes from their docstrings.

`python tools/draw_architecture.py` rewrites both; a test compares the files with its output.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "fastalign_kernels"  # installed as fastalign.kernels
PAGE, DIAGRAM = ROOT / "docs" / "architecture.md", ROOT / "docs" / "architecture.svg"
WIDTH, BOX, ROW = 760, (112, 34), 74  # of the diagram, a package in it, and from one row to the next
COLUMNS = {  # of four, from the left, where it is not the second: no line passes behind a box
    "soup": 0, "decode": 0, "rewards": 0, "data": 0, "palette": 2, "ops": 2, "kernels": 2, "reference": 2, "losses": 3,
}  # fmt: skip
HEAD = """# Architecture

![What each package imports, from the top down](architecture.svg)

*A line leads from a package down to one that it imports, unless it imports it through another too. All import `_base`.*

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


def used() -> dict[str, set[str]]:
    """What each package imports, the top layer first."""
    names = [name for layer in layers() for name in layer if name != "__main__"]
    uses: dict[str, set[str]] = {name: set() for name in names}
    for own, path in files():
        if own in uses:
            uses[own] |= imports(path) & uses.keys() - {own, "_base", "backend"}
    return uses


def page() -> str:
    uses = used()
    imported = {name: ", ".join(f"`{other}`" for other in uses if other in uses[name]) for name in uses}
    rows = [f"| `{name}` | {purpose(name)} | {imported[name]} |" for name in uses]
    return "\n".join([HEAD, "| package | what it is | imports |", "| --- | --- | --- |", *rows, TAIL])


def diagram() -> str:
    """An SVG, each package just below the lowest that imports it."""
    uses = {name: others for name, others in used().items() if name not in ("_base", "backend")}
    uses["data"] = uses["data"] - {"rewards"}  # the exception that the page tells
    depth: dict[str, int] = {}
    for name in sorted(uses, key=lambda name: name == "data"):  # the upper layers first; data below rewards
        depth[name] = 1 + max((depth[other] for other in depth if name in uses[other]), default=-1)
    depth["integrations"] = min(depth[other] for other in uses["integrations"]) - 1  # nothing imports it
    rows = [[name for name in uses if depth[name] == level] for level in range(1 + max(depth.values()))]
    place = {
        name: (WIDTH * (COLUMNS.get(name, 1) + 0.5) / 4, ROW * y + BOX[1]) for y, row in enumerate(rows) for name in row
    }

    def below(name: str) -> set[str]:
        return uses[name].union(*(below(other) for other in uses[name]))

    lines, boxes, texts = [], [], []
    for name, (x, y) in place.items():
        for other in sorted(uses[name] - set().union(*(below(between) for between in uses[name]))):
            to, end = place[other]
            start, end = y + BOX[1] / 2, end - BOX[1] / 2
            bend = (end - start) / 2
            lines.append(f'<path d="M{x:g} {start:g}C{x:g} {start + bend:g} {to:g} {end - bend:g} {to:g} {end:g}"/>')
        corner = f'x="{x - BOX[0] / 2:g}" y="{y - BOX[1] / 2:g}" width="{BOX[0]}" height="{BOX[1]}" rx="5"'
        boxes.append(f"<rect {corner}/>")
        texts.append(f'<text x="{x:g}" y="{y + 5:g}">{name}</text>')
    size = f'width="{WIDTH}" height="{ROW * len(rows)}" viewBox="0 0 {WIDTH} {ROW * len(rows)}"'
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="monospace" font-size="14">',
        '<g fill="none" stroke="#8a94a6" stroke-width="1.3">', *lines, "</g>",
        '<g fill="#e6edf7" stroke="#4a6fa5">', *boxes, "</g>",
        '<g fill="#1b2a41" text-anchor="middle">', *texts, "</g>",
        "</svg>", "",
    ])  # fmt: skip


if __name__ == "__main__":
    for path, content in ((PAGE, page()), (DIAGRAM, diagram())):
        path.write_text(content, encoding="utf-8")
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")
