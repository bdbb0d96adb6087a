"""The language model as annotator, against a server of the test's own that fails in every way."""

import contextlib
import json
import threading
import time

import pytest

from ecore.errors import InputError
from ecore.paper.annotation import endpoint
from ecore.paper.annotation.annotators import NoAnnotation
from ecore.paper.annotation.endpoint import ANSWERS, ATTEMPTS, REFUSALS
from ecore.paper.annotation.pipeline import annotate
from tests.ecore.paper.annotation.dialogues import EMOTIONS, conversation
from tests.ecore.paper.annotation.stub import asking, reply


def test_the_request_says_the_dialogue_and_not_its_label(stub, tmp_path):
    said = conversation("a", "grateful", "My dog died.", "Oh no.", "Yes.")
    asking(stub, tmp_path, key="k3y").annotate(said)
    asking(stub, tmp_path, model="other").annotate(said)
    (method, path, body, headers), (*_, other, keyless) = stub.requests
    assert (method, path) == ("POST", "/v1/chat/completions")
    assert (body["model"], body["temperature"], other["model"]) == ("m", 0, "other")
    assert headers["Authorization"] == "Bearer k3y"
    assert "Authorization" not in keyless
    system, user = body["messages"]
    assert user == {"role": "user", "content": "Speaker: My dog died.\nListener: Oh no.\nSpeaker: Yes."}
    assert system["role"] == "system"
    assert ", ".join(EMOTIONS) in system["content"]
    assert "secret" not in json.dumps(body)


@pytest.mark.parametrize(
    "text, emotions, unknown",
    [
        ('["sad", "afraid"]', ("sad", "afraid"), 0),
        ('Here: ```json\n[" Sad ", "AFRAID", "sad"]\n```', ("sad", "afraid"), 0),
        ('["sad", "gloomy"]', ("sad",), 1),
        ('<think>["joyful"] or [1, 2] or [?</think> ["sad"]', ("sad",), 0),
        ('{"emotions": ["sad"]}', ("sad",), 0),
        ("[]", (), 0),
        (
            f'["sad"] [{"1" * 5000}] \ud800',
            ("sad",),
            0,
        ),  # nothing that Python cannot read or write stops the work
    ],
)
def test_answers(stub, tmp_path, text, emotions, unknown):
    stub.answers = [reply(text)]
    annotator = asking(stub, tmp_path)
    assert annotator.annotate(conversation()) == emotions
    assert (len(stub.requests), annotator.unknown_names) == (1, unknown)


@pytest.mark.parametrize("text", ["sad", "", '["gloomy"]', "[1]", '["sad"', "[" * 5000])
def test_malformed_answers_are_asked_for_again_and_then_given_up(stub, tmp_path, text):
    stub.answers = [reply(text), reply('["joyful"]')]
    assert asking(stub, tmp_path).annotate(conversation()) == ("joyful",)
    stub.answers = [reply(text)]
    stub.requests.clear()
    with pytest.raises(NoAnnotation, match="malformed answer"):
        asking(stub, tmp_path).annotate(conversation("b", "sad", "Other.", "Words."))
    assert len(stub.requests) == ANSWERS
    # What was no answer is not kept.
    stub.answers = [reply('["sad"]')]
    assert asking(stub, tmp_path).annotate(conversation("b", "sad", "Other.", "Words.")) == ("sad",)


def hang_up(handler, body):
    handler.connection.close()


def cut_short(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')
    handler.close_connection = True


def dawdle(handler, body):
    time.sleep(0.8)
    return reply('["joyful"]')  # nobody waits for it any more


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {}, "slow down"),
        (408, {}, "too late"),
        (500, {}, ""),
        (503, {"Retry-After": "soon"}, ""),
        (200, {}, "<html>busy</html>"),
        (200, {}, '{"error": "overloaded"}'),
        (200, {}, '{"choices": []}'),
        hang_up,
        cut_short,
        dawdle,
    ],
)
def test_a_busy_server_is_asked_again(stub, tmp_path, trouble):
    stub.answers = [trouble] * (1 if trouble is dawdle else ATTEMPTS - 1) + [reply('["sad"]')]
    timeout = 0.3 if trouble is dawdle else 20
    assert asking(stub, tmp_path, timeout=timeout).annotate(conversation()) == ("sad",)
    assert len(stub.requests) > 1


