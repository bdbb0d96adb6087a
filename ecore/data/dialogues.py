"""Dialogues as users write them: one text, a list of turns, or a list of messages with roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ecore.errors import InputError

SPEAKERS = ("user", "speaker")
LISTENERS = ("assistant", "listener")
UNREAD = ("system", "developer")
"""Roles of messages that are instructions, which no model here takes: they are left out."""

Dialogue = str | Sequence[str] | Sequence[Mapping[str, Any]]
"""One text of the speaker; or turns, the speaker's first and then in turn; or messages ``{"role", "content"}``."""


def is_dialogue(value: Any) -> bool:
    """Tell whether ``value`` is one dialogue, and not a list of dialogues: only its first item is looked at."""
    return isinstance(value, str) or (
        _is_list(value) and len(value) > 0 and isinstance(value[0], str | Mapping)
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def read_dialogue(dialogue: Any, where: str) -> list[str]:
    """Return the turns of a dialogue, the speaker's first and then in turn.

    Of messages, several of one role in a row are one turn; a dialogue that the listener begins has an empty turn first.

    Args:
        dialogue: a :data:`Dialogue`.
        where: names it in errors.

    Raises:
        InputError: it is none, has no turn or an empty one, or its last message is not the speaker's.
    """
    if isinstance(dialogue, str):
        dialogue = [dialogue]
    if not is_dialogue(dialogue):
        raise InputError(f"{where}: expected a text, or a list of turns or messages with at least one")
    if isinstance(dialogue[0], Mapping):
        return _turns_of_messages(dialogue, where)
    for number, turn in enumerate(dialogue, start=1):
        if not isinstance(turn, str):
            raise InputError(f"{where}: turn {number}: expected text, got {type(turn).__name__}")
        if not turn.strip():
            raise InputError(f"{where}: turn {number} is empty")
    return list(dialogue)


def _turns_of_messages(messages: Sequence[Any], where: str) -> list[str]:
    turns: list[str] = []
    speaks = False
    for number, message in enumerate(messages, start=1):
        place = f"{where}: message {number}"
        if not isinstance(message, Mapping):
            raise InputError(f"{place}: expected a role and content, got {type(message).__name__}")
        role = message.get("role")
        if not isinstance(role, str) or role not in SPEAKERS + LISTENERS + UNREAD:
            shown = repr(role[:40]) if isinstance(role, str) else type(role).__name__
            raise InputError(f"{place}: role: expected user, assistant or system, got {shown}")
        text = _content(message.get("content"), place)
        if role in UNREAD:
            continue
        if not text.strip():
            raise InputError(f"{place} is empty")
        if not turns and role in LISTENERS:
            turns.append("")  # the speaker's place: what the listener said stays the listener's
        if turns and speaks == (role in SPEAKERS) and turns[-1]:
            turns[-1] += f"\n{text}"
        else:
            turns.append(text)
        speaks = role in SPEAKERS
    if not speaks:
        raise InputError(f"{where}: expected the last message to be the user's")
    return turns


def _content(content: Any, place: str) -> str:
    """Return the text of a message: as text, or as a list of parts that are text."""
    if isinstance(content, str):
        return content
    if not _is_list(content):
        raise InputError(f"{place}: content: expected text, got {type(content).__name__}")
    parts = []
    for part in content:
        if (
            not isinstance(part, Mapping)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            raise InputError(f"{place}: content: expected parts of type text alone")
        parts.append(part["text"])
    return "\n".join(parts)
