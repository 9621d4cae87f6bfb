"""Candidates from a server that speaks OpenAI's completions protocol: vLLM serve, SGLang, llama.cpp's server, TGI.

Every option that shapes the distribution is sent, since servers have defaults of their own (vLLM takes the
checkpoint's, llama.cpp top_k 40 and min_p 0.05); fields beyond OpenAI's (top_k, min_p, repetition_penalty,
return_token_ids) are those of vLLM and SGLang, and OpenAI's own service refuses them.

Who writes the chat template: with a tokenizer, we do, and token ids are sent to /completions, so that p0 is the
one of a local Sampler; without one, the server does (/chat/completions), unless chat is False: then the text
goes as it is to /completions, where most servers put their beginning-of-text token before it.

What comes back is checked before it is used. Token ids and log-probs are the server's; where it gives none, theirs
are empty lists. vLLM's are of the model before temperature and truncation, unless the server was started with
`--logprobs-mode processed_logprobs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fastalign._base.errors import UserError
from fastalign._base.http import Http, check_at_least_1, checked_key, checked_url
from fastalign._base.in_flight import as_done
from fastalign.data.conversations import Conversation
from fastalign.data.sampling import SamplingSettings
from fastalign.data.text import cut
from fastalign.decode.samplers.base import Request
from fastalign.decode.samplers.external import Answer, External, request_seed, split

BYTES_PER_TOKEN = 2048  # of an answer, at most: a token's text, its likeliest others, punctuation
ROUNDING = 1e-6  # by which the log of a probability of 1 may come out above 0


class OpenAISampler(External):
    """A model on a server, as a Sampler; batch_size: candidates per request (n), 64 by default.

    url: up to and including /v1. model: its name there; None if the server has only one. tokenizer: the model's (see
    above), or its name. api_key: default $OPENAI_API_KEY. in_flight: requests at once. timeout: seconds for a complete
    answer. tries: number of attempts after a busy or failing server (429, 5xx), a lost connection or a timeout. Raises
    UserError, one line, if the server refuses, cannot be reached or sends an invalid answer.
    """

    rows_at_once = 64

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        tokenizer: Any = None,
        api_key: str | None = None,
        in_flight: int = 16,
        timeout: float = 600.0,
        tries: int = 6,
    ):
        check_at_least_1(in_flight=in_flight, timeout=timeout, tries=tries)
        if isinstance(tokenizer, str):
            from fastalign.models.loading import load_tokenizer

            tokenizer = load_tokenizer(tokenizer)
        self._http = Http(checked_url(url), checked_key(api_key), timeout=timeout, tries=tries)
        self.served: str = model or self._http.only_model()
        self.in_flight = in_flight
        super().__init__(f"{self._http.base}#{self.served}", tokenizer, 0)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, *, dtype: Any = "auto", device: Any = "auto", backend: str = "auto", **options: Any
    ) -> OpenAISampler:
        """From "http://host:port/v1#MODEL"; options: the constructor's."""
        for name, value in (("dtype", dtype), ("device", device), ("backend", backend)):
            if value not in ("auto", "openai"):
                raise UserError(f"{name} must be 'auto' for a model on a server, which has its own, got {value!r}")
        url, _, model = name_or_path.partition("#")
        return cls(url, model or None, **options)

    def encode(
        self, prompts: Sequence[str], chat: bool | str, max_new_tokens: int, template: Mapping[str, Any] | None = None
    ) -> list[Any]:
        if self.tokenizer is not None:
            return super().encode(prompts, chat, max_new_tokens, template)
        for i, prompt in enumerate(prompts if chat is False else ()):
            if isinstance(prompt, Conversation) or template:
                raise UserError(f"prompt {i} needs the server's chat template, which chat=False leaves out")
        return list(prompts)

    def answers(
        self, request: Request, wanted: Sequence[int], count: int, done: Callable[[int], None]
    ) -> Iterator[tuple[int, list[Answer]]]:
        settings, encoded = request.settings, request.encoded
        pieces = split(count, request.rows)
        tasks = ((i, first, some) for i in wanted for first, some in pieces)
        received: dict[int, dict[int, list]] = {i: {} for i in wanted}
        by_server = self.tokenizer is None and request.record["chat"] is not False

        def work(task, stop):
            i, first, some = task
            # With 0, llama.cpp gives none.
            asks = _chat(encoded[i], request.record) if by_server else {"prompt": encoded[i], "logprobs": 1}
            seed = request_seed(settings.seed, request.places[i], settings.first + first)
            body = self._body(asks, some, settings, seed)
            limit = 65536 + BYTES_PER_TOKEN * some * (settings.max_new_tokens + 1)
            answer = self._http.ask("/chat/completions" if by_server else "/completions", body, limit, stop)
            drawn = _read(answer, some, settings, self.name)
            if self.text.sees_special(settings.stop):  # shown, for the server to stop at them
                drawn = [(self._without_special(encoded[i], *one[:2], settings), *one[1:]) for one in drawn]
            return drawn

        for (i, first, some), drawn in as_done(work, tasks, min(self.in_flight, len(wanted) * len(pieces))):
            received[i][first] = drawn
            done(some)
            if len(received[i]) == len(pieces):
                parts = received.pop(i)
                yield i, [one for start in sorted(parts) for one in parts[start]]

    def _without_special(self, prompt: list[int], text: str, tokens: list[int], settings: SamplingSettings) -> str:
        return self.text.continuation(
            prompt, tokens or self.text.tokens([text], "the answer", add_special_tokens=False)[0], settings.stop
        )

    def _body(self, asks: dict[str, Any], n: int, settings: SamplingSettings, seed: int) -> dict[str, Any]:
        return {
            "model": self.served,
            **asks,
            "n": n,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k or -1,  # SGLang refuses 0
            "min_p": settings.min_p,
            "repetition_penalty": 1.0,
            "seed": seed,
            **({"stop": settings.stop} if settings.stop else {}),
            **({"skip_special_tokens": False} if self.text.sees_special(settings.stop) else {}),
            "return_token_ids": True,
        }


