"""A model's server, from its start to the last answer after SIGTERM."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from ecore.errors import InputError
from ecore.generation.decoding import Decoding
from ecore.pipeline import ECore
from ecore.serving.app import create_app
from ecore.serving.settings import LONGEST, Serving

DRAIN_SECONDS = 30
"""Seconds that running answers get after SIGTERM or Ctrl-C."""


def serve(
    model: ECore,
    name: str,
    settings: Serving,
    decoding: Decoding,
    token: str | None = None,
    page: bool = False,
) -> None:
    """Serve ``model`` until SIGTERM or SIGINT, then answer what was asked before and return.

    Args:
        model: answers.
        name: of the model, in ``/v1/models``.
        settings: where to listen, how requests are batched and bounded.
        decoding: what a request does not say.
        token: what clients must send as ``Authorization: Bearer``; None lets everybody in.
        page: serve the page for a browser, too.

    Raises:
        InputError: nothing can listen at the address, the model cannot answer, or answers may not be as long as
            ``decoding`` wants.
    """
    longest = longest_answer(model)
    if decoding.max_length > longest:
        raise InputError(
            f"max_length: expected at most {longest}, got {decoding.max_length}; a server's answers have no more"
        )
    model.respond("Hello.", max_length=2)  # a model that cannot answer should say so now
    with listening(settings.host, settings.port) as listener:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        where = "/ (in a browser)" if page else "/v1 (OpenAI's chat completions)"
        print(f"{name} answers at http://{shown}:{port}{where}; Ctrl-C stops it", flush=True)
        if token is None and not ipaddress.ip_address(host).is_loopback:
            print(
                f"anybody who reaches {shown} may ask: ECORE_TOKEN sets a token", file=sys.stderr, flush=True
            )
        logging.getLogger("ecore").addHandler(logging.StreamHandler())
        app = create_app(model, name, settings, decoding, longest, token, page)
        server = uvicorn.Server(server_config(app))
        # uvicorn raises the signals again that ended it: then there is nothing left to do.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        server.run(sockets=[listener])
    print("all requests are answered; goodbye", flush=True)


def server_config(app: object) -> uvicorn.Config:
    """Return uvicorn's settings: quiet, and patient with running answers when it ends."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        server_header=False,
    )


def longest_answer(model: ECore) -> int:
    """Return the words that an answer may have: :data:`LONGEST`, or as many as a backbone has positions for."""
    return min(LONGEST, model.model.most_response)


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        InputError: the address is none of this machine's, or the port is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=1024)
        # Connections inherit it. asyncio sets it only on sockets that name their protocol, which these do not; without
        # it the second packet of an answer waits until the client has acknowledged the first, 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"--host {host} --port {port}: cannot listen there ({why})") from None


def served_name(folder: Path) -> str:
    """Return the name of the model in ``folder``: the folder's own."""
    return folder.resolve().name or "ecore"
