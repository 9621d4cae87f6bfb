"""Former names of keyword arguments: still accepted, no longer shown."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def renamed(**former: str) -> Callable[[F], F]:
    """former=today: a decorator for a function whose parameter `today` may also be given as `former`."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for name in former.keys() & kwargs.keys():
                if former[name] in kwargs:
                    raise TypeError(f"{name} is the former name of {former[name]}: give one of them")
                kwargs[former[name]] = kwargs.pop(name)
            return function(*args, **kwargs)

        return cast(F, call)

    return decorate
