"""JSON requests to one server, over httpx: bounded in time and size, and repeated if that can help.

One event loop per process sends them all, whichever thread asks. So `timeout` cuts off a whole answer, headers that
arrive in drops included, and connections are reused between threads. Proxies are those of the environment, as httpx
reads it. Redirects are not followed: they would send the key and the texts to an address that the user did not give.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import ssl
import threading
import time
import urllib.parse
import weakref
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from fastalign._base.errors import UserError

if TYPE_CHECKING:
    import httpx

RETRIED = {408, 425, 429, 500, 502, 503, 504}
WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before the second try, doubled before each later one
LONGEST_AFTER = 300.0  # that a server's Retry-After is obeyed
ERROR_BYTES = 65536  # of an error's body that are read
MODELS_BYTES = 1 << 22

_LOCK = threading.Lock()
_LOOPS: dict[int, asyncio.AbstractEventLoop] = {}  # by process: a fork has no threads


class Refused(UserError):
    """The server answered with another status than 200; `code` is that status."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Http:
    """One server. base: the address before each path. key: of the header Authorization, or, as it is, of another
    `header`; it is in no message. timeout: seconds for a complete answer. tries: number of attempts after a busy or
    failing server (429, 5xx), a lost connection or a timeout. per_minute: requests that may begin in a minute, evenly
    spaced; None: any number.
    """

    def __init__(
        self,
        base: str,
        key: str | None = None,
        *,
        header: str = "Authorization",
        timeout: float,
        tries: int,
        per_minute: float | None = None,
    ):
        self.base, self.timeout, self.tries, self._key = base, timeout, tries, key
        # Answers are small, and a compressed one could be of any size.
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if key:
            headers[header] = f"Bearer {key}" if header == "Authorization" else key
        self.headers: dict[str, str] = headers
        self._pace = _Pace(per_minute)
        self._clients: dict[int, httpx.AsyncClient] = {}  # by process

    def only_model(self, path: str = "/models") -> str:
        """The name of the one model that the server lists. Raises UserError, one line, if it lists another number."""
        try:
            rows = self.ask(path, None, MODELS_BYTES, threading.Event()).get("data")
        except Refused as refused:
            if refused.code != 404:
                raise
            raise Refused(f"{refused}; name the model, as {self.base}#MODEL", 404) from None
        served = [row.get("id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        if len(served) != 1 or not isinstance(served[0], str):
            some = ", ".join(str(name) for name in served[:8]) or "none"
            raise UserError(f"{self.base} serves {some}: name one, as {self.base}#MODEL")
        return served[0]

    def ask(
        self,
        path: str,
        body: dict[str, Any] | None,
        limit: int,
        stop: threading.Event,
        *,
        kinds: tuple[type, ...] = (dict,),
    ) -> Any:
        """The JSON that answers a GET (body None) or POST, of at most `limit` bytes and one of `kinds`.

        Setting `stop` ends the waiting between tries. Raises UserError, one line; `Refused` for a status that no
        repetition would change.
        """
        import httpx

        data = None if body is None else json.dumps(body).encode()
        where = f"{self.base}{path}"
        for attempt in range(self.tries):
            self._pace.wait(stop)
            after = 0.0
            try:
                code, reason, headers, content = _run(asyncio.wait_for(self._once(where, data, limit), self.timeout))
                if code == 200:
                    break
                message = f"{where} answered {code}: {self._without_key(_message(content) or reason)}"
                if code not in RETRIED:
                    raise Refused(message, code)
                after = _seconds(headers.get("Retry-After"))
                self._pace.hold(after)
            except asyncio.TimeoutError:
                message = f"{where} gave no answer: not wholly within {self.timeout:g} seconds"
            except httpx.TransportError as error:  # refused, cut off
                cause = _cause(error)
                message = f"{where} gave no answer: {self._without_key(_told(cause))}"
                if isinstance(error, httpx.ConnectError) and isinstance(cause, ssl.SSLError):
                    raise UserError(message) from None
            wait = min(WAIT * 2**attempt * random.uniform(0.75, 1.25), LONGEST_WAIT)
            if attempt + 1 == self.tries or stop.wait(max(after, wait)):
                raise UserError(f"{message} ({attempt + 1} tries)")
        if len(content) > limit:
            raise UserError(f"{where} answered with more than {limit:,} bytes, which no such request needs")
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            raise UserError(f"{where} did not answer with JSON: is this the address of an API?") from None
        if not isinstance(answer, kinds):
            raise UserError(f"{where} must answer with a JSON object, got {type(answer).__name__}")
        return answer

    async def _once(self, where: str, data: bytes | None, limit: int) -> tuple[int, str, httpx.Headers, bytes]:
        """Status, reason, headers and body, of which at most one piece beyond `limit` is read."""
        client = self._client()
        async with client.stream("GET" if data is None else "POST", where, content=data) as response:
            good, content = response.status_code == 200, bytearray()
            async for piece in response.aiter_raw():
                content += piece
                if len(content) > (limit if good else ERROR_BYTES):
                    break
            return response.status_code, response.reason_phrase, response.headers, bytes(content)

    def _client(self) -> httpx.AsyncClient:
        import httpx

        if (process := os.getpid()) not in self._clients:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            try:
                client = httpx.AsyncClient(headers=self.headers, timeout=None, limits=limits)
            except (ImportError, ValueError, httpx.InvalidURL) as error:  # also: SOCKS without its package
                raise UserError(f"the proxy that the environment names cannot be used: {line(error)}") from None
            self._clients[process] = client
            weakref.finalize(self, _close, client, asyncio.get_running_loop()).atexit = False
        return self._clients[process]

    def _without_key(self, text: str) -> str:
        """Removes the key: a server's message may repeat the request."""
        return text.replace(self._key, "(the key)") if self._key else text


class _Pace:
    """When the next request may begin."""

    def __init__(self, per_minute: float | None):
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        with self._lock:
            now = time.monotonic()
            begin = max(self._next, now)
            self._next = begin + self._gap
        if stop.wait(begin - now):
            raise UserError("stopped before a request")

    def hold(self, seconds: float) -> None:
        """None begins within so many seconds: one thread has been told, and the others need not ask."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def checked_url(url: str) -> str:
    """A server's address without a slash at its end. Raises UserError, which repeats no password or key in it."""
    try:
        parts = urllib.parse.urlsplit(url.strip())
        good = parts.scheme in ("http", "https") and parts.hostname and not parts.query and (parts.port or 1) > 0
    except ValueError:
        good = False
    if "@" in url or "?" in url:
        raise UserError(
            "a server's address must look like http://host:port/v1, without user, password or query: a key is given as "
            "api_key or as $OPENAI_API_KEY"
        )
    if not good:
        raise UserError(f"a server's address must look like http://host:port/v1, got {url!r}")
    return url.strip().rstrip("/")


def checked_key(key: str | None) -> str | None:
    """The key, or $OPENAI_API_KEY for None; None if there is none. Raises UserError if a header cannot hold it."""
    key = (os.environ.get("OPENAI_API_KEY", "") if key is None else key).strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError("api_key must be printable ASCII without spaces, as a header requires, got something else")
    return key or None


def check_at_least_1(**values: float) -> None:
    """Raise UserError for one that is less than 1, or NaN."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 1:
            raise UserError(f"{name} must be at least 1, got {value}")


def line(value: Any) -> str:
    """What a server or a library says, as one printable line of at most 300 characters."""
    text = " ".join(str(value).split())
    return "".join(c for c in text if c.isprintable())[:300]


def _run(work: Any) -> Any:
    """The result of a coroutine, run by this process's loop."""
    with _LOCK:
        if (process := os.getpid()) not in _LOOPS:
            _LOOPS[process] = asyncio.new_event_loop()
            threading.Thread(target=_LOOPS[process].run_forever, name="http", daemon=True).start()
    future = asyncio.run_coroutine_threadsafe(work, _LOOPS[process])
    try:
        return future.result()
    except KeyboardInterrupt:
        future.cancel()
        raise


def _close(client: httpx.AsyncClient, loop: asyncio.AbstractEventLoop) -> None:
    asyncio.run_coroutine_threadsafe(client.aclose(), loop)


def _cause(error: BaseException) -> BaseException:
    """What the system raised: httpx and the libraries below it put errors of their own before that."""
    while inner := error.__cause__ or error.__context__ or next(iter(getattr(error, "exceptions", ())), None):
        error = inner
    return error


def _told(cause: BaseException) -> str:
    if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError) and (cause.errno or 0) > 0:
        return os.strerror(cause.errno or 0)  # asyncio has words of its own for it
    return line(cause) or type(cause).__name__


def _message(content: bytes) -> str:
    """The server's error message, in any of the usual formats, as one line."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = content.decode("utf-8", "replace")
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(name):
            value = value[name]
    return line(value)


def _seconds(text: str | None) -> float:
    """A Retry-After, a number of seconds or a date, in seconds from now; 0 if it is neither."""
    seconds = 0.0
    if text:
        try:
            seconds = float(text)
        except ValueError:
            with contextlib.suppress(ValueError, TypeError, OverflowError):
                seconds = parsedate_to_datetime(text).timestamp() - time.time()
    return min(max(seconds, 0.0), LONGEST_AFTER) if seconds == seconds else 0.0
