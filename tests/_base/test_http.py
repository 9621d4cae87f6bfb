"""The HTTP client: what a server may do, and what the client makes of it."""

import subprocess
import sys
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fastalign._base import http
from fastalign._base.errors import UserError
from fastalign._base.http import Http

OK = b'{"fine": true}'
CUT = {"Content-Length": "99", "Connection": "close"}


@pytest.fixture
def server(monkeypatch):
    """script: what the next requests get, one each: (status, headers, body); then OK. ports: of the clients."""
    monkeypatch.setattr(http, "WAIT", 0.001)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            running.times.append(time.monotonic())
            running.ports.append(self.client_address[1])
            status, headers, body = running.script.pop(0) if running.script else (200, {}, OK)
            self.send_response(status)
            for name, text in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(body)

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    running.script, running.times, running.ports = [], [], []
    running.url = f"http://127.0.0.1:{running.server_port}"
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def ask(server, *, tries=3, stop=None, **options):
    return Http(server.url, timeout=5, tries=tries, **options).ask("/x", {}, 1000, stop or threading.Event())


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([(429, {"Retry-After": "0.01"}, b"")], None),
        ([(500, {}, b""), (503, {}, b"")], None),
        ([(200, CUT, b'{"half'), (200, CUT, b"")], None),
        ([(500, {}, b"")] * 3, r"/x answered 500: Internal Server Error \(3 tries\)$"),
        ([(200, CUT, b"{")] * 3, r"/x gave no answer: .*received 1 bytes.* \(3 tries\)$"),
        ([(302, {"Location": "/elsewhere"}, b"")], r"/x answered 302: Found$"),
        ([(404, {}, b"<html>")], r"/x answered 404: <html>$"),
        ([(200, {}, b"<html>")], r"/x did not answer with JSON: is this the address of an API\?$"),
        ([(200, {}, b"[]")], r"/x must answer with a JSON object, got list$"),
        ([(200, {}, b" " * 1001)], r"/x answered with more than 1,000 bytes"),
        ([(200, {"Content-Encoding": "gzip"}, b"\x1f\x8b")], r"/x did not answer with JSON"),
    ],
)
def test_what_a_server_may_do(server, script, message):
    server.script = list(script)
    if message is None:
        assert ask(server) == {"fine": True} and len(server.times) == len(script) + 1
    else:
        with pytest.raises(UserError, match=message) as caught:
            ask(server)
        assert "\n" not in str(caught.value) and not server.script


def test_a_connection_serves_all_threads(server):
    client, results = Http(server.url, timeout=5, tries=1), []
    for _ in range(3):
        one = threading.Thread(target=lambda: results.append(client.ask("/x", {}, 1000, threading.Event())))
        one.start()
        one.join()
    assert results == [{"fine": True}] * 3 and len(set(server.ports)) == 1


def test_a_pace_is_kept(server):
    client = Http(server.url, timeout=5, tries=1, per_minute=1200)  # one in 50 ms
    for _ in range(4):
        client.ask("/x", {}, 1000, threading.Event())
    assert server.times[3] - server.times[1] > 0.09


def test_one_that_is_told_to_wait_holds_the_others_too(server):
    server.script = [(429, {"Retry-After": "0.2"}, b"")]
    client = Http(server.url, timeout=5, tries=2)
    first = threading.Thread(target=client.ask, args=("/x", {}, 1000, threading.Event()))
    first.start()
    while not client._pace._next > time.monotonic():
        time.sleep(0.001)
    client.ask("/x", {}, 1000, threading.Event())
    first.join()
    assert len(server.times) == 3 and min(server.times[1:]) - server.times[0] > 0.15


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(None, 0), ("2", 2), ("-1", 0), ("nan", 0), ("1e9", 300), ("soon", 0), (formatdate(0), 0), (formatdate(9e9), 300)],
)
def test_retry_after(text, seconds):
    assert http._seconds(text) == seconds


def test_a_stop_ends_the_waiting(server, monkeypatch):
    monkeypatch.setattr(http, "WAIT", 60.0)
    stop = threading.Event()
    server.script = [(500, {}, b"")]
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(UserError, match=r"answered 500: .* \(1 tries\)"):
        ask(server, stop=stop)


@pytest.mark.parametrize("proxy", ["nonsense://here:1", "http://[::"])
def test_a_proxy_that_is_none(server, monkeypatch, proxy):
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setenv("NO_PROXY", "")
    with pytest.raises(UserError, match="the proxy that the environment names cannot be used: "):
        ask(server)


def test_the_proxy_of_the_environment_is_asked(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", server.url)
    monkeypatch.setenv("NO_PROXY", "")
    client = Http("http://no.such.host.invalid", timeout=5, tries=1)
    assert client.ask("/x", {}, 1000, threading.Event()) == {"fine": True}


def test_httpx_is_imported_by_a_request_alone():
    code = "import fastalign, fastalign.decode.samplers.openai, sys; assert 'httpx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
