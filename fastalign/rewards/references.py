"""Rewards by reference: the one parser for every command and every argument that takes rewards by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign._base import fingerprint
from fastalign._base.errors import UserError
from fastalign._base.http import checked_url
from fastalign._base.references import COLUMN, Reference, local_inputs, read
from fastalign._base.work_folder import sha256
from fastalign.rewards import own, registry
from fastalign.rewards.base import Reward, is_reward, named
from fastalign.rewards.ensemble import Ensemble, ensemble
from fastalign.rewards.presets import PRESETS

if TYPE_CHECKING:
    from fastalign.rewards.judge import Judge

_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


def parse(reference: str) -> Reward:
    """The one reward of a reference, loaded; `_base.references` has the forms: "positive", "log_likelihood[model=./m]",
    "my_rewards.py:short", "package.module:short", "hf:MODEL#LABEL", "server:URL#MODEL", "judge:FILE.yaml#VALUE",
    "FOLDER#HEAD", "worst[A,B]", "short=my_rewards.py:short".

    Raises UserError, one line, for one that names nothing, and for a model of several labels or heads without one.
    """
    found = load([reference])
    if len(found) > 1:
        heads = ", ".join(reward.name for reward in found)
        raise UserError(f"{reference}: has several heads, name one as {reference}#HEAD: {heads}")
    return found[0]


def load(references: Sequence[str | Reward]) -> list[Reward]:
    """The rewards of references, and rewards as they are; a folder of `train.RewardTrainer` gives one for each head.

    Raises UserError, one line, also for two of one name.
    """
    check_names(references)
    result: list[Reward] = []
    for one in references:
        result += _load(read(one)) if isinstance(one, str) else [one]
    return result


def check_names(references: Sequence[str | Reward]) -> None:
    """Raise UserError, one line, for references that name nothing, or two rewards of one name.

    No model is loaded and no code is run: what only those show is found later.
    """
    names(references)


def names(references: Sequence[str | Reward]) -> list[str]:
    """The names of the rewards that `load` would return: those of columns, and of λ. Raises as `check_names` does."""
    result: list[str] = []
    for index, one in enumerate(references):
        if isinstance(one, str):
            result += _names(read(one))
        elif is_reward(one):
            result.append(one.name)
        else:
            raise TypeError(
                f"names[{index}] must be a registered name or a reward (callable, with a .name; see "
                f"rewards.from_function), got {type(one).__name__}"
            )
    if len({*result}) < len(result):
        hint = ": give one another name, as in NAME=REFERENCE" if any(map(_is_longer, references)) else ""
        raise UserError(f"rewards must be different, got {', '.join(result)}{hint}")
    return result


def reach(references: Sequence[str | Reward]) -> None:
    """Raise UserError, one line, unless the servers behind rewards answer; before a long job draws what they score."""
    rewards = [one for one in references if not isinstance(one, str)]
    named_ones = _singles([one for one in references if isinstance(one, str)])
    rewards += [reward for one in named_ones if _is_remote(one) for reward in _load(one)]
    for reward in rewards:
        if isinstance(reward, Ensemble):
            reach(reward.rewards)
        elif (ask := getattr(reward, "reach", None)) is not None:
            ask()


def _is_remote(one: Reference) -> bool:
    service = one.kind == "name" and one.place in PRESETS and PRESETS[one.place].head == "service"
    return service or one.kind in ("server", "judge")


def contents(references: Sequence[Any]) -> dict[str, str]:
    """The local files and folders that references name, and the sources of modules, each with a hash of its content."""
    texts = [one for one in references if isinstance(one, str)]
    paths = [path for text in texts for path in local_inputs(text)]
    for one in _singles(texts):
        if one.kind == "judge" and (compared := _judge(one).rubric.compare):
            paths.append(compared)
        elif one.kind == "module" and (source := own.source_of(one.place)):
            paths.append(source)
    return {path: sha256(Path(path)) if _is_text(path) else fingerprint.of_model(path) for path in paths}


def _singles(references: Sequence[str]) -> Iterator[Reference]:
    """The references, those of ensembles in their place."""
    for one in map(read, references):
        yield from _singles(one.members) if one.kind == "ensemble" else [one]


def _is_text(path: str) -> bool:
    return Path(path).is_file() and Path(path).suffix != ".gguf"


def _is_longer(reference: str | Reward) -> bool:
    return isinstance(reference, str) and read(reference).kind != "name"


def _names(one: Reference) -> list[str]:
    """The names that a reference stands for, after what can be checked cheaply."""
    if one.kind == "ensemble":
        for member in one.members:
            _names(read(member))
        return [one.alias or one.place]
    if one.kind == "file":
        own.check_file(one.place, one.part or "")
    elif one.kind == "module":
        own.check_module(one.place)
    elif one.kind == "hf":
        if _config(one) is None and not _HUB.fullmatch(one.place):
            raise UserError(f"{one.text}: must be a model's name on the hub, or its folder, got {one.place!r}")
    elif one.kind == "server":
        return [_from_server(one).name]
    elif one.kind == "judge":
        return _heads(one, _judge(one).names)
    elif not registry.known(one.place) and (config := _config(one)) is not None:
        return _heads(one, [str(label) for label in (config.get("id2label") or {"0": "LABEL_0"}).values()])
    else:
        registry.check_known(one.place)
        if one.part is not None:
            raise UserError(f"{one.text}: {one.place} is a registered reward, which has no head {one.part!r}")
        return [one.alias or registry.column(one.place)]
    return [_usable(one, one.alias or one.part or Path(one.place).name)]


def _usable(one: Reference, name: str) -> str:
    if not COLUMN.fullmatch(name) or name == "rest":
        raise UserError(f"{one.text}: {name!r} cannot be a reward's name, give one as in NAME=REFERENCE")
    return name


def _config(one: Reference) -> dict[str, Any] | None:
    """The configuration of the model in a folder; None if it is not one."""
    path = Path(one.place).expanduser() / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path}: must be a JSON object")
    return config


def _heads(one: Reference, heads: list[str]) -> list[str]:
    if one.part is not None and one.part not in heads:
        raise UserError(f"{one.place}: has no head {one.part!r}, it has {', '.join(heads)}")
    heads = heads if one.part is None else [one.part]
    if one.alias is not None and len(heads) > 1:
        raise UserError(f"{one.text}: has several heads, name one as {one.place}#HEAD: {', '.join(heads)}")
    return heads if one.alias is None else [one.alias]


def _load(one: Reference) -> list[Reward]:
    from fastalign.rewards.classifier import from_heads, from_reference

    column = one.alias or one.part or Path(one.place).name
    try:
        if one.kind == "ensemble":
            members = [reward for member in one.members for reward in _load(read(member))]
            return [ensemble(members, one.place, name=one.alias, **one.options)]
        if one.kind == "file":
            return [own.from_file(one.place, one.part or "", column, one.options)]
        if one.kind == "module":
            return [own.from_module(one.place, one.part or "", column, one.options)]
        if one.kind == "hf":
            return [from_reference(one.place, one.part, name=column, **one.options)]
        if one.kind == "server":
            return [_from_server(one)]
        if one.kind == "judge":
            heads = [head for head in _judge(one).rewards if one.part in (None, head.name)]
            return [head if one.alias is None else named(head, one.alias) for head in heads]
        if not registry.known(one.place):
            heads = [head for head in from_heads(one.place, **one.options) if one.part in (None, head.name)]
            for head in heads if one.alias else ():
                head.name = column
            return [*heads]
        reward = registry.get(one.place, **one.options)
        return [reward if one.alias is None else named(reward, one.alias)]
    except TypeError as error:
        raise _unknown_option(one, error) from None


def _from_server(one: Reference) -> Reward:
    """Its reward; nothing is asked yet. It is named by its label or its model, without the owner."""
    from fastalign.rewards.server import ServerReward

    checked_url(one.place)  # before a message could repeat a password in it
    if "api_key" in one.options:
        raise UserError("api_key must not stand in a reward's reference, which outputs record: set $OPENAI_API_KEY")
    label = one.options.get("label")
    name = one.alias or (label if isinstance(label, str) else Path(one.part or "server").name)
    try:
        return ServerReward(one.place, one.part, name=_usable(one, name), **one.options)
    except TypeError as error:
        raise _unknown_option(one, error) from None
    except UserError as error:
        raise UserError(f"reward {name!r}: {error}") from None


def _judge(one: Reference) -> Judge:
    """Its judge; nothing is asked yet."""
    from fastalign.rewards.judge import Judge

    try:
        return Judge(one.place, **one.options)
    except TypeError as error:
        raise _unknown_option(one, error) from None


def _unknown_option(one: Reference, error: TypeError) -> Exception:
    if one.options and "argument" in str(error):
        return UserError(f"{one.text}: its options cannot be used: {error}")
    return error
