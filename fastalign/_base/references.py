"""The syntax of a reference to a reward, as in --rewards: [name=]reference[options in brackets].

    positive                          a registered reward
    ./reward#helpful                  a folder of `train.RewardTrainer`, and one of its heads
    my_rewards.py:short               a function, class or object of a file; package.module:short of a module
    hf:unitary/toxic-bert#toxic       a sequence classifier of the hub or in a folder, and its label
    server:http://host:8000#model     a reward model on a server, and its name there
    judge:rubric.yaml#helpful         a language model that rates by a rubric, and one of its values
    worst[hf:a,hf:b]                  several as one: mean, worst, lcb[..., c=1] or rank[..., base=FILE] of references

It only reads the text: what is named need not exist, and nothing heavy is imported.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from fastalign._base.errors import UserError

FORMS = "FILE.py:FUNCTION, MODULE:FUNCTION, hf:MODEL#LABEL, server:URL#MODEL, or judge:FILE.yaml"
COLUMN = re.compile(r"""[^\s,=<>:()\[\]{}"']+""")  # the names that --rewards, --palette and --lam can parse
ENSEMBLES = ("mean", "worst", "lcb", "rank")
_ALIAS = re.compile(r"""\s*([^\s,=<>:()\[\]{}"'/#]+)\s*=\s*(.+)""", re.DOTALL)
_PREFIXED = re.compile(r"(hf|server|judge):(.*)", re.DOTALL)
_INSIDE = re.compile(r"(?<!/)\[")  # where options begin; http://[::1] is an address
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


class Reference(NamedTuple):
    """What a reference says. kind: "name" (of a registered reward, or a folder), "file", "module", "hf", "server",
    "judge" or "ensemble".

    place: the name, folder, file, module, model or address; part: the head, function, label, model or value.
    members: an ensemble's references.
    """

    text: str
    alias: str | None
    kind: str
    place: str
    part: str | None
    options: dict[str, Any]
    members: tuple[str, ...] = ()

    @property
    def local(self) -> str | None:
        """The file or folder that it names, if there is one."""
        path = os.path.expanduser(self.place)
        return path if self.kind not in ("module", "server", "ensemble") and os.path.exists(path) else None


def split(text: str) -> list[str]:
    """The fields between commas, those within brackets apart; without blanks around them."""
    fields, depth = [""], 0
    for character in text:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth <= 0:
            fields.append("")
        else:
            fields[-1] += character
    return [field.strip() for field in fields if field.strip()]


def read(text: str) -> Reference:
    """Parse one reference. Raises UserError, one line, if it is none."""
    alias, body = None, text.strip()
    if (named := _ALIAS.fullmatch(body)) and not os.path.exists(os.path.expanduser(body.partition("#")[0])):
        alias, body = named[1], named[2].strip()
    body, *inside = _INSIDE.split(body, maxsplit=1)
    if inside and not inside[0].endswith("]"):
        raise UserError(f"reward {text!r} must end with its options, as in NAME[option=value]")
    if inside and body.strip() in ENSEMBLES:
        return _ensemble(text, alias, body.strip(), inside[0][:-1])
    options = _options(text, inside[0][:-1]) if inside else {}
    if prefixed := _PREFIXED.fullmatch(body):
        place, mark, part = prefixed[2].partition("#")
        found = Reference(text, alias, prefixed[1], place, part if mark else None, options)
    else:
        place, colon, part = body.rpartition(":")
        kind = "file" if place.endswith(".py") else "module" if _MODULE.fullmatch(place) else ""
        if colon and kind:
            found = Reference(text, alias, kind, place, part, options)
        else:
            place, mark, part = body.partition("#")
            found = Reference(text, alias, "name", place, part if mark else None, options)
    if not found.place or found.part == "":
        raise UserError(f"reward {text!r} must be a name, {FORMS}")
    return found


def _ensemble(text: str, alias: str | None, how: str, inside: str) -> Reference:
    fields = split(inside)
    settings = [field for field in fields if re.match(r"(c|base)\s*=", field)]
    members = tuple(field for field in fields if field not in settings)
    if not members:
        raise UserError(f"reward {text!r} must hold references, as in {how}[positive,harmless]")
    return Reference(text, alias, "ensemble", how, None, _options(text, ",".join(settings)), members)


def _options(text: str, inside: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for field in split(inside):
        name, mark, value = field.partition("=")
        if not mark or not name.strip().isidentifier() or name.strip() in options:
            raise UserError(f"reward {text!r}: its options must be name=value, each name once, got {field!r}")
        try:
            options[name.strip()] = json.loads(value)
        except (ValueError, RecursionError):
            options[name.strip()] = value.strip()
    return options


def local_inputs(text: str) -> list[str]:
    """The files and folders that a text names, if it is a list of references; else nothing."""
    result = []
    for field in split(text):
        try:
            one = read(field)
        except UserError:
            continue
        named = [one.local, *(os.path.expanduser(value) for value in one.options.values() if isinstance(value, str))]
        result += [path for path in named if path is not None and Path(path).exists()]
        result += [path for member in one.members for path in local_inputs(member)]
    return result