def test_waits_double_and_a_server_may_ask_for_its_own(stub, tmp_path):
    stub.answers = [(500, {}, "")] * 3 + [(429, {"Retry-After": "0.5"}, ""), reply('["sad"]')]
    asking(stub, tmp_path, first_wait=0.02).annotate(conversation())
    waits = [after - before for before, after in zip(stub.times, stub.times[1:], strict=False)]
    assert waits[0] >= 0.015
    assert waits[1] >= 0.03
    assert waits[2] >= 0.06
    assert waits[3] >= 0.5


def test_a_broken_server_ends_the_work_and_loses_nothing(stub, tmp_path):
    stub.answers = [reply('["sad"]'), (502, {}, "")]
    annotator = asking(stub, tmp_path)
    conversations = [conversation("a"), conversation("b", "sad", "Other.", "Words.")]
    with pytest.raises(InputError, match="502 Bad Gateway, 6 times in a row"):
        annotate(conversations, annotator, progress=False)
    assert len(stub.requests) == 1 + ATTEMPTS
    stub.answers = [reply('["joyful"]')]
    labels, problems = annotate(conversations, asking(stub, tmp_path), progress=False)
    assert labels == {"a": ("sad",), "b": ("joyful",)}
    assert not problems
    assert len(stub.requests) == 2 + ATTEMPTS


@pytest.mark.parametrize(
    "text, labels",
    [
        ('Not ["sad"], rather: ["joyful"]', ("joyful",)),
        ('["sad", "wistful"]', ("sad",)),
        ("None at all: []", ()),
    ],
)
def test_the_last_list_counts(stub, tmp_path, text, labels):
    stub.answers = [reply(text)]
    assert asking(stub, tmp_path).annotate(conversation()) == labels


@pytest.mark.parametrize(
    "text",
    [
        '["sad", "afraid"] Others considered: []',
        'Could be ["sad"], but no: []',
        'Choices: ["afraid", "joyful"]. Answer: ["melancholy"]',
    ],
)
def test_an_answer_that_takes_itself_back_is_asked_for_again(stub, tmp_path, text):
    stub.answers = [reply(text), reply('["joyful"]')]
    assert asking(stub, tmp_path).annotate(conversation()) == ("joyful",)


def test_a_refusal_that_breaks_off_is_still_one(stub, tmp_path):
    def torn(handler, _):
        handler.send_response(400)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"ff\r\ntoo lo")
        handler.close_connection = True

    stub.answers = [torn]
    with pytest.raises(NoAnnotation, match="refused with 400"):
        asking(stub, tmp_path).annotate(conversation())


@pytest.mark.parametrize("status, hint", [(401, "the key"), (403, "the key"), (404, "--url and --model")])
def test_what_no_request_can_pass_ends_the_work_at_once(stub, tmp_path, status, hint):
    stub.answers = [(status, {}, "who\nare you")]
    with pytest.raises(InputError) as error:
        asking(stub, tmp_path).annotate(conversation())
    assert f"check {hint}; it says: who are you" in str(error.value)
    assert len(stub.requests) == 1


def drip(content, pause):
    """A reply that comes byte by byte: its status line, its headers, its body."""

    def send(handler, _):
        handler.close_connection = True
        with contextlib.suppress(OSError):
            for byte in content:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                time.sleep(pause)

    return send


@pytest.mark.parametrize(
    "content",
    [
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50,
        b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + b" " * 400,
    ],
)
def test_a_request_has_a_deadline(stub, tmp_path, content, monkeypatch):
    monkeypatch.setattr(endpoint, "ATTEMPTS", 1)
    stub.answers = [drip(content, 0.05)]
    began = time.monotonic()
    with pytest.raises(InputError, match=r"no whole reply in 0\.3 seconds"):
        asking(stub, tmp_path, timeout=0.3).annotate(conversation())
    assert time.monotonic() - began < 5


def test_a_reply_has_a_longest_size(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "ATTEMPTS", 1)
    monkeypatch.setattr(endpoint, "LONGEST_REPLY", 1000)
    stub.answers = [reply('["sad"]' + " " * 2000)]
    with pytest.raises(InputError, match="over 1,000 bytes"):
        asking(stub, tmp_path).annotate(conversation())


