"""Prompts from data sets that were not written as prompts: film reviews (imdb) and whole dialogues (Anthropic/hh-rlhf).

Both are known by their columns as well as by their hub names, so a local file of the same form reads the same.
"""

from __future__ import annotations

import os
from pathlib import Path

from fastalign.data import prompts, rows
from fastalign.errors import UserError

IMDB = ("imdb", "stanfordnlp/imdb")
HH_RLHF = ("hh-rlhf", "Anthropic/hh-rlhf")
IMDB_WORDS = 8
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_SHORT = {"hh-rlhf": "Anthropic/hh-rlhf", "imdb": "stanfordnlp/imdb"}


def hub_name(name: str) -> str:
    """The full hub name of the two data sets that are also known by a short one; others as they are."""
    return _SHORT.get(name, name)


def first_words(text: str, k: int) -> str:
    """The first k words of a text, its HTML line breaks and runs of blanks as single blanks."""
    return " ".join(text.replace("<br />", " ").split()[:k])


def last_turn(dialogue: str) -> tuple[str, str]:
    """A dialogue "\\n\\nHuman: ... \\n\\nAssistant: ..." as (prompt up to and with the last "Assistant:", what follows).

    Raises UserError where no turn is the assistant's.
    """
    head, mark, reply = dialogue.rpartition(ASSISTANT)
    if not mark:
        raise UserError(f"must hold a turn that begins with {ASSISTANT!r}, got {_brief(dialogue)!r}")
    return head + mark, reply


def split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two dialogues of one beginning as (prompt, chosen, rejected): hh-rlhf's form.

    They are split at the last assistant's turn where that leaves one prompt, else at the last one that both share
    (some of its dialogues part before their last turns). Raises UserError where they share none.
    """
    prompt, reply = last_turn(chosen)
    other, against = last_turn(rejected)
    if prompt == other:
        return prompt, reply, against
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071  character by character is what is meant
    head, mark, _ = shared.rpartition(ASSISTANT)
    if not mark:
        raise UserError(f"chosen and rejected must begin with the same turns, got {_brief(chosen)!r}")
    prompt = head + mark
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def load_prompts(
    name_or_path: str | os.PathLike, *, words: int | None = None, column: str | None = None, split: str = "train"
) -> list[str]:
    """Prompts for rollouts, from whatever `data.prompts.load` reads and also from imdb and hh-rlhf.

    imdb (hub names "imdb" or "stanfordnlp/imdb"): the first 8 words of each review. hh-rlhf ("hh-rlhf" or
    "Anthropic/hh-rlhf"), and any local file with a column "chosen" and none of prompts: each dialogue up to its last
    assistant's turn. Repeats are dropped, the first of each kept.
    words: only so many words of each; with dialogues, an error. column, split: as in `data.prompts.load`.
    Raises FileNotFoundError or UserError, one line.
    """
    name = os.fspath(name_or_path)
    if words is not None and not (isinstance(words, int) and words >= 1):
        raise UserError(f"words must be an integer, at least 1, got {words!r}")
    if column is None and _has_dialogues(name, split):
        if words is not None:
            raise UserError(f"{name}: words must be left out for dialogues, whose prompt ends with a turn, got {words}")
        found = []
        for i, row in enumerate(rows.read(hub_name(name), split=split, what="dialogues")):
            try:
                found.append(last_turn(_text(row.get("chosen")))[0])
            except UserError as error:
                raise UserError(f"{name}: row {i}: chosen {error}") from None
    else:
        found = prompts.load(hub_name(name), column=column, split=split)
        if words is None and name in IMDB:
            words = IMDB_WORDS
        if words is not None:
            found = [first_words(text, words) for text in found]
    return list(dict.fromkeys(found))


def _has_dialogues(name: str, split: str) -> bool:
    if name in HH_RLHF:
        return True
    path = Path(name).expanduser()
    if not path.is_file() or path.suffix.lower() not in rows.SUFFIXES:
        return False
    try:
        first = rows.read(path, split=split, what="prompts")[0]
    except UserError:  # a list of strings, or broken: for the reader of prompts to say
        return False
    return "chosen" in first and not any(column in first for column in prompts.COLUMNS)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise UserError(f"must be a string, got {type(value).__name__}")
    return value


def _brief(text: str, width: int = 40) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
