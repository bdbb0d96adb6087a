"""Bodies of requests: what a parameter means, and what is refused."""

from dataclasses import fields

import pytest

from ecore.errors import InputError
from ecore.generation.decoding import Decoding
from ecore.serving.protocol import LONGEST_DIALOGUE, LONGEST_MESSAGE, read_chat, read_emotions

HELLO = {"messages": [{"role": "user", "content": "Hello."}]}


@pytest.mark.parametrize(
    "given, decoding",
    [
        ({}, Decoding()),
        ({"temperature": 0}, Decoding()),
        ({"temperature": 0.0, "top_p": 0.5}, Decoding()),
        ({"temperature": 1}, Decoding("sample")),
        ({"temperature": 0.7, "seed": 3}, Decoding("sample", temperature=0.7, seed=3)),
        ({"top_p": 0.9}, Decoding("sample", top_p=0.9)),
        ({"top_p": 1}, Decoding()),
        ({"top_k": 0}, Decoding()),
        ({"top_k": 5}, Decoding("sample", top_k=5)),
        ({"method": "beam", "beams": 2, "length_penalty": 0.5}, Decoding("beam", beams=2, length_penalty=0.5)),
        ({"method": "beam", "temperature": 0}, Decoding("beam")),
        ({"method": "sample"}, Decoding("sample")),
        ({"max_tokens": 7}, Decoding(max_length=7)),
        ({"max_tokens": 7, "max_completion_tokens": 9}, Decoding(max_length=9)),
        ({"max_tokens": 4096}, Decoding(max_length=256)),
        ({"max_tokens": 10**30}, Decoding(max_length=256)),
        ({"no_repeat_ngram": 3}, Decoding(no_repeat_ngram=3)),
        ({"max_tokens": None, "temperature": None, "seed": None, "stop": None, "tools": None}, Decoding()),
        ({"n": 1, "stop": [], "logprobs": False, "response_format": {"type": "text"}}, Decoding()),
        ({"frequency_penalty": 0, "presence_penalty": 0.0, "tool_choice": "auto"}, Decoding()),
        ({"user": "me", "store": False, "metadata": {"a": "b"}}, Decoding()),
    ],
    ids=str,
)  # fmt: skip
def test_parameters(given, decoding):
    assert read_chat(HELLO | given, Decoding()).decoding == decoding


def test_what_a_request_does_not_say_is_the_servers():
    default = Decoding("sample", top_p=0.9, temperature=0.8, max_length=12)
    assert read_chat(HELLO, default).decoding == default
    assert read_chat(HELLO | {"method": "greedy"}, default).decoding == Decoding(max_length=12)
    assert read_chat(HELLO | {"temperature": 0}, default).decoding == Decoding(max_length=12)
    assert read_chat(HELLO | {"temperature": 2}, default).decoding.top_p == 0.9
    assert read_chat(HELLO | {"temperature": 0}, Decoding("beam", beams=2)).decoding == Decoding(
        "beam", beams=2
    )
    assert read_chat(HELLO | {"temperature": 0.5}, Decoding("beam")).decoding.method == "sample"


def test_the_rest_of_a_request():
    asked = read_chat(
        HELLO | {"model": "any/name", "stream": True, "stream_options": {"include_usage": True}}, Decoding()
    )
    assert (asked.turns, asked.model, asked.stream, asked.include_usage) == (
        ["Hello."],
        "any/name",
        True,
        True,
    )
    plain = read_chat(HELLO, Decoding())
    assert (plain.model, plain.stream, plain.include_usage) == (None, False, False)


@pytest.mark.parametrize(
    "given, why",
    [
        ({"n": 2}, "n: not supported"),
        ({"stop": ["\n"]}, "stop: not supported"),
        ({"tools": [{}]}, "tools: not supported"),
        ({"logprobs": True}, "logprobs: not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format: not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty: not supported"),
        ({"temperature": -1}, "temperature: expected a number over 0"),
        ({"temperature": 10**400}, "temperature: expected a number over 0"),
        ({"temperature": "hot"}, "temperature: expected a number, got 'hot'"),
        ({"temperature": True}, "temperature: expected a number, got True"),
        ({"temperature": 0, "method": "sample"}, "temperature: expected a number over 0"),
        ({"temperature": 0.5, "method": "beam"}, "temperature: only for method 'sample'"),
        ({"top_p": 0}, "top_p: expected a number over 0"),
        ({"top_k": 1.5}, "top_k: expected a whole number"),
        ({"method": "guess"}, "method: expected one of greedy, beam, sample"),
        ({"method": "beam", "beams": 10**9}, "beams: expected at most"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1"),
        ({"max_tokens": 1.0}, "max_tokens: expected a whole number"),
        ({"max_completion_tokens": []}, "max_completion_tokens: expected a whole number"),
        ({"seed": -1}, "seed: expected a number in"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram: expected at least 0"),
        ({"max_length": 5}, "max_length: not supported; expected max_tokens"),
        ({"stream": "yes"}, "stream: expected true or false"),
        ({"stream_options": 3}, "stream_options: expected an object"),
        ({"stream_options": {"include_usage": 1}}, "include_usage: expected true or false"),
        ({"model": 3}, "model: expected text"),
        ({"model": "x" * 300}, "model: expected at most"),
        ({"messages": None}, "messages: expected a list of messages"),
        ({"messages": "Hello."}, "messages: expected a list of messages"),
        ({"messages": ["Hello."]}, "messages: expected a list of messages"),
        ({"messages": []}, "messages: expected a list of messages"),
        (
            {"messages": [{"role": "user", "content": "x" * (LONGEST_MESSAGE + 1)}]},
            "messages: expected at most 16,384",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_used_is_one_line(given, why):
    with pytest.raises(InputError) as refusal:
        read_chat(HELLO | given, Decoding())
    assert str(refusal.value).startswith(why)
    assert "\n" not in str(refusal.value)


def test_of_a_long_dialogue_the_latest_turns_are_read():
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": f"{i} " + "x" * 9000} for i in range(9)]
    turns = read_chat({"messages": messages}, Decoding()).turns
    assert [turn.split()[0] for turn in turns] == ["6", "7", "8"]
    assert sum(map(len, turns)) <= LONGEST_DIALOGUE


def test_emotions():
    assert read_emotions({"text": "Hello."}) == (["Hello."], False)
    assert read_emotions(HELLO | {"edges": True}) == (["Hello."], True)
    for wrong in (
        {},
        {"text": "a", **HELLO},
        {"text": ""},
        {"text": 3},
        {"text": "x" * 20_000},
        {"text": "a", "edges": 1},
        [],
        None,
    ):
        with pytest.raises(InputError):
            read_emotions(wrong)


def test_every_setting_of_decoding_is_read_or_refused():
    """The protocol ignores no parameter that would change an answer."""
    for name in (field.name for field in fields(Decoding)):
        with pytest.raises(InputError, match=name):
            read_chat(HELLO | {name: []}, Decoding())
