"""A server in a thread of the test's own, and a plain HTTP client."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import uvicorn

from ecore.generation.decoding import Decoding
from ecore.pipeline import ECore
from ecore.serving.app import create_app
from ecore.serving.server import listening, server_config
from ecore.serving.settings import Serving

PATIENCE = 30.0


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    def __init__(self, port: int) -> None:
        self.port = port
        self.base_url = f"http://127.0.0.1:{port}/v1"

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """``body`` as bytes, or a value to send as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def chat(self, body: Any, **headers: str) -> Answer:
        return self.request("POST", "/v1/chat/completions", body, headers)

    def begin(self, body: Any) -> socket.socket:
        """Send a request for a chat and wait for nothing."""
        content = json.dumps(body).encode()
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        sock.sendall(head.encode() + content)
        return sock

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.request("GET", "/metrics").body.decode().splitlines()
        found = [line for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
        assert found, name
        return sum(float(line.rpartition(" ")[2]) for line in found)


@contextmanager
def serving(
    model: ECore,
    decoding: Decoding | None = None,
    token: str | None = None,
    longest: int = 256,
    page: bool = False,
    **settings: Any,
) -> Iterator[Server]:
    """A server for ``model`` on a free port."""
    app = create_app(
        model, "tiny", Serving(**settings), decoding or Decoding(max_length=8), longest, token, page
    )
    with listening("127.0.0.1", 0) as listener:
        server = uvicorn.Server(server_config(app))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield Server(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


def until(condition: Any) -> None:
    """Wait until ``condition()`` holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
