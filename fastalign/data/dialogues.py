"""Implicit prompts: the common beginning of two whole conversations, as messages or in hh-rlhf's text format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fastalign._base.errors import UserError
from fastalign.data.conversations import check_messages, text_of

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def last_turn(dialogue: str) -> tuple[str, str]:
    """A dialogue "\\n\\nHuman: ... \\n\\nAssistant: ..." as (prompt up to and including the last "Assistant:", the
    rest).

    Raises UserError if no turn is from the assistant.
    """
    head, mark, reply = dialogue.rpartition(ASSISTANT)
    if not mark:
        raise UserError(f"must hold a turn that begins with {ASSISTANT!r}, got {_brief(dialogue)!r}")
    return head + mark, reply


def split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two dialogues with a common beginning as (prompt, chosen, rejected): hh-rlhf's format.

    They are split at the assistant's last turn if that leaves one prompt, else at the last one that both share (some
    dialogues differ before their last turns). Raises UserError if they share none.
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


def split_messages(chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Two conversations with a common beginning as (prompt, chosen, rejected), each with at least one message of its
    own.

    Raises UserError if they share no message.
    """
    shared, limit = 0, min(len(chosen), len(rejected)) - 1
    while shared < limit and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise UserError("must have a 'prompt', or chosen and rejected that begin with the same messages")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def implicit_prompt(chosen: Any, rejected: Any = None) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected) from completions that contain their prompt: dialogues in text, or messages.

    Without `rejected`, the prompt is everything before chosen's last reply. Raises UserError.
    """
    if isinstance(chosen, str):
        if rejected is None:
            prompt, reply = _about("chosen", last_turn, chosen)
            return prompt, reply, None
        if not isinstance(rejected, str):
            raise UserError("chosen and rejected must be of one kind, got chosen text, rejected none")
        return split_dialogues(chosen, rejected)
    if not isinstance(chosen, list):
        raise UserError(f"chosen must be a dialogue, as text or as messages, got {type(chosen).__name__}")
    _about("chosen", check_messages, chosen)
    if rejected is not None:
        _about("rejected", check_messages, rejected)
        return split_messages(chosen, rejected)
    if len(chosen) < 2:
        raise UserError("chosen must hold a prompt's messages and a reply, got one message")
    return chosen[:-1], chosen[-1:], None


def prompt_of(row: Mapping[str, Any]) -> Any:
    """The prompt, text or messages, of a row with "chosen" and mostly "rejected" and no prompt. Raises UserError.

    For text it is chosen's own: in hh-rlhf the two sides sometimes differ before their last turns.
    """
    chosen = row.get("chosen")
    return implicit_prompt(chosen, None if isinstance(chosen, str) else row.get("rejected"))[0]


def with_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its prompt separate from its completions: its own, or the common beginning of both conversations.

    If a text prompt is the beginning of both conversations, they are cut after their full common beginning. Raises
    UserError.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" not in row:
        if isinstance(chosen, str) and ASSISTANT not in chosen:
            have = ", ".join(map(str, row))
            raise UserError(f"must have a 'prompt', or dialogues with turns {ASSISTANT!r}, got {have}")
        prompt, chosen, rejected = implicit_prompt(chosen, rejected)
        return {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}
    prompt = row["prompt"]
    if not (isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list)):
        return dict(row)
    starts = [side[0].get("role") for side in (chosen, rejected) if side and isinstance(side[0], Mapping)]
    if len(starts) < 2 or "assistant" in starts:
        return dict(row)
    chosen, rejected = _about("chosen", check_messages, chosen), _about("rejected", check_messages, rejected)
    begins, chosen, rejected = split_messages(chosen, rejected)
    if not any(text_of(message.get("content")).strip() == prompt.strip() for message in begins):
        rule = "chosen and rejected must begin with the prompt"
        raise UserError(f"{rule}, got {_brief(text_of(begins[0].get('content')))!r} for {_brief(prompt)!r}")
    return {**row, "prompt": begins, "chosen": chosen, "rejected": rejected}


def _about(column: str, read, value):
    try:
        return read(value)
    except UserError as error:
        raise UserError(f"{column} {error}") from None


def _brief(text: str, width: int = 40) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
