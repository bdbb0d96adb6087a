"""The server over a real socket: emotions, health, metrics, its start and its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="the server needs the extra `serve`")

from ecore import pretrained  # noqa: E402
from ecore.errors import InputError  # noqa: E402
from ecore.generation.decoding import Decoding  # noqa: E402
from ecore.pipeline import ECore  # noqa: E402
from ecore.serving.server import listening, serve  # noqa: E402
from ecore.serving.settings import Serving  # noqa: E402
from tests.ecore.generation.dialogues import CONTEXTS, differing_model  # noqa: E402
from tests.ecore.serving.chats import HELLO  # noqa: E402
from tests.ecore.serving.server import Server, serving, until  # noqa: E402

ROOT = Path(__file__).parents[3]


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


def test_longer_answers_than_a_server_gives_are_refused() -> None:
    with pytest.raises(InputError, match="max_length: expected at most 256, got 300; a server's answers"):
        serve(ECore(differing_model("soft")), "name", Serving(port=0), Decoding(max_length=300))


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
