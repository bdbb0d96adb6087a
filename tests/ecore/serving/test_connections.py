"""Connections of the server: what the operating system is asked for."""

from __future__ import annotations

import socket

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is missing")

from ecore.serving.server import listening


def test_no_packet_waits_for_an_acknowledgement():
    with (
        listening("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
