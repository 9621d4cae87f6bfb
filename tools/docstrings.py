"""Docstrings as Markdown, for mkdocstrings: examples become code, and lines `name: what` a list."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)>>> ")
FIELD = re.compile(r"^([A-Za-z_]\w*(?: \([^)]*\))?): (?=\S)")


class Examples(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """Paragraphs with `>>>` become blocks of code, from there on; of the others, lines `name: what` a list."""
    result = []
    for block in re.split(r"\n{2,}", textwrap.dedent(text)):
        lines = block.splitlines()
        start = next((i for i, line in enumerate(lines) if EXAMPLE.match(line)), len(lines))
        if start:
            result.append("\n".join(map(_listed, lines[:start])).replace("][", "]\\["))  # shapes are no links
        if lines[start:]:
            code = textwrap.dedent("\n".join(lines[start:]))
            result.append(f"```pycon\n{code}\n```")
    return "\n\n".join(result)


def _listed(line: str) -> str:
    return FIELD.sub(r"- **\1**: ", line)
