"""The page's server: local only, three files and one query, without stored state.

Its address contains a token, as a folder so that the page's own requests have it too: other users and programs on the
machine can reach the port but do not know the token.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
import sys
import webbrowser
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from fastalign._base.errors import Terminated, UserError
from fastalign.report.ui.session import Session

HOST = "127.0.0.1"
LONGEST_QUESTION = 1 << 16
SECONDS = 30  # before a silent connection is closed
WAITING = 128  # connections at once
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
_HEADERS = {
    # The page loads only its own files.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def serve(
    session: Session,
    *,
    port: int = 0,
    browser: bool = True,
    allowed_hosts: Sequence[str] = (),
    say: Callable[[str], object] = print,
) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C. port: 0 picks a free one. say: receives the address.

    allowed_hosts: names, each with or without a port, by which a browser may ask for the page that reaches it through a
    tunnel or a proxy ("localhost:9000" for `ssh -L 9000:127.0.0.1:8000`); without a port any.
    Raises UserError if the port cannot be opened, and for an invalid host name.
    """
    with open_server(session, port, allowed_hosts) as server:
        say(f"{server.address}  (Ctrl-C ends it)")
        if browser:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except Terminated:
            raise
        except KeyboardInterrupt:
            pass


def open_server(session: Session, port: int = 0, allowed_hosts: Sequence[str] = ()) -> Server:
    """The server, bound but not yet serving."""
    for name in allowed_hosts:
        if not _HOST.fullmatch(name):
            raise UserError(f"allowed-host must be a name or name:port, as in localhost:9000, got {name!r}")
    if not 0 <= port < 1 << 16:
        raise UserError(f"port must lie in 0..65535, got {port}")
    try:
        return Server(session, port, allowed_hosts)
    except OSError as error:
        raise UserError(f"port {port} cannot be opened ({error.strerror}); 0 picks a free one") from None


class Server(ThreadingHTTPServer):
    """address: where the page is, with the token."""

    session: Session
    token: str

    request_queue_size = WAITING

    def __init__(self, session: Session, port: int, allowed_hosts: Sequence[str]):
        self.session, self.token = session, secrets.token_urlsafe(16)
        super().__init__((HOST, port), _Handler)
        own = [f"{name}:{self.server_port}" for name in (HOST, "localhost")]
        self.hosts: set[str] = {name.lower() for name in (*own, *allowed_hosts)}
        self.address: str = f"http://{HOST}:{self.server_port}/{self.token}/"

    def knows(self, host: str) -> bool:
        """Whether this host name is allowed, with or without a port."""
        host = host.lower()
        return bool(_HOST.fullmatch(host)) and (host in self.hosts or re.sub(r":\d+$", "", host) in self.hosts)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that left
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "fastalign", ""
    timeout = SECONDS

    def do_GET(self) -> None:
        if not self._is_ours():
            return
        page = self._page()
        if page == "/values":
            self._send_json(200, self.server.session.describe())
        elif page in _FILES:
            name, kind = _FILES[page]
            self._send(200, resources.files(__package__).joinpath(name).read_bytes(), kind)
        else:
            self._send_json(404, {"error": "no such page"})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", length):
            self._refuse_unread(400, "Content-Length must be the number of the question's bytes")
            return
        if int(length) > LONGEST_QUESTION:
            self._refuse_unread(413, f"a question must have at most {LONGEST_QUESTION} bytes")
            return
        body = self.rfile.read(int(length))
        if not self._is_ours():
            return
        if self._page() != "/solve":
            self._send_json(404, {"error": "no such page"})
            return
        try:
            self._send_json(200, self.server.session.answer(json.loads(body)))
        except UserError as error:
            self._send_json(400, {"error": str(error)})
        except (ValueError, RecursionError):  # of JSON that is nested too deep
            self._send_json(400, {"error": "the question must be JSON"})

    def _refuse_unread(self, status: int, why: str) -> None:
        self.close_connection = True  # the request's body is not read
        self._send_json(status, {"error": why})

    def _is_ours(self) -> bool:
        """Refuses requests without the token, and those of other pages: under another host name, or from another
        origin."""
        token, _, _ = self._parts()
        origin = self.headers.get("Origin")
        known = hmac.compare_digest(token.encode(), self.server.token.encode())
        knows = self.server.knows
        if (
            known
            and knows(self.headers.get("Host", ""))
            and (
                origin is None or any(origin.startswith(x) and knows(origin[len(x) :]) for x in ("http://", "https://"))
            )
        ):
            return True
        address = f"http://{HOST}:{self.server.server_port}/"
        self._send_json(
            403,
            {
                "error": f"open it as {address} with the token that was printed with this address; through a tunnel or "
                "proxy, start it with --allowed-host and the name that the browser shows"
            },
        )
        return False

    def _page(self) -> str:
        """The requested path, without token and query."""
        return "/" + self._parts()[2]

    def _parts(self) -> tuple[str, str, str]:
        """(token, "/", page) of an address or path; nothing for anything else."""
        try:
            return urlsplit(self.path).path.partition("/")[2].partition("/")
        except ValueError:
            return "", "", ""

    def _send_json(self, status: int, value: object) -> None:
        self._send(status, json.dumps(value, allow_nan=False).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """No terminal output per request."""
