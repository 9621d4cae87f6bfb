"""The matrix of scores for which a palette is solved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastalign._base import progress
from fastalign._base.errors import UserError
from fastalign.data.conversations import as_text
from fastalign.rewards.base import CachedReward, Reward, as_scores, check_texts, is_reward, with_conversations
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
    """
    prompts = with_conversations(prompts)
    check_texts(prompts, responses)
    listed: Any = [names] if isinstance(names, str) or is_reward(names) else names
    if len(listed) == 0:
        raise UserError("names must hold at least one reward, got none")
    rewards = load(listed)
    spoken = [as_text(prompt) for prompt in prompts]
    matrix = np.empty((len(prompts), len(rewards)), dtype=np.float32)
    for column, reward in enumerate(rewards):
        with progress.bar(f"scoring {reward.name}", total=len(prompts), unit="texts", show=show_progress) as advance:
            if isinstance(reward, CachedReward):
                values = reward(prompts, responses, advance=advance)
            else:
                values = reward(prompts if getattr(reward, "reads_messages", False) else spoken, responses)
                advance(len(prompts))
        matrix[:, column] = as_scores(reward.name, values, len(prompts))
        bad = np.flatnonzero(~np.isfinite(matrix[:, column]))
        if bad.size:
            raise UserError(
                f"reward {reward.name!r} must return finite scores, got {matrix[bad[0], column]} at index {bad[0]} "
                f"({bad.size} of {len(prompts)} not finite)"
            )
    return matrix
