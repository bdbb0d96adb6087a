"""The server over a real socket: the openai client, batches, bounds, clients that leave, malformed requests."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="the server needs the extra `serve`")

from ecore import pretrained  # noqa: E402
from ecore.data.vocabulary import EOS  # noqa: E402
from ecore.errors import InputError  # noqa: E402
from ecore.generation.decoding import Decoding  # noqa: E402
from ecore.pipeline import ECore  # noqa: E402
from ecore.serving.app import LARGEST_BODY  # noqa: E402
from ecore.serving.batcher import Job  # noqa: E402
from ecore.serving.server import listening  # noqa: E402
from tests.ecore.generation.dialogues import CONTEXTS, differing_model  # noqa: E402
from tests.ecore.serving.server import Server, serving, until  # noqa: E402

ROOT = Path(__file__).parents[3]
ROLES = ("user", "assistant")


@pytest.fixture(scope="module")
def model() -> ECore:
    return ECore(differing_model("soft"))


@pytest.fixture(scope="module")
def server(model: ECore) -> Iterator[Server]:
    with serving(model) as server:
        yield server


def messages(turns: list[str]) -> list[dict[str, str]]:
    return [{"role": ROLES[i % 2], "content": turn} for i, turn in enumerate(turns)]


HELLO = {"messages": messages(CONTEXTS[0])}


class Gate:
    """Holds the model at each step until it is opened; a word takes ``seconds`` then, and no answer ends early."""

    def __init__(self, model: ECore, seconds: float = 0.0) -> None:
        self.opened, self.steps, self.contexts = threading.Event(), 0, 0
        step, read = model.model.step, model.model.read

        def gated(*arguments: Any) -> torch.Tensor:
            assert self.opened.wait(30)
            self.steps += 1
            time.sleep(seconds)
            scores = step(*arguments)
            scores[:, EOS] = -100.0
            return scores

        def counted(contexts: Any) -> Any:
            self.contexts += len(contexts)
            return read(contexts)

        model.model.step, model.model.read = gated, counted  # type: ignore[method-assign]


@pytest.fixture
def gate() -> Iterator[tuple[ECore, Gate]]:
    model = ECore(differing_model("soft"))
    gate = Gate(model, seconds=0.01)
    yield model, gate
    gate.opened.set()


# The openai client ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    openai = pytest.importorskip("openai", reason="the client's tests need the package openai")
    with openai.OpenAI(base_url=server.base_url, api_key="anything", max_retries=0) as client:
        yield client


def test_openai_gets_the_models_answer(client: Any, model: ECore) -> None:
    for context in CONTEXTS:
        reply = model.respond(context, max_length=8)
        answer = client.chat.completions.create(model="any-name", messages=messages(context))
        assert answer.choices[0].message.content == reply
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == ("stop" if reply.complete else "length")
        assert answer.model == "any-name"
        assert answer.usage.prompt_tokens == reply.context_length
        assert answer.usage.completion_tokens == reply.length
        seen = answer.model_extra["ecore"]
        assert seen["relevant"] == reply.relevant
        assert [emotion["name"] for emotion in seen["emotions"]] == [name for name, _ in reply.emotions]


def test_openai_streams_word_by_word(client: Any, model: ECore) -> None:
    for context in CONTEXTS:
        reply = model.respond(context, max_length=8)
        chunks = list(
            client.chat.completions.create(
                model="m", messages=messages(context), stream=True, stream_options={"include_usage": True}
            )
        )
        *words, usage = chunks
        texts = [c.choices[0].delta.content for c in words if c.choices[0].delta.content]
        assert "".join(texts) == reply
        assert [text.strip() for text in texts] == str(reply).split()
        assert words[0].choices[0].delta.role == "assistant"
        assert [c.choices[0].finish_reason for c in words if c.choices[0].finish_reason] == [
            "stop" if reply.complete else "length"
        ]
        assert words[-1].model_extra["ecore"]["relevant"] == reply.relevant
        assert usage.choices == []
        assert usage.usage.completion_tokens == reply.length
        assert len({c.id for c in chunks}) == 1


def test_openai_options(client: Any, model: ECore) -> None:
    turns = CONTEXTS[1]
    beam = client.chat.completions.create(
        model="m", messages=messages(turns), extra_body={"method": "beam", "beams": 3}, max_tokens=5
    )
    assert beam.choices[0].message.content == model.respond(turns, method="beam", beams=3, max_length=5)
    drawn = client.chat.completions.create(model="m", messages=messages(turns), temperature=2.0, seed=4)
    assert drawn.choices[0].message.content == model.respond(
        turns, method="sample", temperature=2.0, seed=4, max_length=8
    )


def test_openai_models(client: Any) -> None:
    (served,) = client.models.list().data
    assert client.models.retrieve(served.id).id == "tiny"


def test_openai_raises_its_own_errors(client: Any) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="temperature: expected a number"):
        client.chat.completions.create(model="m", messages=HELLO["messages"], temperature=-1)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_a_token_is_asked_for(model: ECore) -> None:
    openai = pytest.importorskip("openai", reason="the client's tests need the package openai")
    with serving(model, token="secret") as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer é"},
        ):
            for method, path in (
                ("POST", "/v1/chat/completions"),
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
            ):
                answer = server.request(method, path, HELLO if method == "POST" else None, headers)
                assert answer.status == 401
                assert "token" in answer.json["error"]["message"]
        assert server.request("GET", "/healthz").status == 200
        with openai.OpenAI(base_url=server.base_url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
            assert client.with_options(api_key="secret").models.list().data[0].id == "tiny"


# Emotions, health, metrics --------------------------------------------------------------------------------------


def test_emotions(server: Server, model: ECore) -> None:
    assert server.request("GET", "/emotions").json["emotions"] == list(model.model.vocabulary.emotions)
    seen = model.perceive(CONTEXTS[0][0])
    for body in ({"text": CONTEXTS[0][0]}, HELLO):
        answer = server.request("POST", "/emotions", body).json
        assert [emotion["name"] for emotion in answer["emotions"]] == [name for name, _ in seen.emotions]
        assert [emotion["share"] for emotion in answer["attention"]] == pytest.approx(
            [s for _, s in seen.attention]
        )
        assert answer["relevant"] == seen.relevant


def test_health_and_metrics(server: Server) -> None:
    assert server.request("GET", "/healthz").json == {"status": "ok"}
    before = server.metric("ecore_words_total")
    length = server.chat(HELLO).json["usage"]["completion_tokens"]
    assert server.metric("ecore_words_total") == before + length
    known = server.metric("ecore_requests_total")
    for i in range(20):
        server.request("GET", f"/nothing/{i}")
    assert server.metric("ecore_requests_total") >= known + 20
    body = server.request("GET", "/metrics").body.decode()
    assert 'path="other",status="404"' in body
    assert "/nothing" not in body  # or anybody could grow the table


# Batches --------------------------------------------------------------------------------------------------------


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
        # One alone, then one batch for each way of decoding.
        assert server.metric("ecore_batch_size_count") == 3
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


# Malformed requests ---------------------------------------------------------------------------------------------

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


# Start and end --------------------------------------------------------------------------------------------------


def test_sigterm_answers_what_was_asked(tmp_path: Path) -> None:
    pretrained.save(differing_model("soft").float(), tmp_path / "small")
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-m", "ecore", "serve", str(tmp_path / "small"), "--port", "0", "--wait-ms", "1500"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("small answers at http://127.0.0.1:")
        server = Server(int(line.split(":")[2].split("/")[0]))
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(server.chat, HELLO | {"stream": stream}) for stream in (False, True)]
            until(lambda: server.metric("ecore_waiting_requests") == 2)
            process.send_signal(signal.SIGTERM)
            plain, streamed = (answer.result() for answer in asked)
        assert plain.json["choices"][0]["message"]["content"]
        assert streamed.body.endswith(b"data: [DONE]\n\n")
        assert process.wait(30) == 0
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", server.port), timeout=5)
    finally:
        process.kill()
        process.wait()


def test_an_address_that_cannot_be_listened_at_is_one_line() -> None:
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"^--host 127.0.0.1 --port {port}: cannot listen there \("):
            listening("127.0.0.1", port)
    for host in ("no.such.host.invalid", "198.51.100.7", "a" * 70):
        with pytest.raises(InputError, match="cannot listen there"):
            listening(host, 0)


def test_defaults_are_the_commands(model: ECore) -> None:
    with serving(model, Decoding("beam", beams=2, max_length=3)) as server:
        answer = server.chat(HELLO).json["choices"][0]["message"]["content"]
    assert answer == model.respond(CONTEXTS[0], method="beam", beams=2, max_length=3)
