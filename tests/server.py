"""A local server for tests of what comes over a network: it notes what is asked, and misbehaves."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """`log` holds (seconds, what, headers) of every request; `most`: how many came at once."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, handler: type[Handler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.log: list[tuple[float, str, Message]] = []
        self.delay, self.now, self.most, self.lock = 0.0, 0, 0, threading.Lock()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def asked(self) -> Counter[str]:
        return Counter(what for _, what, _ in self.log)

    def handle_error(self, *about: object) -> None:
        """Clients that hang up (killed, or out of patience) are what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    """A subclass has one method a behaviour, named by the first word asked for; its argument: is it
    asked for the first time?"""

    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *about: object) -> None:
        pass

    def behave(self, what: str, name: str) -> None:
        with self.server.lock:
            self.server.log.append((time.monotonic(), what, self.headers))
            first = self.server.asked()[what] == 1
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        time.sleep(self.server.delay)
        with self.server.lock:  # before the client can see the answer
            self.server.now -= 1
        getattr(self, name)(first)

    def send(
        self, body: bytes = b"", code: int = 200, length: int | None = None, **headers: str
    ) -> None:
        self.send_response(code)
        size = len(body) if length is None else length
        for name, value in {"Content-Length": str(size), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = length is not None


@contextmanager
def serving(handler: type[Handler]) -> Iterator[Server]:
    with Server(handler) as made:
        threading.Thread(
            target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        yield made
        made.shutdown()
