"""Requests that come together, wait, leave or fail, over a real socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="the server needs the extra `serve`")

from ecore.pipeline import ECore  # noqa: E402
from tests.ecore.generation.dialogues import CONTEXTS, differing_model  # noqa: E402
from tests.ecore.serving.chats import HELLO, Gate, messages  # noqa: E402
from tests.ecore.serving.server import Server, serving, until  # noqa: E402


@pytest.fixture
def gate() -> Iterator[tuple[ECore, Gate]]:
    model = ECore(differing_model("soft"))
    gate = Gate(model, seconds=0.01)
    yield model, gate
    gate.opened.set()


def test_requests_that_come_together_are_answered_together(gate: tuple[ECore, Gate]) -> None:
    model, door = gate
    plain = ECore(differing_model("soft"))
    with serving(model, batch_size=8) as server, ThreadPoolExecutor(16) as pool:
        first = pool.submit(server.chat, HELLO)
        until(lambda: door.contexts == 1)
        bodies = [
            {"messages": messages(CONTEXTS[i % 4]), "method": "beam" if i < 4 else "greedy", "max_tokens": 4}
            for i in range(12)
        ]
        answers = [pool.submit(server.chat, body) for body in bodies]
        until(lambda: server.metric("ecore_waiting_requests") == 12)
        door.opened.set()
        assert first.result().status == 200
        for answer in answers:
            assert answer.result().status == 200
        # One alone, then one batch for each way of decoding; a batch is counted when its answers are out.
        until(lambda: server.metric("ecore_batch_size_count") == 3)
        assert server.metric("ecore_batch_size_sum") == 13
    assert plain.respond(CONTEXTS[0], max_length=8)


def test_each_of_many_gets_its_own_answer(server: Server, model: ECore) -> None:
    expected = [str(model.respond(context, max_length=8)) for context in CONTEXTS]
    assert len(set(expected)) > 1
    bodies = [{"messages": messages(CONTEXTS[i % 4]), "stream": i % 3 == 0} for i in range(60)]
    with ThreadPoolExecutor(20) as pool:
        for i, answer in enumerate(pool.map(server.chat, bodies)):
            if i % 3:
                text = answer.json["choices"][0]["message"]["content"]
            else:
                lines = answer.body.decode().split("\n\n")
                assert lines[-2:] == ["data: [DONE]", ""]
                chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
                text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
            assert text == expected[i % 4]


def test_a_full_queue_says_when_to_come_again(gate: tuple[ECore, Gate]) -> None:
    model, door = gate
    with serving(model, batch_size=1, queue=2) as server, ThreadPoolExecutor(4) as pool:
        running = pool.submit(server.chat, HELLO)
        until(lambda: door.contexts == 1)
        waiting = [pool.submit(server.chat, HELLO) for _ in range(2)]
        until(lambda: server.metric("ecore_waiting_requests") == 2)
        refused = server.chat(HELLO)
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json["error"]["type"] == "rate_limit_error"
        assert server.request("GET", "/healthz").status == 200
        door.opened.set()
        assert [answer.result().status for answer in (running, *waiting)] == [200, 200, 200]
        assert server.chat(HELLO).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_answer(gate: tuple[ECore, Gate], stream: bool) -> None:
    model, door = gate
    with serving(model, batch_size=1) as server:
        leaves = server.begin(HELLO | {"max_tokens": 250, "stream": stream})
        until(lambda: door.contexts == 1)
        waits = server.begin(HELLO | {"max_tokens": 250, "stream": stream})
        until(lambda: server.metric("ecore_waiting_requests") == 1)
        waits.close()  # it leaves while it waits: it is never read
        door.opened.set()
        until(lambda: door.steps > 3)
        leaves.close()
        until(lambda: server.metric("ecore_cancelled_total") == 2)
        assert door.steps < 200
        assert server.chat(HELLO | {"max_tokens": 2}).status == 200
        assert door.contexts == 2


def test_who_stays_gets_the_answer_that_others_left(gate: tuple[ECore, Gate]) -> None:
    model, door = gate
    with serving(model, wait_ms=500.0) as server, ThreadPoolExecutor(1) as pool:
        leaves = server.begin(HELLO | {"max_tokens": 60})
        stays = pool.submit(server.chat, {"messages": messages(CONTEXTS[1]), "max_tokens": 60})
        until(lambda: door.contexts == 2)
        door.opened.set()
        until(lambda: door.steps > 3)
        leaves.close()
        answer = stays.result().json
    expected = model.respond(CONTEXTS[1], max_length=60)
    assert answer["choices"][0]["message"]["content"] == expected


def test_one_that_fails_spoils_no_other(model: ECore, monkeypatch: pytest.MonkeyPatch) -> None:
    read = model.model.read

    def fragile(contexts: Any) -> Any:
        if any("explode" in turn for turns in contexts for turn in turns):
            raise RuntimeError("boom")
        return read(contexts)

    monkeypatch.setattr(model.model, "read", fragile)
    with serving(model, wait_ms=300.0) as server, ThreadPoolExecutor(4) as pool:
        bodies = [HELLO, {"messages": messages(["explode"])}, HELLO | {"stream": True}]
        good, bad, streamed = pool.map(server.chat, bodies)
        assert (good.status, bad.status, streamed.status) == (200, 500, 200)
        assert "boom" not in bad.body.decode()
        assert streamed.body.endswith(b"data: [DONE]\n\n")
        broken = server.chat({"messages": messages(["explode"]), "stream": True})
        assert b'"error"' in broken.body
        assert b"[DONE]" not in broken.body
