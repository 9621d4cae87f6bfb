"""Text and tokens: encodes prompts and conversations as token ids, and decodes the tokens drawn after them.

New tokens are decoded together with the end of their prompt, because a token's text can depend on its predecessor:
SentencePiece removes the space before a text's first word. Special tokens are omitted from texts, but stop strings can
match them.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from fastalign._base.errors import UserError
from fastalign.data.conversations import Conversation, as_prompt, check_options, check_tools, check_utf8, text_of

TAIL = 8  # tokens of the prompt decoded together with its continuation
SLACK = 4  # tokens beyond a stop string's bytes: one has at least one byte, but for half characters at either end
_PROBE = "fastalign-probe"


class Text:
    """Encoding and decoding with a tokenizer (or None, if only the server or inference engine has it).

    rows: number of rows of the model's embedding, an upper limit for token ids; None: unknown.
    """

    tokenizer: Any
    rows: int | None

    def __init__(self, tokenizer: Any, *, rows: int | None = None):
        self.tokenizer, self.rows = tokenizer, rows
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        special = {int(i) for i, token in added.items() if getattr(token, "special", False)}
        self.special: frozenset[int] = frozenset(special | set(getattr(tokenizer, "all_special_ids", None) or ()))
        self._before = lru_cache(4096)(self._decode)
        self._names = lru_cache(1)(lambda: [self._decode((i,), False) for i in self.special])
        self._naming = lru_cache(64)(self._names_special)

    # -- to tokens

    @property
    def has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode(
        self, prompts: Sequence[Any], *, chat: bool | str = "auto", options: Mapping[str, Any] | None = None
    ) -> list[list[int]]:
        """Token ids of each prompt, with the chat template if there is one and chat is not False.

        options: `template_options`. A conversation's own tools and arguments take precedence; a final message from the
        assistant is left open. Raises UserError, one line, that names the prompt.
        """
        prompts = check_prompts(prompts, chat)
        options = dict(options or {})
        if not (chat and (self.has_template or "chat_template" in options)):
            if chat is True:
                raise UserError("chat=True needs a tokenizer with a chat template, this one has none")
            for i, prompt in enumerate(prompts):
                if isinstance(prompt, Conversation):
                    raise UserError(
                        f"prompt {i} is a conversation, which needs a chat template: this tokenizer has none"
                    )
            if options:
                raise UserError(f"{next(iter(options))} is an argument of chat templates, and none is used here")
            rows = self.tokens(prompts, "prompt")
        else:
            texts = [self.render(prompt, f"prompt {i}", options) for i, prompt in enumerate(prompts)]
            rows = self.tokens(texts, "prompt", add_special_tokens=False)  # the template wrote them
        for i, ids in enumerate(rows):
            if not ids:
                raise UserError(f"prompt {i} has no tokens: {prompts[i]!r}")
        return rows

    def tokens(self, texts: Sequence[str], name: str, **options: Any) -> list[list[int]]:
        """Token ids of texts without a template. Raises UserError for text that cannot be encoded, by name and index:
        "prompt 3"."""
        texts = list(texts)
        try:
            rows = self.tokenizer(texts, **options)["input_ids"] if texts else []
        except Exception:  # tokenizers raise anything: encode one by one, to name the text
            rows = [self.one(text, f"{name} {i}", **options)["input_ids"] for i, text in enumerate(texts)]
        for i, ids in enumerate(rows):
            self.check_ids(ids, f"{name} {i}")
        return [list(ids) for ids in rows]

    def continuations(self, texts: Sequence[str], name: str) -> list[list[int]]:
        """Token ids of texts that follow others, without special tokens; `continuation` restores these texts.

        If a tokenizer puts a space before every text, the text's own leading space is removed first.
        """
        if self._puts_space():
            texts = [text.removeprefix(" ") for text in texts]
        return self.tokens(texts, name, add_special_tokens=False)

    def _puts_space(self) -> bool:
        letter = self.tokens(["a"], "a letter", add_special_tokens=False)[0]
        return self._after(letter, letter, True) == " a"

    def one(self, text: str, name: str, pair: str | None = None, **options: Any) -> Mapping[str, Any]:
        """The tokenizer's output for one text (or pair). Turns whatever it raises into a UserError that names the
        text."""
        try:
            return self.tokenizer(text, pair, **options)
        except Exception as error:
            check_utf8(text, name)
            check_utf8(pair or "", name)
            raise UserError(f"{name} cannot be encoded by the tokenizer: {_line(error)}") from None

    def check_ids(self, ids: Sequence[int], name: str) -> None:
        """Raise UserError for a token id outside the embedding; name: the text's name, "prompt 3"."""
        if self.rows is not None and ids and max(ids) >= self.rows:
            rule = f"{name} has a token beyond the model's embedding of {self.rows:,} entries"
            raise UserError(f"{rule}, {max(ids)} ({self.tokenizer.convert_ids_to_tokens(max(ids))!r})")

    def render(
        self, prompt: str, name: str, options: Mapping[str, Any] | None = None, *, reply: str | None = None
    ) -> str:
        """The chat template's text for a prompt, open for a reply; or for prompt and reply together.

        A plain-text prompt is a user's message. Raises UserError, which names the prompt, if the template rejects it.
        """
        options = dict(options or {})
        if isinstance(prompt, Conversation):
            options = {**options, **prompt.chat_template_kwargs}
            if prompt.tools:
                options["tools"] = prompt.tools
        messages = prompt.messages if isinstance(prompt, Conversation) else [{"role": "user", "content": prompt}]
        opened = isinstance(prompt, Conversation) and prompt.continues
        if reply is not None:
            conversation = prompt if isinstance(prompt, Conversation) else Conversation(messages)
            messages, opened = conversation.replied(reply), False
        blocks = self._blocks(json.dumps(options.get("chat_template")))
        messages = [_with_content(message, blocks) for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=reply is None and not opened,
                continue_final_message=opened,
                **options,
            )
        except Exception as error:
            raise UserError(f"{name}: {self._refusal(error, options)}") from None

    def _refusal(self, error: Exception, options: Mapping[str, Any]) -> str:
        named = getattr(self.tokenizer, "chat_template", None)
        if isinstance(named, dict) and "chat_template" not in options and "default" not in named:
            return (
                f"the tokenizer has the chat templates {', '.join(named)} and none that is called default: name one "
                "with chat_template_kwargs={'chat_template': ...}"
            )
        return f"the chat template refuses it: {_line(error)}"

    def _blocks(self, chosen: str) -> bool | None:
        """Whether the template reads contents as blocks (True) or as text (False); None: both, or neither."""
        known = self.__dict__.setdefault("_reads_blocks", {})
        if chosen not in known:
            options = {} if chosen == "null" else {"chat_template": json.loads(chosen)}

            def shows(content: Any) -> bool:
                try:
                    rendered = self.tokenizer.apply_chat_template(
                        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, **options
                    )
                except Exception:  # reported when the template is really used
                    return False
                return _PROBE in rendered and not re.search(r"""['"]type['"]""", rendered)

            text, blocks = shows(_PROBE), shows([{"type": "text", "text": _PROBE}])
            known[chosen] = None if text == blocks else blocks
        return known[chosen]

    def template_options(
        self, options: Any = None, tools: Any = None, others: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Checked arguments for the chat template: options is a dict of them; others are given by keyword.

        Raises UserError for a keyword that the template does not use, because it may be a misspelt argument of
        fastalign.
        """
        result = {**check_options(options), **(others or {})}
        if tools := check_tools(tools):
            result["tools"] = tools
        named = getattr(self.tokenizer, "chat_template", None)
        templates = [*named.values()] if isinstance(named, dict) else [named]
        templates += [result.get("chat_template")]
        for name in result:
            if name in ("chat_template", "tools") or any(
                re.search(rf"\b{re.escape(name)}\b", t) for t in templates if t
            ):
                continue
            if others and name in others:
                rule = f"{name} is no argument of sample, and the chat template does not read it either"
                hint = "" if self.tokenizer else "; arguments of a server's template go into chat_template_kwargs"
                raise UserError(rule + hint)
            if self.tokenizer is None:  # the server's own template may read anything
                continue
            warnings.warn(f"chat_template_kwargs: the chat template does not read {name}", stacklevel=5)
        return result

    # -- back to text

    def continuation(self, prompt: Sequence[int], new: Sequence[int], stop: Sequence[str] = ()) -> str:
        """The text of new tokens after a prompt's, without special tokens, cut before the first stop string.

        The prompt's text followed by this is the text of all tokens.
        """
        text = self._after(prompt, new, True)
        naming = [one for one in stop if self._naming(one)]
        ends = [at for at in (text.find(one) for one in stop if one not in naming) if at >= 0]
        if naming:
            whole = self._after(prompt, new, False)
            matches = [at for at in map(whole.find, naming) if at >= 0]
            if matches:
                ends.append(len(self._shown(prompt, new, whole[: min(matches)])))
        return text[: min(ends, default=len(text))]

    def stopped(self, prompt: Sequence[int], new: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether the text of new tokens contains a stop string; first checks the tail that the last token can
        complete."""
        if not stop:
            return False
        for naming in (False, True):
            mine = [one for one in stop if self._naming(one) == naming]
            if not mine:
                continue
            window = max(len(one.encode("utf-8", "replace")) for one in mine) + SLACK
            if len(new) > window:
                tail = self._decode(self._last(new, window, special=naming), not naming)
                if not any(one in tail for one in mine):
                    continue
            whole = self._after(prompt, new, not naming)
            if any(one in whole for one in mine):
                return True
        return False

    def sees_special(self, stop: Sequence[str]) -> bool:
        """Whether a stop string contains a special token, so that an inference engine must show them."""
        return self.tokenizer is not None and any(map(self._naming, stop))

    def _after(self, prompt: Sequence[int], new: Sequence[int], skip: bool) -> str:
        """The text that new tokens add to that of the prompt."""
        tail = self._last(prompt, TAIL, special=True)
        before, whole = self._before(tail, skip), self._decode((*tail, *new), skip)
        if not whole.startswith(before):  # completes a character that the prompt ends within
            before = os.path.commonprefix([before, whole])  # noqa: RUF071  character by character is what is meant
        return whole[len(before) :]

    def _last(self, ids: Sequence[int], count: int, *, special: bool) -> tuple[int, ...]:
        """The last `count` ordinary tokens, with `special` also the special tokens between them."""
        start, ordinary = len(ids), 0
        while start and ordinary < count:
            start -= 1
            ordinary += ids[start] not in self.special
        return tuple(i for i in ids[start:] if special or i not in self.special)

    def _shown(self, prompt: Sequence[int], new: Sequence[int], upto: str) -> str:
        """The version without special tokens of a text that shows them and ends somewhere in the new tokens."""
        for count in range(len(new), -1, -1):
            whole = self._after(prompt, new[:count], False)
            if len(whole) <= len(upto) and upto.startswith(whole):
                begun = count < len(new) and new[count] not in self.special
                return self._after(prompt, new[:count], True) + (upto[len(whole) :] if begun else "")
        return ""

    def _decode(self, ids: tuple[int, ...], skip: bool) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)

    def _names_special(self, stop: str) -> bool:
        """Whether a stop string contains a special token, or ends with at least two characters of one's beginning."""
        ends = [stop[-k:] for k in range(2, len(stop) + 1)]
        return any(name and (name in stop or any(name.startswith(end) for end in ends)) for name in self._names())


