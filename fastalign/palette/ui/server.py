"""The page's server: this machine alone, three files of its own and one question, nothing kept.

Its address holds a token, as a folder so that the page's own requests have it too: other users and programs of the
machine can reach the port, and do not know it.
"""

from __future__ import annotations

import hmac
import json
import secrets
import sys
import webbrowser
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from urllib.parse import urlsplit

from fastalign.errors import Terminated, UserError
from fastalign.palette.ui.desk import Desk

HOST = "127.0.0.1"
LONGEST_QUESTION = 1 << 16
SECONDS = 30  # that a connection may keep silent
WAITING = 128  # connections
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_HEADERS = {
    # The page loads what is beside it and asks nobody else.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def serve(desk: Desk, *, port: int = 0, browser: bool = True, say: Callable[[str], object] = print) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C. port: 0 takes a free one. say: gets the address.

    Raises UserError where the port cannot be had.
    """
    with open_server(desk, port) as server:
        say(f"{server.address}  (Ctrl-C ends it)")
        if browser:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except Terminated:
            raise
        except KeyboardInterrupt:
            pass


def open_server(desk: Desk, port: int = 0) -> Server:
    """The server, bound and not yet serving."""
    if not 0 <= port < 1 << 16:
        raise UserError(f"port must lie in 0..65535, got {port}")
    try:
        return Server(desk, port)
    except OSError as error:
        raise UserError(f"port {port} cannot be had ({error.strerror}); 0 takes a free one") from None


class Server(ThreadingHTTPServer):
    """address: where the page is, with the token."""

    request_queue_size = WAITING

    def __init__(self, desk: Desk, port: int):
        self.desk, self.token = desk, secrets.token_urlsafe(16)
        super().__init__((HOST, port), _Handler)
        self.address = f"http://{HOST}:{self.server_port}/{self.token}/"

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # one that left is no news
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
            self._send_json(200, self.server.desk.describe())
        elif page in _FILES:
            name, kind = _FILES[page]
            self._send(200, resources.files(__package__).joinpath(name).read_bytes(), kind)
        else:
            self._send_json(404, {"error": "no such page"})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LONGEST_QUESTION:
            self.close_connection = True  # what it sends is not read
            self._send_json(413, {"error": f"a question must have at most {LONGEST_QUESTION} bytes"})
            return
        body = self.rfile.read(int(length))
        if not self._is_ours():
            return
        if self._page() != "/solve":
            self._send_json(404, {"error": "no such page"})
            return
        try:
            self._send_json(200, self.server.desk.answer(json.loads(body)))
        except UserError as error:
            self._send_json(400, {"error": str(error)})
        except ValueError:
            self._send_json(400, {"error": "the question must be JSON"})

    def _is_ours(self) -> bool:
        """Refuse who does not know the token, and what other pages may send: under another name for this address, or from
        another origin."""
        ours = [f"{name}:{self.server.server_port}" for name in (HOST, "localhost")]
        origin = self.headers.get("Origin")
        known = hmac.compare_digest(
            urlsplit(self.path).path.partition("/")[2].partition("/")[0].encode(), self.server.token.encode()
        )
        if (
            known
            and self.headers.get("Host") in ours
            and (origin is None or origin in [f"http://{name}" for name in ours])
        ):
            return True
        self._send_json(
            403, {"error": f"open it as http://{ours[0]}/ with the token that was printed with this address"}
        )
        return False

    def _page(self) -> str:
        """What is asked for, behind the token and before a query."""
        return "/" + urlsplit(self.path).path.partition("/")[2].partition("/")[2]

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
        """Nothing on the terminal for each request."""
