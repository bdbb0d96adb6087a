"""Malformed requests over a real socket: each is refused in JSON, and breaks nothing."""

from __future__ import annotations

import gc
import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="the server needs the extra `serve`")

from ecore.pipeline import ECore  # noqa: E402
from ecore.serving.app import LARGEST_BODY  # noqa: E402
from ecore.serving.batcher import Job  # noqa: E402
from tests.ecore.generation.dialogues import CONTEXTS  # noqa: E402
from tests.ecore.serving.chats import HELLO  # noqa: E402
from tests.ecore.serving.server import Server, until  # noqa: E402

MALFORMED = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"3",
    b'"text"',
    b"NaN",
    b"1e999",
    b'{"messages": 1e999}',
    b'{"temperature": 1e999, "messages": [{"role": "user", "content": "a"}]}',
    b'{"max_tokens": -1e999, "messages": [{"role": "user", "content": "a"}]}',
    b'{"seed": 1' + b"0" * 5000 + b', "messages": [{"role": "user", "content": "a"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "\\ud800", "content": "a"}]}',
    b'{"model": "\\udfff", "messages": [{"role": "user", "content": "a"}]}',
    b"\xff\xfe",
    b'{"messages": [{"role": "user", "content": "\xff"}]}',
    b"[" * 100_000,
    b'{"a":' * 20_000,
    b'{"messages": {"role": "user"}}',
    b'{"messages": [null]}',
    b'{"messages": [{"role": "user", "content": {"a": 1}}]}',
    b'{"messages": [{"role": "user", "content": [1e999]}]}',
    b'{"messages": [{"role": "user", "content": "  "}]}',
]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/emotions"])
@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: repr(body[:40]))
def test_malformed_bodies_are_refused_in_json(server: Server, path: str, body: bytes) -> None:
    answer = server.request("POST", path, body)
    assert answer.status == 400
    assert answer.headers["content-type"] == "application/json"
    error = answer.json["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert "\n" not in error["message"]


def test_a_thousand_broken_requests_break_nothing(server: Server, model: ECore) -> None:
    """Good bodies with bytes changed, cut, doubled, and members replaced by values of every kind."""
    chance = random.Random(0)
    values = [None, True, -1, 0, 10**30, 1.5, "", "x", "\x00", [], [[]], {}, {"a": []}, [None] * 3, "é" * 100]
    names = [
        "messages",
        "temperature",
        "top_p",
        "max_tokens",
        "seed",
        "stream",
        "model",
        "method",
        "stop",
        "n",
        "text",
    ]
    statuses = set()

    def broken() -> bytes:
        body: dict[str, Any] = {**HELLO, "temperature": 0.5, "max_tokens": 3, "stream": False}
        for name in chance.sample(names, 2):
            body[name] = chance.choice(values)
        data = json.dumps(body).encode()
        for _ in range(chance.randrange(4)):
            at = chance.randrange(len(data) + 1)
            cut = chance.randrange(9)
            data = (
                data[:at] + chance.choice([bytes([chance.randrange(256)]), b"", b"1e999"]) + data[at + cut :]
            )
        return data

    with ThreadPoolExecutor(4) as pool:
        for answer in pool.map(server.chat, [broken() for _ in range(1000)]):
            statuses.add(answer.status)
            if answer.status != 200:
                assert answer.json["error"]["message"]
    assert 400 in statuses
    assert statuses <= {200, 400}
    assert server.chat(HELLO).json["choices"][0]["message"]["content"] == model.respond(
        CONTEXTS[0], max_length=8
    )
    until(lambda: gc.collect() is not None and not any(type(o) is Job for o in gc.get_objects()))


def test_large_bodies_are_refused(server: Server) -> None:
    answer = server.chat(b'{"messages": "' + b"x" * LARGEST_BODY + b'"}')
    assert answer.status == 413
    assert answer.json["error"]["message"].startswith("request body: expected at most")


def test_paths_and_methods_that_do_not_exist_are_json_too(server: Server) -> None:
    assert server.request("GET", "/v1/nothing").status == 404
    wrong = server.request("GET", "/v1/chat/completions")
    assert wrong.status == 405
    assert wrong.json["error"]["message"]
    for path in ("/docs", "/redoc", "/openapi.json"):  # pages with scripts from elsewhere
        assert server.request("GET", path).status == 404