def _chat(prompt: str, record: dict[str, Any]) -> dict[str, Any]:
    """The /chat/completions request for a prompt: its messages, and the template's arguments as vLLM and SGLang take
    them."""
    asks: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}], "logprobs": True, "top_logprobs": 1}
    tools, options = record.get("tools"), record.get("chat_template_kwargs", {})
    if isinstance(prompt, Conversation):
        asks["messages"] = prompt.messages
        tools, options = prompt.tools or tools, {**options, **prompt.chat_template_kwargs}
        if prompt.continues:
            asks |= {"add_generation_prompt": False, "continue_final_message": True}
    return asks | ({"tools": tools} if tools else {}) | ({"chat_template_kwargs": options} if options else {})


def _read(answer: dict, count: int, settings: SamplingSettings, name: str) -> list[Answer]:
    """Each candidate, with the whole answer checked."""
    try:
        choices = _typed(answer, "choices", list)
        if len(choices) != count:
            hint = "; a server without n takes batch_size=1 (--batch-size 1)" if len(choices) == 1 else ""
            raise _Wrong(f"must hold {count} choices, got {len(choices)}{hint}")
        if all(isinstance(choice, dict) for choice in choices):
            order = [choice.get("index") for choice in choices]
            known = [i for i in order if isinstance(i, int)]
            if len(set(known)) < len(known):
                raise _Wrong(f"must number its choices 0 to {count - 1}, once each, got {order}")
            if sorted(known) == list(range(count)):
                choices = sorted(choices, key=lambda choice: choice["index"])
        drawn = [_read_choice(choice, settings) for choice in choices]
    except _Wrong as wrong:
        raise UserError(f"{name}: its answer {wrong}") from None
    if _cannot_be_chance(drawn, settings):
        why = "the server draws each with the request's seed; use batch_size=1 (--batch-size 1)"
        raise UserError(f"{name}: all {count} candidates of a request are the same, which chance does not do: {why}")
    return drawn


def _cannot_be_chance(drawn: list, settings: SamplingSettings) -> bool:
    """Whether all being the same text has probability under 1e-12, judged by log-probs before truncation."""
    text, _, logprobs = drawn[0]
    if settings.temperature < 1 or settings.top_k or settings.min_p or any(one[0] != text for one in drawn):
        return False
    most = sum(logprobs) - len(logprobs) * math.log(settings.top_p)  # truncated to top_p, p grows by 1 / top_p at most
    return (len(drawn) - 1) * most < math.log(1e-12)


def _read_choice(choice: Any, settings: SamplingSettings) -> Answer:
    if not isinstance(choice, dict):
        raise _Wrong(f"must hold objects as choices, got {type(choice).__name__}")
    if "message" in choice:
        text = _typed(choice, "message", dict).get("content") or ""
    else:
        text = choice.get("text")
    if not isinstance(text, str):
        raise _Wrong(f"must hold a text per choice, got {type(text).__name__}")
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is legal JSON and no text
    scores = choice.get("logprobs") or {}
    if not isinstance(scores, dict):
        raise _Wrong(f"must hold logprobs as an object, got {type(scores).__name__}")
    logprobs: list[Any]
    tokens: list[Any]
    if scores.get("content") is not None:  # of chats, and of llama.cpp throughout
        rows = [row for row in _typed(scores, "content", list) if isinstance(row, dict)]
        logprobs, tokens = [row.get("logprob") for row in rows], [row.get("id") for row in rows]
        tokens = [] if None in tokens else tokens
    else:
        logprobs, tokens = scores.get("token_logprobs") or [], []
    tokens = choice.get("token_ids") or tokens
    for what, values, kinds in (("token_ids", tokens, int), ("log-probs", logprobs, (int, float))):
        if not isinstance(values, list) or len(values) > settings.max_new_tokens + 1:
            raise _Wrong(f"must hold {what} as a list of at most {settings.max_new_tokens} values")
        wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, kinds) or not abs(v) < 2**31]
        if wrong:
            raise _Wrong(f"must hold {what} as finite numbers, got {wrong[0]!r:.40}")
    above = [value for value in logprobs if value > ROUNDING]
    if above:
        raise _Wrong(f"must hold log-probs of at most 0, got {above[0]:.6g}")
    if any(token < 0 for token in tokens) or (tokens and logprobs and len(tokens) != len(logprobs)):
        raise _Wrong(f"must hold one token id, not negative, per log-prob, got {len(tokens)} and {len(logprobs)}")
    return cut(text, settings.stop), tokens, [min(float(value), 0.0) for value in logprobs]


class _Wrong(Exception):
    pass


def _typed(value: dict, name: str, kind: type) -> Any:
    if not isinstance(value.get(name), kind):
        raise _Wrong(f"must hold {name!r}, a {kind.__name__}, got {type(value.get(name)).__name__}")
    return value[name]
