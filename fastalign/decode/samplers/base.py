"""Base of all samplers: checks arguments and prompts in one place, and returns the same Candidates from every
engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.units import counted
from fastalign.data.sampling import RequestOptions, SamplingSettings, check
from fastalign.data.text import Text, check_prompts, template_settings
from fastalign.decode.candidates import Candidates
from fastalign.decode.streams import places_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

ROWS_AT_ONCE = 256  # on the CPU more rows gain little speed; in batches, each is also what an interrupt can lose


@dataclass
class Request:
    """A checked sampling request, for the prompts whose index is not in `skip`.

    encoded: each prompt's token ids (for a server with its own tokenizer, the prompt itself). places: each prompt's
    index in the full set. rows: candidates at once. record: the settings stored in the Candidates. spare: bytes that
    copies of the model's weights may take; None: what is free.
    """

    prompts: Sequence[Any]
    encoded: Sequence[Any]
    places: Sequence[int]
    settings: SamplingSettings
    rows: int
    record: dict[str, Any]
    skip: set[int]
    show_progress: bool
    spare: int | None = None

    @property
    def wanted(self) -> list[int]:
        """The prompts' indices, in order."""
        return [i for i in range(len(self.prompts)) if i not in self.skip]

    def part(
        self,
        indices: Sequence[int],
        texts: list[list[str]],
        token_ids: list[list[list[int]]],
        log_probs: list[list[list[float]]],
    ) -> Candidates:
        """The part for the prompts at these indices: [prompt][candidate] each."""
        part = Candidates([self.prompts[i] for i in indices], texts, token_ids, log_probs, settings=self.record)
        part.prompt_ids = np.array([self.places[i] for i in indices], dtype=np.int64)
        return part


class BaseSampler(ABC):
    """Base class of `Sampler`, for models on this machine, and of those for other engines (`samplers.external`).

    A subclass sets name, for errors and for the candidates' settings; text, for its tokenizer; context, the maximum
    length in tokens or 0; and implements `draw_parts`.
    """

    name: str
    text: Text
    context: int
    rows_at_once: int = ROWS_AT_ONCE  # where batch_size is not given

    def sample(
        self,
        prompts: Sequence[Any],
        *,
        n: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: str | Sequence[str] | None = None,
        seed: int,
        first: int = 0,
        chat: bool | str = "auto",
        batch_size: int | None = None,
        memory_limit: int | str | None = None,
        skip: Collection[int] = (),
        prompt_ids: Sequence[int] | None = None,
        show_progress: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **template: Any,
    ) -> Candidates:
        """Draw n candidates of up to max_new_tokens tokens per prompt.

        prompts: strings, or conversations, lists of messages {"role": ..., "content": text or blocks of text}; a last
        message from the assistant is continued. tools: JSON schemas or functions, for the chat template;
        chat_template_kwargs: further template arguments, which may also be given by keyword (enable_thinking=False).

        temperature (0 is greedy), then top_k (0 is off), top_p, min_p truncate as in transformers.
        stop: cut texts before the first of these strings, which may be special tokens that texts do not show; token_ids
        and logprobs keep all drawn tokens, including an end token. chat: "auto" uses the tokenizer's chat template if
        it has one; False passes prompts unchanged. batch_size: candidates at once. memory_limit: for keys and values
        and, if there is room, packed weights, in bytes or as "4GB"; it reduces the number of candidates in flight, not
        n. skip: indices of prompts already
        finished; a resumed job draws the same texts for the others as an uninterrupted one. prompt_ids: the prompts'
        indices in the full set, if these are a part of it, so that each gets the same texts as in the full set; default
        0..P-1. first: the index of the first candidate; a candidate is a function of (seed, prompt, index), so 4
        candidates from index 4 on are the rest of 8. Raises UserError, one line, on a bad argument or prompt, before
        any work.
        """
        parts = self.iter_batches(
            prompts, n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            stop=stop, seed=seed, first=first, chat=chat, batch_size=batch_size, memory_limit=memory_limit, skip=skip,
            prompt_ids=prompt_ids, show_progress=show_progress, tools=tools, chat_template_kwargs=chat_template_kwargs,
            **template,
        )  # fmt: skip
        drawn = [part for _, part in parts]
        if not drawn:
            raise UserError(f"skip must leave a prompt to sample, got all {len(prompts)}")
        return Candidates.concat(drawn)

    def iter_batches(
        self, prompts: Sequence[Any], **options: Unpack[RequestOptions]
    ) -> Iterator[tuple[list[int], Candidates]]:
        """Yield (prompt indices, their candidates) by batch; options: the keyword arguments of `sample`."""
        request = self.request(prompts, **options)
        if (limit := options.get("memory_limit")) is not None:
            longest = max(map(len, request.encoded))
            request.rows, request.spare = self.fitting(limit, longest, request.settings, request.rows)
        request.record["batch_size"] = request.rows
        return self.draw_parts(request)

    def request(self, prompts: Sequence[Any], *, rising: bool = False, **options: Unpack[RequestOptions]) -> Request:
        """The checked request, for `iter_batches` and for methods that draw in their own way; rising: whether
        prompt_ids must rise."""
        settings, chat = check(options), options.get("chat", "auto")
        prompts = check_prompts(prompts, chat)
        others = {name: value for name, value in options.items() if name not in RequestOptions.__annotations__}
        template = self.text.template_options(options.get("chat_template_kwargs"), options.get("tools"), others)
        record = {"model": self.name, **vars(settings), "chat": chat, **template_settings(template)}
        del record["first"]
        return Request(
            prompts,
            encoded=self.encode(prompts, chat, settings.max_new_tokens, template),
            places=places_of(options.get("prompt_ids"), len(prompts), rising=rising),
            settings=settings,
            rows=options.get("batch_size") or self.rows_at_once,
            record=record,
            skip=set(options.get("skip", ())),
            show_progress=options.get("show_progress", False),
        )

    @abstractmethod
    def draw_parts(self, request: Request) -> Iterator[tuple[list[int], Candidates]]:
        """Yield (prompt indices, their candidates) as they finish; raises remaining errors in the request first."""

    def fitting(self, memory_limit: int | str, longest: int, settings: SamplingSettings, most: int) -> tuple[int, int]:
        """How many candidates fit at once, of `most`, with prompts of up to `longest` tokens; and the bytes left."""
        raise UserError(f"memory_limit is for models that run here; {self.name} sets its own")

    def encode(
        self, prompts: Sequence[str], chat: bool | str, max_new_tokens: int, template: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Token ids of each prompt, leaving room for max_new_tokens."""
        encoded = self.text.encode(prompts, chat=chat, options=template)
        for i, ids in enumerate(encoded):
            if self.context and len(ids) + max_new_tokens > self.context:
                size = (
                    f"{counted(len(ids), 'token')} + {max_new_tokens} new exceed the model's context of {self.context}"
                )
                raise UserError(f"prompt {i} is too long: {size}")
        return encoded
