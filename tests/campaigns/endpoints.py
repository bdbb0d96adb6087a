"""A server that answers `ecore annotate run --annotator endpoint` in hostile ways, the mode by the address's path."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

SECRET = "sk-Very-Secret-Key-1"
"""The key that commands are given: it must be in nothing that they print or write."""
_LONG = 1 << 23


def _reply(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def _says(text: str, **more: object) -> bytes:
    return _reply(json.dumps({"choices": [{"message": {"content": text}}], **more}).encode())


def _refuses(status: str) -> bytes:
    return _reply(f"\x1b[2Jno, {SECRET}\0\n".encode(), status)


def _redirects(status: str) -> bytes:
    return _reply(SECRET.encode(), f"{status} Moved", f"Location: /stolen/{SECRET}\r\n")


_OK = b'{"choices": [{"message": {"content": "[\\"sad\\"]"}}]}'
_REFUSALS = {
    status: _refuses(f"{status} No")
    for status in ("400", "401", "403", "404", "408", "413", "422", "429", "500", "502", "503", "999")
}
_REDIRECTS = {status: _redirects(status) for status in ("301", "302", "307", "308")}
_WAITS = {
    f"retry-after {wait}": _reply(b"busy", "429 Busy", f"Retry-After: {wait}\r\n")
    for wait in ("1e99", "-5", "nan", "soon", "Fri, 99 Abc 99999 99:99:99 GMT")
}
_BODIES = {
    "html": b"<html>busy</html>",
    "empty": b"",
    "deep": b"[" * 10**5,
    "long integer": b"9" * 5000,
    "not a number": b'{"choices": [{"message": {"content": "[\\"sad\\"]"}, "logprob": NaN}]}',
    "half a pair": b'{"choices": [{"message": {"content": "[\\"sad\\"] \\ud83d"}}]}',
    "invalid UTF-8": _OK.replace(b"sad", b"s\xff\xfed"),
    "UTF-16": _OK.decode().encode("utf-16"),
    "null": b"null",
    "list": b"[]",
    "content is a number": b'{"choices": [{"message": {"content": 3}}]}',
    "content is a list": b'{"choices": [{"message": {"content": ["sad"]}}]}',
    "choices is an object": b'{"choices": {"0": 1}}',
    "escaped key": _OK.replace(b"sad", "".join(f"\\u{ord(c):04x}" for c in SECRET).encode()),
    "longer than any reply": b" " * _LONG + _OK,
}
MODES: dict[str, bytes | Callable[[socket.socket], None]] = {
    **_REFUSALS,
    **_REDIRECTS,
    **_WAITS,
    **{name: _reply(body) for name, body in _BODIES.items()},
    "key in the answer": _says(f'You sent {SECRET}. ["sad"]'),
    "key as an emotion": _says(f'["{SECRET}", "sad"]'),
    "key in capitals": _says(f'{SECRET.upper()} ["sad"]'),
    "control characters": _says('\x1b[2J\x1b]0;title\x07 ["sad"]\0'),
    "many names": _says(json.dumps(["x" * 100] * 5000)),
    "no list": _says("sad, I think"),
    "reason": _reply(b"", f"403 {SECRET} \x1b[31m"),
    "status line": f"{SECRET}\x1b[2J\r\n\r\n".encode(),
    "no headers": b"HTTP/1.1 200 OK\n\n" + _OK,
    "long header": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n" + _OK,
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 900\r\n\r\n" + _OK,
    "cut short": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + _OK,
    "broken chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n" + _OK,
    "huge chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" + _OK,
    "compressed": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n\x1f\x8b\x08\0garbage",
    "hang up": lambda connection: connection.close(),
    "reset": lambda connection: _reset(connection),
    "silence": lambda connection: time.sleep(5),
    "endless headers": lambda connection: _for_ever(connection, b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.02),
    "endless continue": lambda connection: _for_ever(connection, b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01),
    "dripping body": lambda connection: _for_ever(connection, b"HTTP/1.1 200 OK\r\n\r\n", b" ", 0.05),
    "endless body": lambda connection: _for_ever(connection, b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536, 0),
}
"""The reply sent to a request, or the fate of its connection."""


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


def _for_ever(connection: socket.socket, begin: bytes, more: bytes, pause: float) -> None:
    end = time.monotonic() + 8
    connection.sendall(begin)
    while time.monotonic() < end:
        connection.sendall(more)
        time.sleep(pause)


def serve(root: Path) -> tuple[int, int]:
    """Start the server in a child process; its port and process.

    A request that follows a redirect leaves a file ``stolen`` in ``root``.
    """
    server = socket.create_server(("127.0.0.1", 0), backlog=64)
    port = server.getsockname()[1]
    pid = os.fork()
    if pid == 0:
        parent = os.getppid()
        server.settimeout(1)
        while os.getppid() == parent:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            threading.Thread(target=_answer, args=(connection, root), daemon=True).start()
        os._exit(0)
    server.close()
    return port, pid


def _answer(connection: socket.socket, root: Path) -> None:
    names = list(MODES)
    try:
        connection.settimeout(10)
        request = b""
        while b"\r\n\r\n" not in request:
            part = connection.recv(65536)
            if not part:
                return
            request += part
        head, _, body = request.partition(b"\r\n\r\n")
        length = next(
            int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")
        )
        while len(body) < length:
            body += connection.recv(65536)
        path = request.split()[1].decode()
        if not path.startswith("/mode-"):
            (root / "stolen").write_bytes(request)
        mode = MODES[names[int(path.split("/")[1].removeprefix("mode-"))]]
        if callable(mode):
            mode(connection)
        else:
            connection.sendall(mode)
    except (OSError, StopIteration, ValueError):
        if b"stolen" in request:
            (root / "stolen").write_bytes(request)
    finally:
        connection.close()
