"""Prompts from data sets that were not written as prompts: film reviews (imdb) and whole dialogues (Anthropic/hh-rlhf).

Both are recognised by their columns as well as by their hub names, so a local file in the same format works too.
"""

from __future__ import annotations

import os
from pathlib import Path

from fastalign._base.errors import UserError
from fastalign.data import prompts, rows
from fastalign.data.conversations import Conversation
from fastalign.data.dialogues import prompt_of

IMDB = ("imdb", "stanfordnlp/imdb")
HH_RLHF = ("hh-rlhf", "Anthropic/hh-rlhf")
IMDB_WORDS = 8
_SHORT = {"hh-rlhf": "Anthropic/hh-rlhf", "imdb": "stanfordnlp/imdb"}


def hub_name(name: str) -> str:
    """The full hub name of the two data sets that also have a short one; others unchanged."""
    return _SHORT.get(name, name)


def first_words(text: str, k: int) -> str:
    """The first k words of a text, with HTML line breaks and runs of blanks replaced by single blanks."""
    return " ".join(text.replace("<br />", " ").split()[:k])


def load_prompts(
    name_or_path: str | os.PathLike[str],
    *,
    words: int | None = None,
    column: str | None = None,
    split: str = "train",
    limit: int | None = None,
) -> list[str]:
    """Prompts for rollouts, from everything that `data.prompts.load` reads, and from imdb and hh-rlhf.

    imdb (hub names "imdb" or "stanfordnlp/imdb"): the first 8 words of each review. hh-rlhf ("hh-rlhf" or
    "Anthropic/hh-rlhf"), and any local file with a column "chosen" and none of prompts: each dialogue up to the
    assistant's last turn; for messages, the common beginning of chosen and rejected. Duplicates are dropped; the first
    is kept.
    words: use only the first `words` words of each; an error with dialogues. column, split, limit: as in
    `data.prompts.load`.
    Raises FileNotFoundError or UserError, one line.
    """
    prompts.check_limit(limit)
    name = os.fspath(name_or_path)
    if words is not None and not (isinstance(words, int) and words >= 1):
        raise UserError(f"words must be an integer, at least 1, got {words!r}")
    if column is None and _has_dialogues(name, split):
        if words is not None:
            raise UserError(f"{name}: words must be left out for dialogues, whose prompt ends with a turn, got {words}")
        result = []
        for i, row in enumerate(rows.stream(hub_name(name), split=split, what="dialogues")):
            try:
                prompt = prompt_of(row)
                result.append(prompt if isinstance(prompt, str) else Conversation(prompt))
            except UserError as error:
                raise UserError(f"{name}: row {i}: {error}") from None
    else:
        result = prompts.load(hub_name(name), column=column, split=split)
        if words is None and name in IMDB:
            words = IMDB_WORDS
        if words is not None:
            if any(isinstance(prompt, Conversation) for prompt in result):
                raise UserError(f"{name}: words must be left out for conversations, got {words}")
            result = [first_words(text, words) for text in result]
    return list(dict.fromkeys(result))[:limit]


def _has_dialogues(name: str, split: str) -> bool:
    if name in HH_RLHF:
        return True
    path = Path(name).expanduser()
    if not path.is_file() or path.suffix.lower() not in rows.SUFFIXES:
        return False
    try:
        first = rows.stream(path, split=split, what="prompts").first()
    except UserError:  # a list of strings, or invalid: `prompts.load` reports it
        return False
    return "chosen" in first and not any(column in first for column in prompts.COLUMNS)
