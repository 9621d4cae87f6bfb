"""Rewards by name, and the matrix of scores that the palette is solved on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from fastalign import progress
from fastalign.data.conversations import as_text
from fastalign.errors import UserError
from fastalign.rewards.base import CachedReward, Reward, as_scores, check_texts, with_conversations


class RewardInfo(NamedTuple):
    """One line on a registered reward; `package` is the module that it needs, `installed` whether it is here."""

    description: str
    package: str | None
    installed: bool


class _Entry(NamedTuple):
    factory: Callable[..., Reward]
    description: str
    package: str | None


_entries: dict[str, _Entry] = {}
_instances: dict[str, Reward] = {}


def register(
    name: str,
    factory: Callable[..., Reward],
    *,
    description: str = "",
    package: str | None = None,
    replace: bool = False,
) -> None:
    """Give `get(name)` a reward: `factory()` makes it at first use, `factory(**options)` where options are given.

    Raises UserError where the name is taken and `replace` is False.
    """
    if not isinstance(name, str) or not name or name != name.strip():
        raise UserError(f"name must be a non-empty str with no blanks around it, got {name!r}")
    if not callable(factory):
        raise TypeError(f"factory must be a callable that returns a reward, got {type(factory).__name__}")
    if name in _entries and not replace:
        raise UserError(f"name {name!r} is already a registered reward; pass replace=True to replace it")
    _entries[name] = _Entry(factory, description, package)
    _instances.pop(name, None)


def available() -> dict[str, RewardInfo]:
    """The registered names, each with its description, the package it needs and whether that is installed."""
    return {
        name: RewardInfo(
            entry.description, entry.package, entry.package is None or find_spec(entry.package) is not None
        )
        for name, entry in _entries.items()
    }


def get(name: str, **options) -> Reward:
    """The reward registered under `name`.

    With no options every call returns the same object, so its cache and its model are shared; with options (those
    of its class, such as `get("perplexity", model="./mine")`) a new one is made.
    Raises UserError, listing the names, where there is none.
    """
    if name not in _entries:
        raise UserError(f"unknown reward {name!r}; available: {', '.join(_entries)}")
    if options:
        return _entries[name].factory(**options)
    if name not in _instances:
        _instances[name] = _entries[name].factory()
    return _instances[name]


def score(
    names: str | Reward | Sequence[str | Reward],
    prompts: list[str],
    responses: list[str],
    *,
    show_progress: bool = False,
) -> np.ndarray:
    """Scores of n (prompt, response) pairs by m rewards, given by name or as objects: float32 (n, m).

    prompts: strings, or conversations (lists of messages). Language models and classifiers that read chats are given all
    of a conversation; other rewards the text of its last user turn.

    Raises UserError or TypeError, in one line, for an unknown name, a missing package, texts of unequal number, a
    result of the wrong shape, and for a score that is NaN or infinite (with the reward and the index of the pair).
    """
    prompts = with_conversations(prompts)
    check_texts(prompts, responses)
    if isinstance(names, (str, Reward)):
        names = [names]
    if len(names) == 0:
        raise UserError("names must hold at least one reward, got none")
    rewards = [_resolve(index, item) for index, item in enumerate(names)]
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


def _resolve(index: int, item: str | Reward) -> Reward:
    if isinstance(item, str):
        return get(item)
    if isinstance(item, Reward):
        return item
    raise TypeError(
        f"names[{index}] must be a registered name or a reward (callable, with a .name; see rewards.from_function), "
        f"got {type(item).__name__}"
    )
