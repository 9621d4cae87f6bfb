"""Rewards by name, and the matrix of scores for which a palette is solved."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from fastalign._base import progress
from fastalign._base.errors import UserError
from fastalign.data.conversations import as_text
from fastalign.rewards.base import CachedReward, Reward, as_scores, check_texts, is_reward, with_conversations
from fastalign.rewards.function import from_function


class RewardInfo(NamedTuple):
    """A registered reward: its description, the module that it needs, and whether that is installed."""

    description: str
    package: str | None
    installed: bool


class _Entry(NamedTuple):
    make: Callable[..., Reward]  # with the options of `get`
    description: str
    package: str | None


_NAME = re.compile(r"""[^\s,=<>:()\[\]{}"']+""")  # what --rewards, --palette and --lam can parse
_entries: dict[str, _Entry] = {}
_instances: dict[str, Reward] = {}
_OLD_NAMES = {"perplexity": "log_likelihood"}  # old names still work, with a note


def register(
    name: str,
    reward: Callable[..., object],
    *,
    description: str = "",
    package: str | None = None,
    replace: bool = False,
) -> None:
    """Register a reward for `get(name)`, `score([name], ...)` and the commands. It is one of

        fn(prompts, responses) -> n numbers     a function, as for `from_function`
        factory()                               a class, or a function that needs no argument: makes a reward or such a
                                                function at first use; `factory(**options)` where `get` is given options
        a reward                                an object with a `name`, called with (prompts, responses)

    Function and factory are distinguished by their signature, without a call: a function has two positional parameters
    without a default, a factory none. Raises UserError if the name is taken and `replace` is False, for a name that
    cannot be used on the command line, and for a callable that is neither.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "rest":
        rule = "name must be a word without blanks, commas, brackets and = < > : \" ', and not 'rest'"
        raise UserError(f"{rule}, got {name!r}")
    make = _maker(name, reward)
    if name in _OLD_NAMES:
        raise UserError(f"name {name!r} is the old name of the reward {_OLD_NAMES[name]!r}; choose another")
    if name in _entries and not replace:
        raise UserError(f"name {name!r} is already a registered reward; pass replace=True to replace it")
    _entries[name] = _Entry(make, description, package)
    _instances.pop(name, None)


def _maker(name: str, reward: Any) -> Callable[..., Reward]:
    """The factory for a registered object."""
    if is_reward(reward) and _takes_texts(reward):
        return _without_options(name, reward)
    rule = "reward must be a function of (prompts, responses), a factory that needs no argument, or a reward"
    if not callable(reward):
        raise TypeError(f"{rule}, got {type(reward).__name__}")
    is_class = isinstance(reward, type)
    if is_class and not any("__call__" in vars(base) for base in reward.__mro__):
        raise UserError(f"{rule}, got a class whose objects cannot be called, {reward.__name__}")
    try:
        parameters = inspect.signature(reward).parameters.values()
    except ValueError:  # of some that are written in C
        raise UserError(f"{rule}, and the parameters of {reward!r} are unknown: wrap it in a def") from None
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not needed and (is_class or not any(p.kind is p.VAR_POSITIONAL for p in parameters)):
        return reward
    if not is_class and _takes_texts(reward) and len(needed) == 2:
        return _without_options(name, from_function(reward, name))
    raise UserError(f"{rule}, got one with the parameters {inspect.signature(reward)}")


def _takes_texts(reward: Callable[..., object]) -> bool:
    """Whether its signature accepts (prompts, responses)."""
    try:
        inspect.signature(reward).bind([], [])
    except TypeError:
        return False
    except ValueError:  # of some that are written in C
        return True
    return True


def _made(name: str, made: Any) -> Reward:
    """A factory's result, as a reward."""
    if not callable(made) or isinstance(made, type) or not _takes_texts(made):
        came = f"one with the parameters {inspect.signature(made)}" if inspect.isroutine(made) else type(made).__name__
        raise UserError(
            f"the factory of reward {name!r} must return a reward or a function of (prompts, responses), got {came}"
        )
    return made if is_reward(made) else from_function(made, name)


def _without_options(name: str, reward: Reward) -> Callable[..., Reward]:
    def make(**options) -> Reward:
        if options:
            raise UserError(f"reward {name!r} was registered as it is and takes no options, got {', '.join(options)}")
        return reward

    return make


def available() -> dict[str, RewardInfo]:
    """The registered names, each with its description, the package it needs and whether that is installed."""
    return {
        name: RewardInfo(
            entry.description, entry.package, entry.package is None or find_spec(entry.package) is not None
        )
        for name, entry in _entries.items()
    }


def check_names(names: Sequence[str | Reward]) -> None:
    """Raise UserError, listing the names, for a name without a registered reward; creates nothing."""
    for name in names:
        if isinstance(name, str) and _OLD_NAMES.get(name, name) not in _entries:
            raise UserError(f"unknown reward {name!r}; available: {', '.join(_entries)}")
    strings = [name for name in names if isinstance(name, str)]
    if len({*strings}) < len(strings):
        raise UserError(f"rewards must be different, got {', '.join(strings)}")


def get(name: str, **options: Any) -> Reward:
    """The reward registered under `name`.

    Without options every call returns the same object, so its cache and its model are shared; with options (those of
    its class, such as `get("log_likelihood", model="./mine")`) a new one is created. Raises UserError, listing the
    names, if there is none.
    """
    check_names([name])
    entry = _entries[_current(name)]
    if not options and name in _instances:
        return _instances[name]
    made = _made(name, entry.make(**options, **({"name": name} if name in _OLD_NAMES else {})))
    if not options:
        _instances[name] = made
    return made


def _current(name: str) -> str:
    """The current name, with a note if it has changed."""
    if name not in _OLD_NAMES:
        return name
    warnings.warn(
        f"the reward {name!r} is now named {_OLD_NAMES[name]!r}, which is what it returns, per token; the old name "
        "still works",
        FutureWarning,
        stacklevel=3,
    )
    return _OLD_NAMES[name]


def score(
    names: str | Reward | Sequence[str | Reward],
    prompts: list[str],
    responses: list[str],
    *,
    show_progress: bool = False,
) -> np.ndarray:
    """Scores of n (prompt, response) pairs by m rewards, given by name or as objects: float32 (n, m).

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
    rewards = [_resolve(index, item) for index, item in enumerate(listed)]
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
    if is_reward(item):
        return item
    raise TypeError(
        f"names[{index}] must be a registered name or a reward (callable, with a .name; see rewards.from_function), "
        f"got {type(item).__name__}"
    )
