"""Checks of a streamed answer that hold for every model."""

from __future__ import annotations

from typing import Any

from ecore import ECore


def check_stream(talker: ECore, context: list[str], **options: Any) -> None:
    """Assert that the words of a streamed answer are those of the answer given at once, and its emotions the same."""
    reply = talker.respond(context, **options)
    stream = talker.stream(context, **options)
    words = []
    try:
        while True:
            words.append(next(stream))
    except StopIteration as stop:
        end = stop.value
    assert "".join(words) == reply == end
    assert end.emotions == reply.emotions
    assert [word.strip() for word in words] == reply.split()
