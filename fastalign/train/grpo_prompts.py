"""The prompts of GRPO: what is one, its token ids, and the room that it leaves for a completion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import trl

from fastalign._base.errors import UserError
from fastalign._base.units import counted
from fastalign.data.conversations import check_messages
from fastalign.ops.checks import shown
from fastalign.train.encoding import encode
from fastalign.train.grpo_rewards import check_columns

TEMPLATE = 256  # bytes that a chat template may add


class Prompts:
    """A tokenizer's prompts, for completions of `new` tokens in a context (0: unlimited).

    drawn: False where a `rollout_func` tokenizes and completes them.
    """

    def __init__(self, tokenizer: Any, options: dict[str, Any], new: int, context: int, *, drawn: bool):
        if drawn and context and new >= context:
            raise UserError(
                f"a completion of {new} tokens must leave room for a prompt in the model's context of {context}"
            )
        self.tokenizer, self.options, self.new, self.context, self.drawn = tokenizer, options, new, context, drawn

    def check(self, name: str, dataset: Any) -> None:
        """Refuses a row without a prompt, and a prompt that leaves no room, before the first step. A stream's are
        checked as they come."""
        if isinstance(dataset, dict):
            for key, part in dataset.items():
                self.check(f"{name}[{key!r}]", part)
        elif hasattr(dataset, "__len__"):
            rows = dataset.select_columns("prompt") if hasattr(dataset, "select_columns") else dataset
            first = next(iter(rows))["prompt"]
            for i, row in enumerate(rows):
                prompt, where = row.get("prompt"), f"{name} row {i}: "
                self._check_kind(prompt, first, where)
                # A text has at most as many tokens as bytes.
                text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, default=str)
                size = len(text.encode("utf-8", "replace")) + TEMPLATE + self.new
                if self.drawn and (not prompt or size > self.context > 0):
                    self.encode([prompt], where)

    def encode(self, prompts: Sequence[Any], where: str = "") -> list[list[int]]:
        """Token ids; refuses what is no prompt, and prompts that leave no room."""
        for prompt in prompts:
            self._check_kind(prompt, prompts[0], where)
        try:
            ids = encode(self.tokenizer, prompts, self.options)
        except UserError as error:
            raise UserError(f"{where}{error}") from None
        for row in ids:
            if len(row) + self.new > self.context > 0:
                size = f"{counted(len(row), 'token')} and a completion of {self.new}"
                raise UserError(f"{where}a prompt is too long: {size} exceed the model's context of {self.context}")
        return ids

    def _check_kind(self, prompt: Any, first: Any, where: str) -> None:
        if not isinstance(prompt, str | list):
            raise UserError(f"{where}prompt must be text or a list of messages, got {shown(prompt)}")
        if isinstance(prompt, str) != isinstance(first, str):
            raise UserError(f"{where}prompt must be text where others are, messages where others are, got both")
        if isinstance(prompt, str):
            return
        try:
            check_messages(prompt)
        except UserError as error:
            raise UserError(f"{where}prompt: {error}") from None
        if self.drawn and not self.tokenizer.chat_template:
            raise UserError(f"{where}prompt is of messages, which need a chat template: the tokenizer has none")


def with_prompts(name: str, dataset: Any, args: trl.GRPOConfig) -> Any:
    """Checks that a data set has prompts."""
    if isinstance(dataset, dict) and name == "train_dataset":
        raise UserError(f"train_dataset must be one data set, got a dictionary of {', '.join(map(str, dataset))}")
    if isinstance(dataset, dict):
        return {key: with_prompts(f"{name}[{key!r}]", part, args) for key, part in dataset.items()}
    if isinstance(dataset, str) or not (hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")):
        raise UserError(f"{name} must be a data set with a column prompt, got {shown(dataset)}")
    if not hasattr(dataset, "__len__"):
        if name == "train_dataset" and args.max_steps <= 0:
            raise UserError(f"max_steps must be set: {name} has no length")
        return dataset
    if not len(dataset):
        raise UserError(f"{name} must have at least one prompt, got none")
    first = next(iter(dataset))
    if not isinstance(first, Mapping):
        raise UserError(f"{name} must have rows with a column prompt, got rows of {type(first).__name__}")
    if "prompt" not in first:
        raise UserError(f"{name} must have a column prompt, got {', '.join(first)}")
    check_columns(name, first)
    return dataset
