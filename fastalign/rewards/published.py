"""Rewards made from `presets`. Those of one model share it and its results: it is read, and run on each text, once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from fastalign._base.errors import UserError
from fastalign.rewards.base import Reward, named
from fastalign.rewards.classifier import HeadReward, TextForm, open_classifier, open_tokenizer, shared_heads
from fastalign.rewards.presets import Preset

if TYPE_CHECKING:
    import torch

_open: WeakValueDictionary[str, HeadReward] = WeakValueDictionary()  # a head of each model in use


def make(preset: Preset, *, model: str | None = None, tokenizer: Any = None, **options: Any) -> Reward:
    """The preset's reward, under the name of its column.

    model: a folder or hub name in place of the preset's own, such as a copy of it on this machine. options:
    batch_size, max_length and cache_size. Raises UserError, one line.
    """
    place = model or preset.model
    if preset.head == "cosine":
        from fastalign.rewards.coherence import PooledCoherence

        return PooledCoherence(preset.column, model=place, **options)
    key = json.dumps([place, preset.head, preset.text, preset.direction, options], default=repr)
    first = _open.get(key) if tokenizer is None else None
    heads = first.heads if first is not None else _heads(preset, place, tokenizer, options)
    if tokenizer is None:
        _open[key] = heads[0]
    return named(heads[_index(preset, heads, place)], preset.column)


def _heads(preset: Preset, place: str, tokenizer: Any, options: dict[str, Any]) -> list[HeadReward]:
    if preset.head in ("gated", "mlp"):
        from fastalign.rewards.checkpoint_heads import open_model

        tokenizer = tokenizer or open_tokenizer(place)
        opened: Any = open_model(place, preset.head, tokenizer)
        names = ["score", *map(str, range(len(opened.head.transform)))] if preset.head == "gated" else ["0"]
    else:
        opened, tokenizer = open_classifier(place, tokenizer)
        names = [str(opened.config.id2label[i]).lower() for i in range(opened.config.num_labels)]
    return shared_heads(names, opened, tokenizer, _reader(preset), _text(preset.text), **options)


def _reader(preset: Preset) -> Callable[[torch.Tensor], torch.Tensor]:
    if preset.head == "probability":
        return lambda logits: preset.direction * logits.sigmoid()
    return lambda logits: preset.direction * logits


def _text(form: str) -> TextForm:
    if "{prompt}" not in form:
        return form
    return lambda prompt, response: (form.replace("{prompt}", prompt), response)


def _index(preset: Preset, heads: list[HeadReward], place: str) -> int:
    """The place of the preset's output; attributes are numbered, after the score."""
    names = [head.name for head in heads]
    if preset.head == "gated":
        found = str(preset.output)
        index = names.index(found) if found in names else -1
    elif isinstance(preset.output, int):
        index = preset.output if preset.output < len(names) else -1
    else:
        index = names.index(preset.output.lower()) if preset.output.lower() in names else -1
    if index < 0:
        raise UserError(f"{place}: must have the output {preset.output!r} of {preset.name}, it has {', '.join(names)}")
    return index