@pytest.mark.parametrize(
    "body",
    [
        "[" * 10**5, "9" * 5000, '{"choices": NaN}', "[]", "null", '{"choices": [{"message": {"content": 3}}]}',
        '{"choices": {"0": 1}}', '{"choices": [{"message": {"content": ["sad"]}}]}', "\ufeff", "<html></html>",
    ],
)  # fmt: skip
def test_replies_that_are_no_answers(stub, tmp_path, body, monkeypatch):
    monkeypatch.setattr(endpoint, "ATTEMPTS", 1)
    stub.answers = [(200, {}, body)]
    with pytest.raises(InputError, match=r"^[^\n]*broken answer[^\n]*$"):
        asking(stub, tmp_path).annotate(conversation())


def test_a_refused_dialogue_is_a_problem_of_its_own(stub, tmp_path):
    stub.answers = [reply('["sad"]'), (400, {}, "filtered")]
    conversations = [conversation(str(i), "sad", f"Words {i}.", "Yes.") for i in range(REFUSALS + 3)]
    labels, problems = annotate(conversations, asking(stub, tmp_path), progress=False)
    assert list(labels) == ["0"]
    assert len(problems) == REFUSALS + 2
    assert problems["1"] == "refused with 400: filtered"


def test_refusals_alone_end_the_work(stub, tmp_path):
    stub.answers = [(400, {}, "no such model")]
    conversations = [conversation(str(i), "sad", f"Words {i}.", "Yes.") for i in range(REFUSALS + 3)]
    with pytest.raises(InputError, match="no such model"):
        annotate(conversations, asking(stub, tmp_path), progress=False)
    assert len(stub.requests) == REFUSALS


def test_answers_are_kept_for_the_same_question_alone(stub, tmp_path):
    said = conversation("a", "sad", "My dog died.", "Oh no.")
    stub.answers = [reply('["sad"]'), reply('["joyful"]'), reply('["afraid"]')]
    assert asking(stub, tmp_path).annotate(said) == ("sad",)
    assert asking(stub, tmp_path).annotate(said) == ("sad",)
    assert asking(stub, tmp_path, model="other").annotate(said) == ("joyful",)
    assert asking(stub, tmp_path).annotate(conversation("a", "sad", "My cat died.", "Oh no.")) == ("afraid",)
    assert len(stub.requests) == 3


def test_a_torn_last_answer_is_asked_for_again(stub, tmp_path):
    first, second = conversation("a"), conversation("b", "sad", "Other.", "Words.")
    annotate([first, second], asking(stub, tmp_path), progress=False)
    cache = tmp_path / "answers.jsonl"
    cache.write_bytes(cache.read_bytes()[:-5])
    assert annotate([first, second], asking(stub, tmp_path), progress=False)[1] == {}
    assert len(stub.requests) == 3
    assert annotate([first, second], asking(stub, tmp_path), progress=False)[1] == {}
    assert len(stub.requests) == 3
    cache.write_text(cache.read_text() + '{"key": 1}\n')
    with pytest.raises(InputError, match=r"answers.jsonl:3: not an answer"):
        asking(stub, tmp_path)


def test_many_at_once_give_the_same_in_the_same_order(stub, tmp_path):
    together = threading.Barrier(4)

    def echo(handler, body):
        together.wait(20)  # breaks unless four requests are under way at once
        return reply(json.dumps([EMOTIONS[int(body["messages"][1]["content"].split()[2]) % 4]]))

    stub.answers = [echo]
    conversations = [conversation(str(i), "sad", f"Words {i} .", "Yes.") for i in range(24)]
    labels, problems = annotate(conversations, asking(stub, tmp_path), jobs=4, progress=False)
    assert not problems
    assert list(labels.items()) == [(str(i), (EMOTIONS[i % 4],)) for i in range(24)]
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["conv_id"] for line in lines) == sorted(labels)


def test_a_stop_ends_every_wait(stub, tmp_path):
    stub.answers = [(503, {}, "")]
    stopped = threading.Event()
    annotator = asking(stub, tmp_path, stopped=stopped, first_wait=100.0)
    conversations = [conversation(str(i), "sad", f"Words {i}.", "Yes.") for i in range(3)]
    threading.Timer(0.3, stopped.set).start()
    began = time.monotonic()
    labels, problems = annotate(conversations, annotator, jobs=2, stopped=stopped, progress=False)
    assert time.monotonic() - began < 50
    assert not labels
    assert set(problems.values()) == {"stopped"}
