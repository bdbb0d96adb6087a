"""``ecore serve`` and ``ecore web``."""

from __future__ import annotations

import argparse
import os

from ecore.cli.common import add_answering, decoding_options, load
from ecore.config import add_arguments, overrides
from ecore.errors import InputError
from ecore.packages import needed

TOKEN = "ECORE_TOKEN"


def declare_serve(parser: argparse.ArgumentParser) -> None:
    """Answer over HTTP, as OpenAI's chat completions; requests that come together are answered together.

    POST /v1/chat/completions (streaming or not), GET /v1/models, GET and POST /emotions, GET /healthz and GET /metrics
    (Prometheus). The flags of decoding are what a request does not say. Where the environment variable ECORE_TOKEN is
    set, clients must send it as their API key. SIGTERM and Ctrl-C answer what was asked before they end the server.

    examples:
      ecore serve run
      ecore serve run --port 9000 --method beam
      ECORE_TOKEN=secret ecore serve run --host 0.0.0.0
      curl http://127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "My dog died."}]}'
    """
    declare_flags(parser)


def run_serve(arguments: argparse.Namespace) -> int:
    return _run(arguments, "serve", page=False)


def declare_web(parser: argparse.ArgumentParser) -> None:
    """Talk with a model in the browser: its answers word by word, the emotions that it perceives, and why.

    The page and all that it loads come from this server, which also answers as `ecore serve` does. It listens on this
    machine alone unless --host says else. Where the environment variable ECORE_TOKEN is set, open the page with
    #token=... behind its address.

    examples:
      ecore web run
      ecore web run --port 9000 --method beam
    """
    declare_flags(parser)


def run_web(arguments: argparse.Namespace) -> int:
    return _run(arguments, "web", page=True)


def declare_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of both commands."""
    from ecore.serving.settings import Serving

    add_answering(parser)
    add_arguments(parser.add_argument_group("serving"), Serving)


def _run(arguments: argparse.Namespace, command: str, page: bool) -> int:
    from ecore.serving.settings import Serving

    options = decoding_options(arguments)
    settings = Serving(**overrides(arguments, Serving))
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        needed(module, f"ecore {command}", f"'ecore[{command}]'")
    token = os.environ.get(TOKEN)
    if token is not None and (not token.isascii() or not token.isprintable() or not token.strip()):
        raise InputError(f"{TOKEN}: expected printable ASCII characters, or no such variable")
    from ecore.generation.decoding import Decoding
    from ecore.serving.server import serve, served_name

    serve(load(arguments), served_name(arguments.folder), settings, Decoding(**options), token, page)
    return 0
