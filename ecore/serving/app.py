"""The server's HTTP: OpenAI's chat completions, emotions, health, metrics and the page."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import importlib.resources
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ecore.errors import InputError
from ecore.files import parse_json
from ecore.generation.decoding import Decoding
from ecore.pipeline import ECore, Perception, Reply
from ecore.serving.batcher import Batcher, Closed, Event, Job, QueueFull
from ecore.serving.metrics import Metrics
from ecore.serving.protocol import ChatRequest, read_chat, read_emotions
from ecore.serving.settings import Serving

LARGEST_BODY = 256 * 1024
"""Bytes of a request."""
_LARGEST_READ = 64 * LARGEST_BODY
"""Bytes that are still read of a body that is too large, so that its sender gets to read the answer."""
BODY_SECONDS = 15.0
"""Seconds that a body may take to arrive."""
_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
STRONGEST = 8
"""Emotions whose edges are sent."""
_KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


def create_app(
    model: ECore,
    name: str,
    settings: Serving,
    decoding: Decoding,
    longest: int,
    token: str | None = None,
    page: bool = False,
) -> FastAPI:
    """Return the application.

    Args:
        model: answers.
        name: of the model, in ``/v1/models``.
        settings: how requests are batched and bounded.
        decoding: what a request does not say.
        longest: words that an answer has at most.
        token: what ``Authorization: Bearer`` must carry, but for ``/healthz`` and the page; None lets everybody in.
        page: serve the page for a browser, too.
    """
    metrics = Metrics()
    started = int(time.time())
    batcher: Batcher | None = None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        nonlocal batcher
        batcher = Batcher(model, settings, metrics, asyncio.get_running_loop())
        yield
        await asyncio.to_thread(batcher.close)

    async def authorized(request: Request) -> None:
        if token is None:
            return
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(
                401, "expected the server's token as Authorization: Bearer", {"WWW-Authenticate": "Bearer"}
            )

    def submitted(job: Job) -> Job:
        assert batcher is not None
        try:
            batcher.submit(job)
        except QueueFull as full:
            raise HTTPException(429, str(full), {"Retry-After": str(full.retry_after)}) from None
        except Closed:
            raise HTTPException(503, "the server is going down", {"Retry-After": "5"}) from None
        return job

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(_Counted, metrics=metrics)
    app.add_exception_handler(InputError, _bad_input)
    app.add_exception_handler(StarletteHTTPException, _refused)
    app.add_exception_handler(ClientDisconnect, _nobody)
    app.add_exception_handler(Exception, _failed)
    private = [Depends(authorized)]

    @app.post("/v1/chat/completions", dependencies=private)
    async def chat(request: Request) -> Response:
        asked = read_chat(await _body(request), decoding, longest)
        job = submitted(Job(asked.turns, asked.decoding, asked.stream))
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model or name,
        }
        if asked.stream:
            chunks = _chunks(_events(request, job), asked, head)
            return StreamingResponse(
                chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        reply = await _end(request, job)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": str(reply), "refusal": None},
            "logprobs": None,
            "finish_reason": _finish(reply),
        }
        return JSONResponse(
            head
            | {
                "object": "chat.completion",
                "choices": [choice],
                "usage": _usage(reply),
                "ecore": _emotions(reply),
            }
        )

    @app.get("/v1/models", dependencies=private)
    async def models() -> Any:
        return {"object": "list", "data": [_model(name, started)]}

    @app.get("/v1/models/{wanted:path}", dependencies=private)
    async def one_model(wanted: str) -> Any:
        if wanted != name:
            raise HTTPException(404, f"expected the model {name}")
        return _model(name, started)

    @app.get("/emotions", dependencies=private)
    async def names() -> Any:
        return {"emotions": [] if model.model.perceiver is None else list(model.model.vocabulary.emotions)}

    @app.post("/emotions", dependencies=private)
    async def emotions(request: Request) -> Any:
        turns, edges = read_emotions(await _body(request))
        if model.model.perceiver is None:
            raise HTTPException(404, "the model perceives no emotions")
        seen = await _end(request, submitted(Job(turns, None)))
        answer = _emotions(seen) | {
            "attention": _shares(seen.attention),
            "strategy": model.model.config.strategy,
        }
        return answer | {"graph": _graph(seen)} if edges else answer

    @app.get("/healthz")
    async def healthz() -> Any:
        return {"status": "ok"}

    @app.get("/metrics", dependencies=private)
    async def figures() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    if page:

        @app.get("/defaults", dependencies=private)
        async def defaults() -> Any:
            return dataclasses.asdict(decoding) | {"max_tokens": min(decoding.max_length, longest)}

        _add_page(app)
    return app


def _add_page(app: FastAPI) -> None:
    """Serve the files of ``page/``; the browser may load and run nothing else."""

    def served(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
        async def answer(_: Request) -> Response:
            return Response(content, media_type=media_type, headers=_PAGE_HEADERS)

        return answer

    folder = importlib.resources.files("ecore.serving") / "page"
    for path, (name, media_type) in _PAGE.items():
        app.add_route(path, served((folder / name).read_bytes(), media_type), methods=["GET"])


# Requests -------------------------------------------------------------------------------------------------------


async def _body(request: Request) -> Any:
    """Return the JSON of a request."""

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size <= LARGEST_BODY:
                parts.append(part)
            elif size > _LARGEST_READ:
                break
        if size > LARGEST_BODY:
            raise HTTPException(413, f"request body: expected at most {LARGEST_BODY:,} bytes")
        return b"".join(parts)

    try:
        content = await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"request body: expected within {BODY_SECONDS:g} s") from None
    return parse_json(content, "request body")


async def _events(request: Request, job: Job) -> AsyncIterator[Event]:
    """Yield what the batcher has to say of ``job``, until its end or until the client leaves."""

    async def client_leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    left = asyncio.ensure_future(client_leaves())
    waiting: asyncio.Task[Event] | None = None
    try:
        while True:
            waiting = asyncio.ensure_future(job.events.get())
            await asyncio.wait({waiting, left}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ClientDisconnect
            event = waiting.result()
            yield event
            if event.end is not None:
                return
    finally:
        job.cancelled = True  # of no effect once it is answered
        left.cancel()
        if waiting is not None:
            waiting.cancel()


async def _end(request: Request, job: Job) -> Any:
    """Return the :class:`Reply` or :class:`Perception` of ``job``."""
    async for event in _events(request, job):
        if isinstance(event.end, Exception):
            raise event.end if not isinstance(event.end, InputError) else RuntimeError(str(event.end))
        if event.end is not None:
            return event.end
    raise AssertionError("a job without an end")


# Answers --------------------------------------------------------------------------------------------------------


async def _chunks(
    events: AsyncIterator[Event], asked: ChatRequest, head: dict[str, Any]
) -> AsyncIterator[str]:
    """Yield an answer as server-sent events, in OpenAI's chunks."""
    head = head | {"object": "chat.completion.chunk"}

    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if asked.include_usage else {}
        return _sent(head | {"choices": [choice]} | usage | more)

    yield chunk({"role": "assistant", "content": ""})
    try:
        async for event in events:
            for word in event.words:
                yield chunk({"content": word})
            if isinstance(event.end, Exception):
                yield _sent(_error(500, "the answer failed"))
                return
            if isinstance(event.end, Reply):
                yield chunk({}, _finish(event.end), ecore=_emotions(event.end))
                if asked.include_usage:
                    yield _sent(head | {"choices": [], "usage": _usage(event.end)})
    except ClientDisconnect:
        return
    yield "data: [DONE]\n\n"


