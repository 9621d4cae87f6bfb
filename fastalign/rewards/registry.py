"""Rewards by name: the built-in ones, those that `register` adds, and those of installed packages."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any, NamedTuple

from fastalign._base.errors import UserError
from fastalign._base.references import COLUMN, FORMS
from fastalign.rewards.base import Reward, is_reward, named
from fastalign.rewards.function import from_function
from fastalign.rewards.presets import PRESETS

GROUP = "fastalign.rewards"  # entry points of installed packages: a name, and what `register` takes


class RewardInfo(NamedTuple):
    """A registered reward: its description, the package that it needs, whether that is installed, and the model on the
    hub that its first use downloads."""

    description: str
    package: str | None
    installed: bool
    model: str | None = None


class _Entry(NamedTuple):
    make: Callable[..., Reward]  # with the options of `get`
    description: str
    package: str | None


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

        fn(prompts, responses) -> n numbers     a function, as for `from_function`; its further parameters are options
        factory()                               a class, or a function that needs no argument: makes a reward or such a
                                                function at first use; `factory(**options)` where `get` is given options
        a reward                                an object with a `name`, called with (prompts, responses)

    Function and factory are distinguished by their signature, without a call: a function has two positional parameters
    without a default, a factory none. Raises UserError if the name is taken and `replace` is False, for a name that
    cannot be used on the command line, and for a callable that is neither.
    """
    if not isinstance(name, str) or not COLUMN.fullmatch(name) or name == "rest":
        rule = "name must be a word without blanks, commas, brackets and = < > : \" ', and not 'rest'"
        raise UserError(f"{rule}, got {name!r}")
    make = maker(name, reward)
    if name in _OLD_NAMES:
        raise UserError(f"name {name!r} is the old name of the reward {_OLD_NAMES[name]!r}; choose another")
    if (name in _entries or name in PRESETS) and not replace:
        raise UserError(f"name {name!r} is already a registered reward; pass replace=True to replace it")
    _entries[name] = _Entry(make, description, package)
    _instances.pop(name, None)


def maker(name: str, reward: Any) -> Callable[..., Reward]:
    """The factory for what `register` takes. Raises UserError or TypeError for anything else."""
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
    texts = [p for p in needed if p.kind is not p.KEYWORD_ONLY]
    if not needed and (is_class or not any(p.kind is p.VAR_POSITIONAL for p in parameters)):
        return reward
    if not is_class and len(texts) == 2:
        return _with_options(name, reward)
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


def made(name: str, result: Any) -> Reward:
    """A factory's result, as a reward."""
    if not callable(result) or isinstance(result, type) or not _takes_texts(result):
        came = (
            f"one with the parameters {inspect.signature(result)}"
            if inspect.isroutine(result)
            else type(result).__name__
        )
        raise UserError(
            f"the factory of reward {name!r} must return a reward or a function of (prompts, responses), got {came}"
        )
    return result if is_reward(result) else from_function(result, name)


def _with_options(name: str, fn: Callable[..., Any]) -> Callable[..., Reward]:
    """Of a function of two texts, whose other parameters are its options."""
    others = list(inspect.signature(fn).parameters.values())[2:]
    free = any(p.kind is p.VAR_KEYWORD for p in others)
    known = {p.name: p for p in others if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}

    def make(**options: Any) -> Reward:
        listed = ", ".join(known) or "none"
        if not free and (unknown := [option for option in options if option not in known]):
            raise UserError(f"reward {name!r} has no option {unknown[0]!r}; it has {listed}")
        if missing := [option for option, p in known.items() if p.default is p.empty and option not in options]:
            raise UserError(f"reward {name!r} needs its option {missing[0]!r}, as in [{missing[0]}=value]")
        return from_function(functools.partial(fn, **options) if options else fn, name)

    return make


def _without_options(name: str, reward: Reward) -> Callable[..., Reward]:
    def make(**options) -> Reward:
        if options:
            raise UserError(f"reward {name!r} was registered as it is and takes no options, got {', '.join(options)}")
        return reward

    return make


@functools.cache
def _installed() -> dict[str, EntryPoint]:
    return {one.name: one for one in entry_points(group=GROUP) if COLUMN.fullmatch(one.name)}


def available() -> dict[str, RewardInfo]:
    """The names, each with its description, the package it needs and whether that is installed; the presets of the
    literature, such as "map/humor", at the end."""
    own = {
        name: RewardInfo(
            entry.description, entry.package, entry.package is None or find_spec(entry.package) is not None
        )
        for name, entry in _entries.items()
    }
    others = {name: RewardInfo(f"from {one.value}", None, True) for name, one in _installed().items()}
    presets = {
        name: RewardInfo(f"{one.what}, {one.model} ({one.source})", None, True, one.downloaded)
        for name, one in PRESETS.items()
    }
    return {**others, **own, **{name: one for name, one in presets.items() if name not in own}}


def known(name: str) -> bool:
    """Whether `get` has a reward of that name, an old name included; loads nothing."""
    return _OLD_NAMES.get(name, name) in _entries or name in _installed() or name in PRESETS


def column(name: str) -> str:
    """The name among values of what is registered under `name`: itself, or a preset's column."""
    return PRESETS[name].column if name in PRESETS and name not in _entries else name


def check_known(name: str) -> None:
    """Raise UserError, listing the names, for a name without a reward."""
    if not known(name):
        if name.startswith((".", "/", "~")):
            raise UserError(f"{name}: no such folder of a reward model")
        listed = ", ".join(dict.fromkeys([*_entries, *_installed()]))
        near = get_close_matches(name, [*_entries, *_installed(), *PRESETS], n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        presets = "presets (`fastalign rewards` lists them)"
        raise UserError(f"unknown reward {name!r}; available: {listed}, {presets}, {FORMS}{meant}")


def get(name: str, **options: Any) -> Reward:
    """The reward registered under `name`.

    Without options every call returns the same object, so its cache and its model are shared; with options (those of
    its class, such as `get("log_likelihood", model="./mine")`) a new one is created. Raises UserError, listing the
    names, if there is none.
    """
    check_known(name)
    entry = _entries.get(_current(name)) or (_of_preset(name) if name in PRESETS else _from_package(name))
    if not options and name in _instances:
        return _instances[name]
    reward = made(name, entry.make(**options, **({"name": name} if name in _OLD_NAMES else {})))
    if not options:
        _instances[name] = reward
    return reward


def _of_preset(name: str) -> _Entry:
    from fastalign.rewards import published

    preset = PRESETS[name]
    if preset.head == "reward":
        return _Entry(lambda **options: named(get(preset.model, **options), preset.column), preset.what, None)
    if preset.head == "service":
        from fastalign.rewards.perspective import Perspective

        return _Entry(functools.partial(Perspective, preset.column, str(preset.output)), preset.what, None)
    return _Entry(functools.partial(published.make, preset), preset.what, None)


def _from_package(name: str) -> _Entry:
    """Load an entry point and register it."""
    one = _installed()[name]
    try:
        register(name, one.load(), description=f"from {one.value}")
    except Exception as error:  # whatever the package's own code raises
        raise UserError(f"reward {name!r} cannot be loaded from {one.value}: {error}") from error
    return _entries[name]


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