def template_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `Text.template_options` that a set of candidates records."""
    rest = {name: value for name, value in options.items() if name != "tools"}
    return ({"chat_template_kwargs": rest} if rest else {}) | (
        {"tools": options["tools"]} if "tools" in options else {}
    )


def embedding_rows(model: Any) -> int | None:
    """Number of rows of a model's embedding; None if unknown."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except Exception:  # models with none, or several, raise errors of their own
        return None


def check_prompts(prompts: Sequence[Any], chat: bool | str) -> list[str]:
    """The prompts, with messages as Conversations; every sampler uses this check. Raises UserError."""
    if isinstance(prompts, str) or not len(prompts):
        raise UserError(f"prompts must be a list of at least one string or conversation, got {prompts!r}")
    if isinstance(prompts[0], Mapping):
        raise UserError(
            "prompts must be a list of strings or conversations, got the messages of one: put them in a list"
        )
    if chat not in ("auto", True, False):
        raise UserError(f"chat must be 'auto', True or False, got {chat!r}")
    checked = [as_prompt(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    if chat is False and (at := [i for i, prompt in enumerate(checked) if isinstance(prompt, Conversation)]):
        raise UserError(f"prompt {at[0]} is a conversation, which needs a chat template: chat=False leaves it out")
    return checked


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def _with_content(message: dict[str, Any], blocks: bool | None) -> dict[str, Any]:
    """The message with its content in the form that the template reads: blocks, or text (blocks False)."""
    content = message.get("content")
    if blocks is True and isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    if blocks is False and isinstance(content, list):
        return {**message, "content": text_of(content)}
    return message


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
