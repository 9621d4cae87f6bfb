"""Prompts and their completions as token ids, as TRL has them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

from fastalign._base.errors import UserError


def encode(
    tokenizer: Any, prompts: Sequence[Any], options: dict[str, Any], *, replied: bool = False
) -> list[list[int]]:
    """Token ids: messages by the chat template with these options, text as it is.

    replied: the messages end with a reply, so the template opens none.
    """
    if isinstance(prompts[0], str):
        ids = tokenizer(text=list(prompts))["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=not replied, tokenize=True, return_dict=True, **options
        )["input_ids"]
    for prompt, row in zip(prompts, ids, strict=True):
        if not row:
            raise UserError(f"prompt must have at least one token, got {prompt!r}")
    return [list(row) for row in ids]


def continued(
    tokenizer: Any, prompt: Any, texts: Sequence[str], options: dict[str, Any]
) -> tuple[list[int], list[list[int]]]:
    """The ids of a prompt, and of each completion, which ends with the end token, or as the chat template ends a reply.

    Prompt and completion are encoded together, as in TRL's DPO: a completion begins where one of them differs from the
    prompt alone.
    """
    whole: list[Any]
    if isinstance(prompt, str):
        end = tokenizer.eos_token or ""
        whole = [prompt + text.removesuffix(end) + end for text in texts]
    else:
        whole = [[*prompt, {"role": "assistant", "content": text}] for text in texts]
    alone, rows = encode(tokenizer, [prompt], options)[0], encode(tokenizer, whole, options, replied=True)
    shared = len(os.path.commonprefix([alone, *rows]))  # noqa: RUF071  of lists
    if shared < len(alone):
        lost = tokenizer.decode(alone[shared:])
        warnings.warn(
            f"a prompt's end, {lost!r}, has other tokens before its completions, and is left out", stacklevel=2
        )
    return alone[:shared], [row[shared:] for row in rows]
