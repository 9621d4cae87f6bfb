"""A small local server that answers JSON to JSON, and misbehaves as a test wants."""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LoopbackServer:
    """Answers at `url` inside a with block, by `complete(path, body)`, for a subclass to define: a JSON value, or
    (status, value). seen: (path, headers, body) of every POST; most: requests at once.

    faults: what the next requests meet, one each: a status, a (status, headers, bytes) triple or "drop".
    answer: None, or a function of the true answer that gives another (or bytes).
    """

    def __init__(self, names=("tiny",)):
        self.names = names
        self.seen, self.faults, self.answer, self.most, self._now = [], [], None, 0, 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args):
                pass

            def do_GET(self):
                self.reply(200, {}, {"object": "list", "data": [{"id": name} for name in outer.names]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.seen.append((self.path, dict(self.headers), body))
                    reply = outer.faults.pop(0) if outer.faults else None
                    outer._now += 1
                    outer.most = max(outer.most, outer._now)
                try:
                    if reply is None:
                        answer = outer.complete(self.path, body)
                        status, answer = answer if isinstance(answer, tuple) else (200, answer)
                        reply = status, {}, outer.answer(answer) if outer.answer else answer
                finally:  # before the client has the answer, after which it may ask again
                    with outer._lock:
                        outer._now -= 1
                if reply == "drop":
                    self.close_connection = True
                    self.connection.close()
                else:
                    self.reply(*(reply if isinstance(reply, tuple) else (reply, {}, {"error": {"message": "busy"}})))

            def reply(self, status, headers, value):
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, text in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(content)

        class Server(ThreadingHTTPServer):
            def handle_error(self, request, client_address):
                if not isinstance(sys.exc_info()[1], ConnectionError):  # a test may have killed the client
                    super().handle_error(request, client_address)

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()
        deadline = time.monotonic() + 2
        while self._now and time.monotonic() < deadline:  # a thread inside torch when the process exits aborts it
            time.sleep(0.01)

    def complete(self, path, body):
        raise NotImplementedError
