"""The cache of a model's forward pass, whose name depends on the class and the version of transformers."""

from __future__ import annotations

import inspect
from typing import Any

from fastalign.models.identity import language_model

NAMES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")


def cache_name(model: Any) -> str:
    """The name of forward's argument for it."""
    accepted = inspect.signature(type(language_model(model)).forward).parameters
    return next((name for name in NAMES if name in accepted), NAMES[0])


def cache_of(output: Any) -> Any:
    """The cache in forward's output; None if there is none."""
    return next((output[name] for name in NAMES if output.get(name) is not None), None)
