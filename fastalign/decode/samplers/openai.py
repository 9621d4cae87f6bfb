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

import contextlib
import http.client
import json
import math
import os
import queue
import random
import socket
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastalign._base.errors import UserError
from fastalign.data.conversations import Conversation
from fastalign.data.sampling import SamplingSettings
from fastalign.data.text import cut
from fastalign.decode.samplers.base import Request
from fastalign.decode.samplers.external import Answer, External, request_seed, split

BYTES_PER_TOKEN = 2048  # of an answer, at most: a token's text, its likeliest others, punctuation
MODELS_BYTES = 1 << 22
ROUNDING = 1e-6  # by which the log of a probability of 1 may come out above 0
RETRIED = {408, 425, 429, 500, 502, 503, 504}
WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before the second try, doubled before each later one


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
        for name, value in (("in_flight", in_flight), ("timeout", timeout), ("tries", tries)):
            if not value >= 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if isinstance(tokenizer, str):
            tokenizer = _load_tokenizer(tokenizer)
        key = os.environ.get("OPENAI_API_KEY") if api_key is None else api_key
        self._http = _Http(_checked_url(url), _checked_key(key), timeout, tries)
        self.served: str = model or self._only_model()
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

    def _only_model(self) -> str:
        answer = self._http.ask("/models", None, MODELS_BYTES, threading.Event())
        rows = answer.get("data")
        served = [row.get("id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        if len(served) != 1 or not isinstance(served[0], str):
            some = ", ".join(str(name) for name in served[:8]) or "none"
            raise UserError(f"{self._http.base} serves {some}: name one, as {self._http.base}#MODEL")
        return served[0]

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


def as_done(
    work: Callable[[Any, threading.Event], Any], tasks: Iterable[Any], threads: int
) -> Iterator[tuple[Any, Any]]:
    """(task, work(task, stop)) of each task as it finishes, `threads` at once; raises the first error.

    On early exit or an error, `stop` is set and no more tasks are started. The threads are daemons, so an interrupt
    does not wait for answers.
    """
    tasks, lock, stop = iter(tasks), threading.Lock(), threading.Event()
    done: queue.SimpleQueue[tuple[Any, Any, BaseException | None] | None] = queue.SimpleQueue()

    def run() -> None:
        while not stop.is_set():
            with lock:
                task = next(tasks, None)
            if task is None:
                break
            try:
                done.put((task, work(task, stop), None))
            except BaseException as error:
                done.put((task, None, error))
                stop.set()  # after it: what others raise because they were stopped is not the first
        done.put(None)

    try:
        for _ in range(threads):
            threading.Thread(target=run, daemon=True).start()
        running = threads
        while running:
            item = done.get()
            if item is None:
                running -= 1
                continue
            task, result, error = item
            if error is not None:
                raise error
            yield task, result
    finally:
        stop.set()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the key and the prompts to an address that the user did not give."""

    def redirect_request(self, *args, **kwargs):
        return None


class _Http:
    """JSON requests to one server, repeated if that can help."""

    def __init__(self, base: str, key: str | None, timeout: float, tries: int):
        self.base, self.timeout, self.tries, self._key = base, timeout, tries, key
        self.headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"

    def ask(self, path: str, body: dict | None, limit: int, stop: threading.Event) -> dict[str, Any]:
        """The server's JSON object, of at most `limit` bytes. Raises UserError."""
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(self.tries):
            request = urllib.request.Request(self.base + path, data, self.headers)
            after = 0.0
            try:
                with _Deadline(self.timeout) as deadline:
                    content = self._once(request, limit, deadline)
                break
            except _Refused as error:
                message = f"{self.base}{path} answered {error.code}: {self._without_key(error.message)}"
                if error.code not in RETRIED:
                    raise UserError(message) from None
                after = error.after
            except (OSError, http.client.HTTPException) as error:  # refused, cut off, timed out
                reason = getattr(error, "reason", None) or error
                message = (
                    f"{self.base}{path} gave no answer: {self._without_key(_line(reason)) or type(reason).__name__}"
                )
                if isinstance(reason, ssl.SSLError) and not deadline.passed:
                    raise UserError(message) from None
            wait = max(after, WAIT * 2**attempt * random.uniform(0.75, 1.25))
            if attempt + 1 == self.tries or stop.wait(min(wait, LONGEST_WAIT)):
                raise UserError(f"{message} ({attempt + 1} tries)")
        if len(content) > limit:
            raise UserError(f"{self.base}{path} answered with more than {limit:,} bytes, which no such request needs")
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            raise UserError(f"{self.base}{path} did not answer with JSON: is this the address of an API?") from None
        if not isinstance(answer, dict):
            raise UserError(f"{self.base}{path} must answer with a JSON object, got {type(answer).__name__}")
        return answer

    @staticmethod
    def _once(request: urllib.request.Request, limit: int, deadline: _Deadline) -> bytes:
        opener = urllib.request.build_opener(_NoRedirect, _Http1(deadline), _Https(deadline))
        try:
            with opener.open(request, timeout=deadline.seconds) as response:
                return response.read(limit + 1)
        except urllib.error.HTTPError as error:
            raise _Refused(error.code, _message(error), _seconds(error.headers.get("Retry-After"))) from None

    def _without_key(self, text: str) -> str:
        """Removes the key: a server's message may repeat the request."""
        return text.replace(self._key, "(the key)") if self._key else text


class _Refused(Exception):
    def __init__(self, code: int, message: str, after: float):
        super().__init__(message)
        self.code, self.message, self.after = code, message, after


class _Deadline:
    """Closes the connections opened within it after `seconds`. A socket's own timeout applies to each read, and a
    single byte satisfies it."""

    def __init__(self, seconds: float):
        self.seconds, self.passed = seconds, False
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._pass)
        self._timer.daemon = True

    def connect(self, *args, **kwargs) -> socket.socket:
        connected = socket.create_connection(*args, **kwargs)
        with self._lock:
            self._sockets.append(connected.dup())  # TLS takes the socket itself
            passed = self.passed
        if passed:
            self._shut()
        return connected

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._timer.cancel()
        with self._lock:
            for each in self._sockets:
                each.close()
            self._sockets.clear()
        if self.passed and (kind is None or issubclass(kind, (OSError, http.client.HTTPException))):
            # What an answer without a length was cut to looks like all of it.
            raise TimeoutError(f"not wholly within {self.seconds:g} seconds") from None

    def _pass(self) -> None:
        self.passed = True
        self._shut()

    def _shut(self) -> None:
        with self._lock:
            for each in self._sockets:
                with contextlib.suppress(OSError):  # it has ended by itself
                    each.shutdown(socket.SHUT_RDWR)


class _Http1(urllib.request.HTTPHandler):
    kind: type[http.client.HTTPConnection] = http.client.HTTPConnection

    def __init__(self, deadline: _Deadline):
        super().__init__()
        self.deadline = deadline

    def http_open(self, request):
        return self.do_open(self._connection, request)

    def _connection(self, *args, **kwargs):
        made = self.kind(*args, **kwargs)
        # Where both kinds, and tunnels through proxies, get their socket.
        made._create_connection = self.deadline.connect
        return made


class _Https(_Http1, urllib.request.HTTPSHandler):
    kind = http.client.HTTPSConnection

    def https_open(self, request):
        return self.do_open(self._connection, request, context=self._context)


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


def _checked_url(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url.strip())
        good = parts.scheme in ("http", "https") and parts.hostname and not parts.query and (parts.port or 1) > 0
    except ValueError:
        good = False
    if "@" in url or "?" in url:  # not repeated: it may be a password, or a key
        raise UserError(
            "a server's address must look like http://host:port/v1, without user, password or query: a key is given as "
            "api_key or as $OPENAI_API_KEY"
        )
    if not good:
        raise UserError(f"a server's address must look like http://host:port/v1, got {url!r}")
    return url.strip().rstrip("/")


def _checked_key(key: str | None) -> str | None:
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError("api_key must be printable ASCII without spaces, as a header requires, got something else")
    return key or None


def _load_tokenizer(name: str):
    from transformers import AutoTokenizer

    from fastalign._base.quiet import one_line_errors
    from fastalign.models.loading import resolve

    with one_line_errors(name):
        return AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=False)


def _message(error: urllib.error.HTTPError) -> str:
    """The server's error message, in any of the usual formats, as one line."""
    try:
        content = error.read(65536)
        value = json.loads(content)
    except (OSError, http.client.HTTPException):
        return _line(error.reason)
    except (ValueError, RecursionError):
        value = content.decode("utf-8", "replace")
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(name):
            value = value[name]
    return _line(value) or _line(error.reason)


def _line(value: Any) -> str:
    text = " ".join(str(value).split())
    return "".join(c for c in text if c.isprintable())[:300]


def _seconds(text: str | None) -> float:
    """A Retry-After in seconds; for the other form, a date, our own delays apply."""
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0
