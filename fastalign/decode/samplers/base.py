"""What every sampler shares: arguments and prompts checked in one place, and Candidates of one form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.units import counted
from fastalign.data.sampling import SamplingSettings, check_knobs
from fastalign.data.text import Text, check_prompts, told
from fastalign.decode.candidates import Candidates
from fastalign.decode.streams import places_of

ROWS_AT_ONCE = 256  # on the CPU more rows gain little speed; in batches, each is also what an interrupt can lose


@dataclass
class Request:
    """What is to be drawn, checked: for the prompts of which `skip` does not have the index.

    encoded: each prompt's token ids (for a server that has the tokenizer, the prompt itself). places: each prompt's
    place in the whole set. rows: candidates at once. record: the settings that the Candidates carry.
    """

    prompts: Sequence[Any]
    encoded: Sequence[Any]
    places: Sequence[int]
    settings: SamplingSettings
    rows: int
    record: dict[str, Any]
    skip: set[int]
    show_progress: bool

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
        """Of the prompts at these indices: [prompt][candidate] each."""
        part = Candidates([self.prompts[i] for i in indices], texts, token_ids, log_probs, settings=self.record)
        part.prompt_ids = np.array([self.places[i] for i in indices], dtype=np.int64)
        return part


class SamplingOptions(TypedDict, total=False):
    """What the functions that draw and then choose pass on to `BaseSampler.sample`, which see."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stop: str | Sequence[str] | None
    chat: bool | str
    batch_size: int | None
    memory_limit: int | str | None
    tools: Sequence[Any] | None
    chat_template_kwargs: Mapping[str, Any] | None


class BaseSampler(ABC):
    """What draws candidates: `Sampler`, on this machine, or one whose model runs in another engine
    (`samplers.external`).

    A subclass sets name, told in errors and in the candidates' settings; text, of its tokenizer; context, the longest
    text in tokens or 0; and gives `draw_parts`.
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
        """All prompts' candidates at once; arguments as in `iter_batches`, whose parts this joins."""
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
    ) -> Iterator[tuple[list[int], Candidates]]:
        """Yield (prompt indices, their candidates) by batch, n candidates of up to max_new_tokens a prompt.

        prompts: strings, or conversations, lists of messages {"role": ..., "content": text or blocks of text}, whose
        last one, where it is the assistant's, is continued. tools: JSON schemas or functions, for the chat template;
        chat_template_kwargs: more of its arguments, which may be given by keyword too (enable_thinking=False).

        temperature (0 is greedy), then top_k (0 is off), top_p, min_p truncate as in transformers.
        stop: a text is cut before the first of these strings, special tokens' too, which texts do not show; token_ids
        and logprobs keep all that was drawn, an end token included. chat: "auto" uses the tokenizer's chat template
        where it has one; False sends prompts as they are. batch_size: candidates at once. memory_limit: of the keys
        and values, in bytes or as "4GB":
        fewer candidates are in the model at once then, and n is bounded by time alone. skip: indices of prompts done
        before: a resumed job draws for the others what an uninterrupted one draws. prompt_ids: the prompts' places in
        the whole set, where these are a part of it: each is drawn for as in the whole. Default 0..P-1. first: the
        number of the first candidate: a candidate is a function of (seed, prompt, its number), so that 4 from 4 on
        are the rest of 8. Raises UserError, one line, before any work on a bad argument or prompt.
        """
        settings = SamplingSettings(n, max_new_tokens, temperature, top_k, top_p, min_p, stop, seed, first)
        check_knobs({"batch_size": batch_size, "memory_limit": memory_limit})
        prompts = check_prompts(prompts, chat)
        template = self.text.template_options(chat_template_kwargs, tools, template)
        encoded = self.encode(prompts, chat, max_new_tokens, template)
        rows = batch_size or self.rows_at_once
        if memory_limit is not None:
            rows = min(rows, self.fitting(memory_limit, max(map(len, encoded)), settings))
        places = places_of(prompt_ids, len(prompts))
        record = {"model": self.name, **vars(settings), "chat": chat, "batch_size": rows, **told(template)}
        del record["first"]
        return self.draw_parts(Request(prompts, encoded, places, settings, rows, record, set(skip), show_progress))

    @abstractmethod
    def draw_parts(self, request: Request) -> Iterator[tuple[list[int], Candidates]]:
        """Yield (prompt indices, their candidates) as they are done; what is still wrong with the request is raised
        before."""

    def fitting(self, memory_limit: int | str, longest: int, settings: SamplingSettings) -> int:
        """How many candidates fit at once beside prompts of up to `longest` tokens."""
        raise UserError(f"memory_limit is for models that run here; {self.name} sets its own")

    def encode(
        self, prompts: Sequence[str], chat: bool | str, max_new_tokens: int, template: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Token ids of each prompt, which leave room for max_new_tokens."""
        encoded = self.text.encode(prompts, chat=chat, options=template)
        for i, ids in enumerate(encoded):
            if self.context and len(ids) + max_new_tokens > self.context:
                size = (
                    f"{counted(len(ids), 'token')} + {max_new_tokens} new exceed the model's context of {self.context}"
                )
                raise UserError(f"prompt {i} is too long: {size}")
        return encoded
