"""Calls in a forked child, which must neither hang nor answer differently."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest


def _send(sender: Connection, work: Callable[[], Any]) -> None:
    sender.send(work())


def in_forked_child(work: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Return what ``work`` returns in a forked child; the test fails where no answer comes in time."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, work))
    child.start()
    answered = receiver.poll(seconds)
    answer = receiver.recv() if answered else None
    child.kill()
    child.join()
    assert answered, "the forked child hung"
    return answer


needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)
