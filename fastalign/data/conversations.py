"""Conversations as prompts: messages with roles, stored as a string that contains all of them.

A message is {"role": ..., "content": text, or blocks [{"type": "text", "text": ...}]} and may have more keys
(tool_calls ...), as chat templates read them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastalign._base.errors import UserError

EXTRAS = ("tools", "chat_template_kwargs")  # columns of TRL's data sets beside a prompt


class Conversation(str):
    """A prompt of messages, as a JSON string: equal strings are equal prompts, and it can be used like any string.

    The JSON is the list of messages or, if there are tools or chat template arguments, an object
    {"messages": ..., "tools": ..., "chat_template_kwargs": ...}. `parse` reads it back. A final message from the
    assistant is continued by the model.
    """

    __slots__ = ("chat_template_kwargs", "messages", "tools")
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    chat_template_kwargs: dict[str, Any]

    def __new__(
        cls,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Conversation:
        """Raises UserError if these are not messages."""
        messages = check_messages(messages)
        tools, options = check_tools(tools), check_options(chat_template_kwargs)
        value: Any = messages
        if tools or options:
            value = {"messages": messages, "tools": tools, "chat_template_kwargs": options}
            value = {name: x for name, x in value.items() if x}
        try:
            self = super().__new__(cls, json.dumps(value, ensure_ascii=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"must be a conversation of JSON values, got one that is not ({error})") from None
        check_utf8(self, "the conversation")
        self.messages, self.tools, self.chat_template_kwargs = messages, tools, options
        return self

    @classmethod
    def parse(cls, text: str) -> Conversation:
        """Parse its string form. Raises UserError."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise UserError(f"must be a conversation as JSON, got {text[:60]!r}") from None
        if isinstance(value, dict):
            extras: dict[str, Any] = {name: value.get(name) for name in EXTRAS}
            messages: Any = value.get("messages")
            return cls(messages, **extras)
        return cls(value)

    def __reduce__(self) -> tuple[Any, ...]:
        return Conversation.parse, (str(self),)

    @property
    def continues(self) -> bool:
        """Whether its last message is from the assistant and is to be continued."""
        return self.messages[-1]["role"] == "assistant"

    def replied(self, reply: str) -> list[dict[str, Any]]:
        """The messages followed by the assistant's reply."""
        if not self.continues:
            return [*self.messages, {"role": "assistant", "content": reply}]
        last = self.messages[-1]
        return [*self.messages[:-1], {**last, "content": text_of(last.get("content")) + reply}]


def as_prompt(value: Any, name: str) -> str:
    """A non-blank string unchanged, messages as a Conversation. Raises UserError."""
    if isinstance(value, Conversation):
        return value
    if isinstance(value, (list, tuple)):
        try:
            return Conversation(value)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{name} must be a string that is not empty, or messages, got {value!r}")
    check_utf8(value, name)
    return value


def check_utf8(text: str, name: str) -> None:
    """Raise UserError for half a surrogate pair, which JSON and Python allow but which is not text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        rule = f"{name} must be text that UTF-8 can hold"
        raise UserError(f"{rule}, got half a surrogate pair at character {error.start}") from None


def as_text(prompt: str) -> str:
    """The text of a prompt; for a conversation, that of the user's last turn."""
    if not isinstance(prompt, Conversation):
        return prompt
    said = [message for message in prompt.messages if message["role"] == "user"]
    return text_of((said or prompt.messages)[-1].get("content"))


def transcript(prompt: str) -> str:
    """The whole prompt in readable form; for a conversation, one paragraph "role: text" per message."""
    if not isinstance(prompt, Conversation):
        return prompt
    return "\n\n".join(f"{message['role']}: {text_of(message.get('content'))}" for message in prompt.messages)


def text_of(content: Any) -> str:
    """A message's content as one text, one line per block."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(block["text"] for block in content)


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages, without keys that are None (data sets pad with them). Raises UserError."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not len(messages):
        raise UserError(f"must be a list of at least one message, got {messages!r:.60}")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"message {i} must have a role and a content, got {message!r:.60}")
        message = {key: value for key, value in message.items() if value is not None}
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            message["content"] = [_block(i, block) for block in content]
        elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise UserError(f"message {i} must have a content, text or blocks of text, got {content!r:.60}")
        checked.append(message)
    return checked


def _block(i: int, block: Any) -> dict[str, Any]:
    if not isinstance(block, Mapping) or not isinstance(block.get("text"), str):
        kind = block.get("type") if isinstance(block, Mapping) else type(block).__name__
        raise UserError(f"message {i} must hold blocks of text alone, got one of {kind!r}")
    return {key: value for key, value in block.items() if value is not None}


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """Tools as JSON schemas; functions are described as transformers does. Raises UserError."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise UserError(f"tools must be a list of JSON schemas, got {tools[:60]!r}") from None
    if tools is None:
        return []
    if isinstance(tools, Mapping) or not isinstance(tools, Sequence):
        raise UserError(f"tools must be a list of JSON schemas or functions, got {type(tools).__name__}")
    checked = []
    for i, tool in enumerate(tools):
        if callable(tool):
            from transformers.utils import get_json_schema

            try:
                tool = get_json_schema(tool)
            except Exception as error:  # its own error types, for an insufficient docstring
                raise UserError(
                    f"tools[{i}] must be a JSON schema or a function with types and a docstring ({error})"
                ) from None
        if not isinstance(tool, Mapping):
            raise UserError(f"tools[{i}] must be a JSON schema or a function, got {type(tool).__name__}")
        checked.append(dict(tool))
    return checked


def check_options(options: Any) -> dict[str, Any]:
    """Arguments of a chat template by name, without those that are None. Raises UserError."""
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except (ValueError, RecursionError):
            pass
    if options is None:
        return {}
    if not isinstance(options, Mapping) or any(not isinstance(name, str) for name in options):
        raise UserError(f"chat_template_kwargs must be a dict of names and values, got {options!r:.60}")
    return {name: value for name, value in options.items() if value is not None}
