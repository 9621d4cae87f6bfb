"""The matrix of scores for which a palette is solved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastalign._base import progress
from fastalign._base.errors import UserError
from fastalign.rewards.base import Reward, check_texts, evaluate, is_reward, with_conversations
from fastalign.rewards.references import load


def score(
    names: str | Reward | Sequence[str | Reward],
    prompts: list[str],
    responses: list[str],
    *,
    show_progress: bool = False,
) -> np.ndarray:
    """Scores of n (prompt, response) pairs by m rewards, given by reference (`parse`) or as objects: float32 (n, m).

    prompts: strings, or conversations (lists of messages). Language models and classifiers that read chats receive
    whole conversations; other rewards the text of the last user turn.

    Raises UserError or TypeError, in one line, for an unknown name, a missing package, lists of unequal length, a
    result of the wrong shape, and for a score that is NaN or infinite (with the reward and the index of the pair).

    >>> from fastalign import rewards
    >>> rewards.score(["diversity"], ["Hello"], ["One of many answers."]).shape
    (1, 1)
    """
    prompts = with_conversations(prompts)
    check_texts(prompts, responses)
    listed: Any = [names] if isinstance(names, str) or is_reward(names) else names
    if len(listed) == 0:
        raise UserError("names must hold at least one reward, got none")
    rewards = load(listed)
    matrix = np.empty((len(prompts), len(rewards)), dtype=np.float32)
    for column, reward in enumerate(rewards):
        with progress.bar(f"scoring {reward.name}", total=len(prompts), unit="texts", show=show_progress) as advance:
            matrix[:, column] = evaluate(reward, prompts, responses, advance)
    return matrix
