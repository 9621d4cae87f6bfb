"""Write docs/reference/commands.md: every command with its options, from the command line itself.

`python tools/write_commands.py` rewrites it; a test compares the file with its output.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs" / "reference" / "commands.md"
HEAD = """# Commands

Written by `python tools/write_commands.py` from the command line itself. `fastalign COMMAND --help` shows the same.

Exit codes: 0 success, 1 a user's error (explained in one line), 2 usage, 3 the palette is proved infeasible (0 with
`--allow-infeasible`), 130 after Ctrl-C, 143 after SIGTERM. Names of options may be written with underscores.
"""


def commands(group: Any, before: str = "fastalign") -> Iterator[tuple[str, Any]]:
    for name, one in group.commands.items():
        if hasattr(one, "commands"):
            yield from commands(one, f"{before} {name}")
        else:
            yield f"{before} {name}", one


def section(name: str, command: Any) -> list[str]:
    example = command.epilog.partition(": ")[2]
    lines = [f"## {name}", "", _plain(command.help), "", "```bash", example, "```", ""]
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    lines += ["| option | | default |", "| --- | --- | --- |"]
    declared = inspect.signature(command.callback).parameters
    kinds = {name: next(iter(get_args(one.annotation)), None) for name, one in declared.items()}
    return [*lines, *(_row(one, kinds.get(one.name)) for one in [*arguments, *options]), ""]


def _row(one: Any, kind: Any) -> str:
    if one.param_type_name == "argument":
        label = f"`{one.name.upper()}{' ...' if one.nargs != 1 else ''}`"
    else:
        label = ", ".join(f"`{flag}`" for flag in [*one.opts, *one.secondary_opts])
    given = "" if one.default is None or (one.is_flag and not one.default) else _default(one)
    what = _plain(one.help)
    if isinstance(kind, type) and issubclass(kind, Enum):
        what += f" One of {', '.join(f'`{choice.value}`' for choice in kind)}."
    return f"| {label} | {what} | {'required' if one.required else given} |"


def _default(one: Any) -> str:
    if one.is_flag:
        return f"`{one.opts[0]}`"
    value = getattr(one.default, "value", one.default)
    return "" if callable(value) else f"`{value}`"


def _plain(text: str | None) -> str:
    """On one line, without rich's markup, and with nothing that Markdown would read."""
    text = " ".join((text or "").split()).replace("\\[", "[")
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def page() -> str:
    import typer

    from fastalign.cli.main import app

    return "\n".join([HEAD, *(line for one in commands(typer.main.get_command(app)) for line in section(*one))])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}\n")
