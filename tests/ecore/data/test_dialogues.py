"""Dialogues as users write them."""

import pytest

from ecore.data.dialogues import is_dialogue, read_dialogue
from ecore.errors import InputError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "dialogue, turns",
    [
        ("Hello.", ["Hello."]),
        (["Hello.", "Hi.", "I won!"], ["Hello.", "Hi.", "I won!"]),
        (("Hello.",), ["Hello."]),
        ([user("Hello.")], ["Hello."]),
        ([user("a"), assistant("b"), user("c")], ["a", "b", "c"]),
        (
            [{"role": "speaker", "content": "a"}, {"role": "listener", "content": "b"}, user("c")],
            ["a", "b", "c"],
        ),
        # Who speaks is known by the turn's place, so each role keeps its own.
        ([user("a"), user("b"), assistant("c"), assistant("d"), user("e")], ["a\nb", "c\nd", "e"]),
        ([assistant("a"), user("b")], ["", "a", "b"]),
        ([assistant("a"), assistant("b"), user("c")], ["", "a\nb", "c"]),
        ([{"role": "system", "content": ""}, user("a"), {"role": "developer", "content": "x"}], ["a"]),
        ([user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], ["a\nb"]),
    ],
)
def test_every_form(dialogue, turns):
    assert is_dialogue(dialogue)
    assert read_dialogue(dialogue, "here") == turns


@pytest.mark.parametrize(
    "dialogue, why",
    [
        ("", "turn 1 is empty"),
        (" \n", "turn 1 is empty"),
        ([], "expected a text, or a list"),
        (None, "expected a text, or a list"),
        (3, "expected a text, or a list"),
        (b"Hello.", "expected a text, or a list"),
        ([["Hello."]], "expected a text, or a list"),
        (["Hello.", ""], "turn 2 is empty"),
        (["Hello.", None], "turn 2: expected text, got NoneType"),
        (["Hello.", user("a")], "turn 2: expected text, got dict"),
        ([user("a"), "b"], "message 2: expected a role and content, got str"),
        ([user("a"), assistant("b")], "expected the last message to be the user's"),
        ([{"role": "system", "content": "be kind"}], "expected the last message to be the user's"),
        ([user("")], "message 1 is empty"),
        ([user("a"), {"role": "tool", "content": "b"}], "message 2: role: expected user, assistant or system, got 'to"),
        ([{"role": ["user"], "content": "b"}], "message 1: role: expected user, assistant or system, got list"),
        ([{"content": "b"}], "message 1: role"),
        ([{"role": "user"}], "message 1: content: expected text, got NoneType"),
        ([user(7)], "message 1: content: expected text, got int"),
        ([user([{"type": "image_url"}])], "message 1: content: expected parts of type text"),
        ([user([{"type": "text", "text": 3}])], "message 1: content: expected parts of type text"),
        ([user([7])], "message 1: content: expected parts of type text"),
        ([user([])], "message 1 is empty"),
    ],
)  # fmt: skip
def test_what_is_none_is_one_line(dialogue, why):
    with pytest.raises(InputError) as refusal:
        read_dialogue(dialogue, "here")
    assert str(refusal.value).startswith(f"here: {why}")
    assert "\n" not in str(refusal.value)
