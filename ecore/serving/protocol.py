"""Bodies of requests, read with care: OpenAI's chat completions and the server's own /emotions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ecore.data.dialogues import read_dialogue
from ecore.errors import InputError
from ecore.generation.decoding import METHODS, Decoding
from ecore.ranges import check_value
from ecore.serving.settings import LONGEST

LONGEST_MESSAGE = 16_384
"""Characters of one message; the model reads 512 words."""
LONGEST_DIALOGUE = 32_768
"""Characters of a dialogue that are read: of a longer one the latest turns."""
LONGEST_NAME = 256
"""Characters of a model's name, which is sent back."""

_SAMPLING = ("temperature", "top_p", "top_k")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ("", []),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "logprobs": (False,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
}
"""Parameters that would change the answer and that no model here has, with the values that change nothing."""


@dataclass(frozen=True)
class ChatRequest:
    """A request for an answer.

    Attributes:
        turns: of the dialogue, the user's first.
        decoding: how it is answered.
        model: the name that the client gave, if any.
        stream: send the words as they come.
        include_usage: with ``stream``, end with a chunk that counts words.
    """

    turns: list[str]
    decoding: Decoding
    model: str | None
    stream: bool
    include_usage: bool


def read_chat(body: Any, default: Decoding, longest: int = LONGEST) -> ChatRequest:
    """Read the body of POST /v1/chat/completions.

    Beyond OpenAI's parameters it takes ``top_k`` and the fields ``method``, ``beams``, ``length_penalty`` and
    ``no_repeat_ngram`` of :class:`Decoding`; its ``max_length`` is OpenAI's ``max_tokens``. Parameters that change no
    answer are not looked at.

    Args:
        body: a value of JSON.
        default: what a request does not give.
        longest: words that an answer has at most; a request for more gets these.

    Raises:
        InputError: one line that names the parameter and what was expected.
    """
    values = _object(body)
    for name, neutral in _NEUTRAL.items():
        if values.get(name) is not None and values[name] not in neutral:
            raise InputError(f"{name}: not supported; expected none, or {neutral[0]!r}")
    if "max_length" in values:
        raise InputError("max_length: not supported; expected max_tokens")
    options = values.get("stream_options", {})
    if not isinstance(options, Mapping):
        raise InputError("stream_options: expected an object")
    model = _value(values, "model", str)
    if model is not None and len(model) > LONGEST_NAME:
        raise InputError(f"model: expected at most {LONGEST_NAME} characters")
    return ChatRequest(
        _messages(values),
        _decoding(values, default, longest),
        model,
        bool(_value(values, "stream", bool)),
        bool(_value(options, "include_usage", bool)),
    )


def read_emotions(body: Any) -> tuple[list[str], bool]:
    """Read the body of POST /emotions, ``{"text": TEXT}`` or ``{"messages": [...]}``, perhaps with ``"edges": true``.

    Returns:
        The dialogue's turns, and whether the graph's edges are wanted.

    Raises:
        InputError: one line that names the parameter and what was expected.
    """
    values = _object(body)
    text = _value(values, "text", str)
    if (text is None) == ("messages" not in values):
        raise InputError("expected either text or messages")
    turns = _messages(values) if text is None else _bounded(read_dialogue(text, "text"), "text")
    return turns, bool(_value(values, "edges", bool))


def _object(body: Any) -> dict[str, Any]:
    """Return the members of ``body`` that are not null."""
    if not isinstance(body, dict):
        raise InputError("request body: expected an object")
    return {name: value for name, value in body.items() if value is not None}


def _messages(values: Mapping[str, Any]) -> list[str]:
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[0], dict):
        raise InputError("messages: expected a list of messages with at least one")
    return _bounded(read_dialogue(messages, "messages"), "messages")


def _bounded(turns: list[str], where: str) -> list[str]:
    """Return the latest turns that are read; in pairs, so that each stays its speaker's."""
    for turn in turns:
        if len(turn) > LONGEST_MESSAGE:
            raise InputError(
                f"{where}: expected at most {LONGEST_MESSAGE:,} characters of one speaker in a row"
            )
    begin, total = 0, sum(map(len, turns))
    while total > LONGEST_DIALOGUE:
        total -= len(turns[begin]) + len(turns[begin + 1])
        begin += 2
    return turns[begin:]


def _value(values: Mapping[str, Any], name: str, kind: type, field: str | None = None) -> Any:
    """Return a parameter, None where it is not given; ``field`` names the setting whose range it has."""
    value = values.get(name)
    if value is None:
        return None
    try:
        check_value(field or name, value, kind, METHODS if name == "method" else None)
    except InputError as error:
        raise InputError(f"{name}: {str(error).partition(': ')[2]}") from None
    return value


def _decoding(values: Mapping[str, Any], default: Decoding, longest: int) -> Decoding:
    method = _value(values, "method", str)
    temperature = values.get("temperature")
    if method != "sample" and isinstance(temperature, int | float) and temperature == 0:
        # OpenAI's way to ask for the likeliest words.
        temperature, method = None, method or ("greedy" if default.method == "sample" else default.method)
        values = {name: value for name, value in values.items() if name not in _SAMPLING}
    kinds: dict[str, type] = {"temperature": float, "top_p": float, "top_k": int}
    given = {name: _value(values, name, kind) for name, kind in kinds.items()}
    if method is None:
        neutral = given["temperature"] is None and given["top_p"] in (None, 1.0) and not given["top_k"]
        method = default.method if neutral else "sample"
    for name, kind in (("beams", int), ("length_penalty", float), ("no_repeat_ngram", int), ("seed", int)):
        given[name] = _value(values, name, kind)
    name = "max_completion_tokens" if "max_completion_tokens" in values else "max_tokens"
    wanted = values.get(name)
    if type(wanted) is int:  # more gets the longest, however much more
        values = {**values, name: min(longest, wanted)}
    length = _value(values, name, int, "max_length")
    given["max_length"] = min(longest, default.max_length if length is None else length)
    fields = dataclasses.asdict(default) | {"method": method}
    if method != "sample":
        fields |= {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
    return Decoding(**fields | {name: value for name, value in given.items() if value is not None})