def _sent(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _finish(reply: Reply) -> str:
    return "stop" if reply.complete else "length"


def _usage(reply: Reply) -> dict[str, int]:
    return {
        "prompt_tokens": reply.context_length,
        "completion_tokens": reply.length,
        "total_tokens": reply.context_length + reply.length,
    }


def _emotions(seen: Reply | Perception) -> dict[str, Any]:
    return {"emotions": _shares(seen.emotions), "relevant": seen.relevant}


def _graph(seen: Perception) -> dict[str, Any] | None:
    """Return words' edges to the strongest emotions, and these before and after correlation; None without a graph."""
    if seen.word_edges is None or seen.before is None or seen.after is None or seen.perceived_before is None:
        return None
    strongest = seen.emotions[:STRONGEST]
    columns = [seen.names.index(name) for name, _ in strongest]
    return {
        "words": seen.words,
        "emotions": [name for name, _ in strongest],
        "word_edges": seen.word_edges[:, columns].tolist(),
        "signal_before": seen.before[columns].tolist(),
        "signal_after": seen.after[columns].tolist(),
        "perceived_before": seen.perceived_before[columns].tolist(),
        "perceived_after": [share for _, share in strongest],
    }


def _shares(shares: list[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"name": name, "share": share} for name, share in shares]


def _model(name: str, started: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": started, "owned_by": "ecore"}


# Errors ---------------------------------------------------------------------------------------------------------


def _error(status: int, message: str) -> dict[str, Any]:
    kind = _KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def _bad_input(_: Request, error: Exception) -> Response:
    return JSONResponse(_error(400, " ".join(str(error).split())), 400)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return JSONResponse(_error(error.status_code, str(error.detail)), error.status_code, error.headers)


async def _nobody(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's code for a client that left; nobody reads it but the metrics


async def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse(_error(500, "the server failed; its log says why"), 500)


class _Counted:
    """Middleware that counts requests and takes their time, until the last byte of the answer is sent."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.monotonic(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            # Paths that do not exist are one, or anybody could grow the table.
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.request_seconds.labels(path).observe(time.monotonic() - begin)
