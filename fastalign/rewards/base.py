"""The reward protocol, and a base class that checks, deduplicates and caches scores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from fastalign._base.errors import UserError
from fastalign.data.conversations import as_prompt, as_text


@runtime_checkable
class Reward(Protocol):
    """Anything with a `name` that maps n prompts and n responses to n scores: float32 (n,), higher is better.

    For a prompt that is a conversation it receives the text of the last user turn, or, if its attribute
    `reads_messages` is True, the `data.conversations.Conversation` itself, a str with .messages.
    """

    name: str

    def __call__(self, prompts: list[str], responses: list[str]) -> np.ndarray: ...


def is_reward(item: object) -> bool:
    """Whether it is a reward, and not a reward class."""
    return isinstance(item, Reward) and callable(item) and not isinstance(item, type)


def named(reward: Reward, name: str) -> Reward:
    """A copy of the reward under another name, with the same model and cache."""
    reward = copy.copy(reward)
    reward.name = name
    return reward


def with_conversations(prompts: Sequence[str | Sequence[dict[str, Any]]]) -> list[str]:
    """The prompts, with lists of messages converted to Conversations. Raises UserError."""
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        return cast(Any, prompts)  # `check_texts` reports it
    given: Sequence[Any] = prompts
    return [as_prompt(p, f"prompts[{i}]") if isinstance(p, list) else p for i, p in enumerate(given)]


def check_texts(prompts: Sequence[str], responses: Sequence[str]) -> None:
    """Raise TypeError or UserError unless both are lists of str of equal length. Empty strings are allowed."""
    for argument, texts in (("prompts", prompts), ("responses", responses)):
        if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
            raise TypeError(f"{argument} must be a list of str, got {type(texts).__name__}")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"{argument}[{index}] must be a str, got {type(text).__name__}")
    if len(prompts) != len(responses):
        raise UserError(
            f"prompts and responses must have one length, got {len(prompts)} prompts and {len(responses)} responses"
        )


class NotNumbers(TypeError):
    """A reward's result that is no list of numbers."""


def as_scores(name: str, values: ArrayLike, count: int) -> np.ndarray:
    """A reward's result, tensors of any device and dtype included, as float32 (count,); raises TypeError or UserError,
    naming the reward, if it is anything else."""
    if hasattr(values, "detach"):  # torch's, perhaps with a gradient, in bfloat16 or on a GPU
        values = values.detach().float().cpu().numpy()
    try:
        with np.errstate(over="ignore"):  # infinite then, which `evaluate` tells
            scores = np.asarray(values, dtype=np.float32)
        if values is None:
            raise TypeError
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a list of tensors with gradients
        raise NotNumbers(f"reward {name!r} must return {count} numbers, got {type(values).__name__}") from None
    if scores.shape != (count,):
        raise UserError(f"reward {name!r} must return shape ({count},), got {scores.shape}")
    return scores


def evaluate(
    reward: Reward, prompts: list[str], responses: list[str], advance: Callable[[int], None] = lambda count: None
) -> np.ndarray:
    """A reward's scores of n texts, float32 (n,); each reward gets conversations in the form that it reads. Raises
    UserError or TypeError, one line, for another shape and for scores that are not finite."""
    if isinstance(reward, CachedReward):
        values: ArrayLike = reward(prompts, responses, advance=advance)
    else:
        whole = getattr(reward, "reads_messages", False)
        values = reward(prompts if whole else [as_text(prompt) for prompt in prompts], responses)
        advance(len(prompts))
    scores = as_scores(reward.name, values, len(prompts))
    if (bad := np.flatnonzero(~np.isfinite(scores))).size:
        raise UserError(
            f"reward {reward.name!r} must return finite scores, got {scores[bad[0]]} at index {bad[0]} "
            f"({bad.size} of {len(prompts)} not finite)"
        )
    return scores


class CachedReward:
    """Base of the built-in rewards: a subclass implements `_score`; this class provides `__call__`.

    Each distinct (prompt, response) is scored once per call, and the last `cache_size` of them are cached between calls
    (0: none), until the weights of its model change.
    """

    uses_prompt = True  # False: the score is a function of the response alone
    reads_messages = False  # True: `_score` is given Conversations as they are; False: the text of their last user turn

    def __init__(self, name: str, *, cache_size: int = 65536):
        if cache_size < 0:
            raise UserError(f"cache_size must be >= 0, got {cache_size}")
        self.name = name
        self.cache_size = cache_size
        self._cache: dict[tuple[str, str], float] = {}  # least recently used first
        self._scored_by: Any = None  # the model's state for which the cache is valid

    def _score(self, prompts: list[str], responses: list[str]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """Yield (indices, scores) batch by batch until every index has its score."""
        raise NotImplementedError

    def _live_model(self) -> Any:
        """The model, once it is loaded."""
        return None

    def model_state(self) -> Any:
        """What its cache is valid for: the state of the model's weights; None before it is loaded."""
        model = self._live_model()
        if model is None:
            return None
        from fastalign.models.identity import weights_state

        return weights_state(model)

    def clear_cache(self) -> None:
        self._cache.clear()

    def __call__(
        self, prompts: list[str], responses: list[str], *, advance: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Scores of n (prompt, response) pairs, float32 (n,); `advance(k)` is called after each k pairs."""
        prompts = with_conversations(prompts)
        check_texts(prompts, responses)
        if not self.reads_messages:
            prompts = [as_text(prompt) for prompt in prompts]
        advance = advance or (lambda count: None)
        keys = list(zip(prompts if self.uses_prompt else [""] * len(responses), responses, strict=True))
        # Trained since then, or adapters switched.
        if self._scored_by is not None and self._scored_by != self.model_state():
            self.clear_cache()
        scores = {}  # this call's scores, in case the cache is smaller than the call
        for key in dict.fromkeys(keys):
            if key in self._cache:
                scores[key] = self.remember(key, self._cache.pop(key))
        # Sorted, so that batches (and with them the last bits of a model's scores) do not depend on the order.
        missing = sorted(set(keys) - scores.keys())
        advance(len(keys) - len(missing))
        if missing:
            for indices, values in self._score([prompt for prompt, _ in missing], [text for _, text in missing]):
                for index, value in zip(indices, values, strict=True):
                    scores[missing[index]] = self.remember(missing[index], float(value))
                advance(len(indices))
        self._scored_by = self.model_state()
        return np.fromiter((scores[key] for key in keys), dtype=np.float32, count=len(keys))

    def remember(self, key: tuple[str, str], value: float) -> float:
        if self.cache_size:
            self._cache[key] = value
            if len(self._cache) > self.cache_size:
                del self._cache[next(iter(self._cache))]
        return value


class PerTextReward(CachedReward):
    """A reward computed one response at a time, without model or prompt: a subclass implements `value`."""

    uses_prompt = False

    def value(self, response: str) -> float:
        raise NotImplementedError

    def _score(self, prompts: list[str], responses: list[str]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        for start in range(0, len(responses), 256):
            indices = range(start, min(start + 256, len(responses)))
            yield indices, np.array([self.value(responses[index]) for index in indices])
