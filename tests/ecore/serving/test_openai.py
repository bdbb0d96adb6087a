"""The server as the package openai sees it: answers, streams, options, errors, tokens."""

from __future__ import annotations

from typing import Any

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="the server needs the extra `serve`")

from ecore.pipeline import ECore  # noqa: E402
from tests.ecore.generation.dialogues import CONTEXTS  # noqa: E402
from tests.ecore.serving.chats import HELLO, messages  # noqa: E402
from tests.ecore.serving.server import Server, serving  # noqa: E402


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
