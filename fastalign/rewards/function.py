"""A reward from a plain function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fastalign._base.errors import UserError
from fastalign.data.conversations import as_text
from fastalign.rewards.base import Reward, as_scores, check_texts, with_conversations


class FunctionReward:
    """`fn(prompts, responses)` as a reward; made by `from_function`."""

    fn: Callable[[list[str], list[str]], Sequence[float]]
    name: str

    def __init__(self, fn: Callable[[list[str], list[str]], Sequence[float]], name: str):
        self.fn, self.name = fn, name

    def __call__(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        prompts = [as_text(prompt) for prompt in with_conversations(prompts)]
        check_texts(prompts, responses)
        return as_scores(self.name, self.fn(prompts, responses), len(prompts))


def from_function(fn: Callable[[list[str], list[str]], Sequence[float]], name: str) -> Reward:
    """A reward from `fn(prompts, responses) -> n numbers`, higher is better. Called once per call, never cached. For a
    prompt that is a conversation, fn receives the text of the last user turn.

    >>> from fastalign import rewards
    >>> length = rewards.from_function(lambda prompts, responses: [len(text) for text in responses], "length")
    >>> length(["Hello"], ["Hi"])
    array([2.], dtype=float32)
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function of (prompts, responses), got {type(fn).__name__}")
    if not isinstance(name, str) or not name:
        raise UserError(f"name must be a non-empty str, got {name!r}")
    return FunctionReward(fn, name)
