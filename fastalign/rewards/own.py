"""Rewards of the user's own code, from a file or a module: a function, or an object or class as `register` takes it."""

from __future__ import annotations

import ast
import hashlib
import os
import sys
import traceback
from importlib import import_module, util
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign.data.conversations import as_text
from fastalign.rewards.base import NotNumbers, Reward, as_scores, with_conversations
from fastalign.rewards.registry import made, maker


class OwnReward:
    """A reward under another name, whose exceptions become one line that says where it was raised."""

    reward: Reward
    name: str

    def __init__(self, reward: Reward, name: str):
        self.reward: Reward = reward
        self.name: str = name
        self.reads_messages: bool = getattr(reward, "reads_messages", False)

    def __call__(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        prompts = with_conversations(prompts)
        if not self.reads_messages:
            prompts = [as_text(prompt) for prompt in prompts]
        try:
            return as_scores(self.name, self.reward(prompts, responses), len(prompts))
        except UserError:
            raise
        except NotNumbers as error:
            raise UserError(str(error)) from None
        except (Exception, SystemExit) as error:  # sys.exit() in a script would end the command without a word
            raise UserError(f"reward {self.name!r}: {_told(error)}") from error


def check_file(file: str, attribute: str) -> None:
    """Raise UserError unless `file` defines `attribute`; it is read, not run."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"{file}: no such file")
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{file}: cannot be parsed as Python: {error}") from None
    nodes = list(ast.walk(tree))
    known = {one.name for one in nodes if isinstance(one, (ast.FunctionDef, ast.ClassDef))}
    known |= {one.id for one in nodes if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
    imported = {(one.asname or one.name).partition(".")[0] for one in nodes if isinstance(one, ast.alias)}
    if attribute not in known | imported and "*" not in imported:
        there = [one.name for one in tree.body if isinstance(one, (ast.FunctionDef, ast.ClassDef))]
        raise _missing(file, attribute, there)


def check_module(module: str) -> None:
    """Raise UserError unless the module's package is installed or in the current folder; nothing is imported."""
    top = module.partition(".")[0]
    if top not in sys.modules and util.find_spec(top) is None and not _is_here(top):
        raise UserError(f"{module}: no such module; a file is named with its ending, {module.replace('.', '/')}.py")


def source_of(module: str) -> str | None:
    """The file of a module's source, found without importing anything; None for one that has none."""
    spec = None
    for i in range(len(parts := module.split("."))):
        where = [*sys.path, os.getcwd()] if spec is None else spec.submodule_search_locations
        if where is None or (spec := PathFinder.find_spec(".".join(parts[: i + 1]), where)) is None:
            return None
    return spec.origin if spec is not None and spec.origin and Path(spec.origin).is_file() else None


def from_file(file: str, attribute: str, name: str, options: dict[str, Any]) -> Reward:
    """The reward that a Python file defines, which is run for it. Raises UserError, one line."""
    check_file(file, attribute)
    path = Path(file).expanduser().resolve()
    private = f"_fastalign_rewards_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = util.spec_from_file_location(private, path)
    assert spec is not None and spec.loader is not None  # of a .py file
    module = util.module_from_spec(spec)
    sys.modules[private] = module  # dataclasses and pickling look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[private]
        raise UserError(f"{file}: {_told(error)}") from error
    return _of(module, file, attribute, name, options)


def from_module(module: str, attribute: str, name: str, options: dict[str, Any]) -> Reward:
    """The reward that an importable module defines. Raises UserError, one line."""
    check_module(module)
    top = module.partition(".")[0]
    if top not in sys.modules and util.find_spec(top) is None:
        sys.path.append(os.getcwd())  # as `python -m` has it, but last: no installed module is replaced
    try:
        return _of(import_module(module), module, attribute, name, options)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{module}: {_told(error)}") from error


def _is_here(top: str) -> bool:
    return PathFinder.find_spec(top, [os.getcwd()]) is not None


def _of(module: ModuleType, where: str, attribute: str, name: str, options: dict[str, Any]) -> Reward:
    if not hasattr(module, attribute):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise _missing(where, attribute, own)
    try:
        reward = made(name, maker(name, getattr(module, attribute))(**options))
    except (UserError, TypeError) as error:
        raise UserError(f"{where}:{attribute}: {error}") from None
    return OwnReward(reward, name)


def _missing(where: str, attribute: str, there: list[str]) -> UserError:
    listed = ", ".join(name for name in there if not name.startswith("_")) or "nothing"
    return UserError(f"{where}: defines no {attribute}; it has {listed}")


def _told(error: BaseException) -> str:
    """The error, and the line of the user's code that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f" ({Path(frame.filename).name}, line {frame.lineno})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"
