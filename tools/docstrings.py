"""Docstrings as Markdown, for mkdocstrings: examples become code, and lines `name: what` a list."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)>>> ")
FIELD = re.compile(r"^(\w+(?:, \w+)*(?: \([^)]*\))?): (?=\S)")
SECTION = re.compile(r"^(Args|Returns|Raises):$")


class Examples(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """Examples become blocks of code; of the other lines, those that begin `name: ` a list, and `Args:` a heading."""
    result = []
    for block in re.split(r"\n{2,}", textwrap.dedent(text)):
        lines = block.splitlines()
        start = next((i for i, line in enumerate(lines) if EXAMPLE.match(line)), len(lines))
        if start:
            result.append(_prose(lines[:start]))
        if lines[start:]:
            code = textwrap.dedent("\n".join(lines[start:]))
            result.append(f"```pycon\n{code}\n```")
    return "\n\n".join(result)


def _prose(lines: list[str]) -> str:
    if heading := SECTION.match(lines[0]):
        inner = textwrap.dedent("\n".join(lines[1:])).splitlines()
        return f"**{heading[1]}**\n\n{_prose(inner)}" if inner else f"**{heading[1]}**"
    listed = [FIELD.sub(r"\n- **\1**: ", line) if i else FIELD.sub(r"- **\1**: ", line) for i, line in enumerate(lines)]
    return "\n".join(listed).replace("][", "]\\[")  # shapes are no links
