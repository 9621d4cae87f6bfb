"""Prompts: the 64 bundled ones, local files, and hub data sets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastalign._base.errors import UserError
from fastalign._base.files import check_input
from fastalign.data import rows as sources
from fastalign.data.conversations import EXTRAS, Conversation, check_utf8
from fastalign.data.dialogues import prompt_of

COLUMNS = ("prompt", "messages", "text")
SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".parquet", ".arrow", ".feather")
_BUNDLED = Path(__file__).parent / "prompts.jsonl"


def bundled(k: int | None = None) -> list[str]:
    """The bundled prompts: 64 of 8 kinds (reviews, advice, stories, provocations, ...).

    With k: a fixed subset spread evenly over the kinds (16 has two of each).

    >>> from fastalign.data import prompts
    >>> len(prompts.bundled()), prompts.bundled(1)
    (64, ['Write a short review of a restaurant where the soup arrived cold.'])
    """
    by_kind: dict[str, list[str]] = {}
    for line in _BUNDLED.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_kind.setdefault(row["kind"], []).append(row["prompt"])
    prompts = [prompt for round_ in zip(*by_kind.values(), strict=True) for prompt in round_]
    if k is None:
        return prompts
    if not 1 <= k <= len(prompts):
        raise UserError(f"k must lie in 1..{len(prompts)}, the number of bundled prompts, got {k}")
    return prompts[:k]


def load(
    name_or_path: str | os.PathLike[str], *, column: str | None = None, split: str = "train", limit: int | None = None
) -> list[str]:
    """Prompts from "bundled", a file with one of SUFFIXES, or a data set's hub name.

    column: the column with the prompts; by default "prompt", else "messages", else "text", else the common beginning of
    "chosen" and "rejected". A .txt file has one prompt per line, a .json file a list of strings or of objects; for
    texts without columns, giving a column is an error. split: only for a hub data set. limit: return this many at most,
    the first. A prompt is a string or a conversation, a list of messages, which becomes a
    `data.conversations.Conversation` (a str); columns "tools" and "chat_template_kwargs" beside it are passed to the
    chat template, as in TRL. Raises FileNotFoundError or UserError, one line: empty file, missing column, blank prompt
    and its row.
    """
    check_limit(limit)
    name = os.fspath(name_or_path)
    if not name.strip():
        raise UserError(f"prompts must be 'bundled', a file or a data set's name, got {name!r}")
    if name == "bundled":
        sources.no_split(name, split)
        if column is not None:
            raise _no_columns(name, column)
        return bundled()[:limit]
    path = Path(name).expanduser()
    suffix = sources.suffix_of(path)
    if path.is_dir():
        raise UserError(f"{name}: prompts must be a file ({', '.join(SUFFIXES)}), this is a folder")
    if path.exists():
        check_input(path)
    if not path.exists():
        if suffix in SUFFIXES or path.is_absolute() or name.startswith((".", "~")):
            raise FileNotFoundError(f"{name}: no such prompt file")
        rows = sources.from_hub(name, split=split, what="prompts")
        wanted = _columns(name, rows.column_names, column)
        rows = rows.select_columns(wanted)
    elif suffix not in SUFFIXES:
        raise UserError(f"{name}: prompts must be a {', '.join(SUFFIXES)} file, got {suffix or 'no suffix'}")
    elif suffix == ".txt":
        sources.no_split(name, split)
        if column is not None:
            raise _no_columns(name, column)
        rows = _lines(path)
    else:
        sources.no_split(name, split)
        rows = sources.local(path, lambda columns: _columns(name, columns, column))
    found = [_prompt(name, i, row, column) for i, row in enumerate(rows)]
    if not found:
        raise UserError(f"{name}: contains no prompts")
    return found[:limit]


def check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")


def _no_columns(source: str, column: str) -> UserError:
    return UserError(f"column must be left out for {source}: its prompts are texts without columns, got {column!r}")


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    return text.removesuffix("\n").split("\n") if text else []


def _columns(source: str, columns: Iterable[str], column: str | None) -> list[str]:
    """The columns that form a prompt, among the existing ones."""
    columns = list(columns)
    extras = [name for name in EXTRAS if name in columns]
    for name in (column,) if column else COLUMNS:
        if name in columns:
            return [name, *extras]
    if column is None and "chosen" in columns:
        return [name for name in ("chosen", "rejected") if name in columns] + extras
    rule = repr(column) if column else " or ".join(map(repr, COLUMNS))
    raise UserError(f"{source}: must have a column {rule}, got {', '.join(map(str, columns)) or 'none'}")


def _prompt(source: str, i: int, row: object, column: str | None) -> str:
    """The prompt of a row: a non-blank string, or a conversation."""
    extras: dict[str, Any] = {}
    if isinstance(row, dict):
        wanted = _columns(source, row, column)[0]
        extras = {name: row[name] for name in EXTRAS if row.get(name)}
        if wanted == "chosen":
            try:
                row = prompt_of(row)
            except UserError as error:
                raise UserError(f"{source}: row {i}: {error}") from None
        else:
            row = row[wanted]
    elif isinstance(row, str) and column is not None:
        raise _no_columns(source, column)
    elif not isinstance(row, str):
        raise UserError(f"{source}: entry {i} must be a string or an object, got {type(row).__name__}")
    try:
        if isinstance(row, list) or (extras and isinstance(row, str) and row.strip()):
            return Conversation(row if isinstance(row, list) else [{"role": "user", "content": row}], **extras)
    except UserError as error:
        raise UserError(f"{source}: prompt {i} {error}") from None
    if not isinstance(row, str) or not row.strip():
        raise UserError(f"{source}: prompt {i} must be a string that is not blank, or messages, got {row!r}")
    check_utf8(row, f"{source}: prompt {i}")
    return row
