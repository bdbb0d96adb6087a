"""Dialogues in every form, batches of them, answers word by word, conversations, and perception alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ecore import Conversation, ECore
from ecore.data.text import detokenize
from ecore.data.vocabulary import EOS
from ecore.errors import InputError
from ecore.generation.decoding import Decoding
from ecore.generation.search import generate
from ecore.generation.word_stream import WordStream
from ecore.model import ECore as Model
from ecore.pipeline import BATCH
from tests.ecore.generation.dialogues import CONTEXTS, real_batch
from tests.ecore.generation.streams import check_stream
from tests.ecore.generation.table import Table, make_batch

OPTIONS = [{}, {"method": "beam", "beams": 3}, {"method": "sample", "seed": 3}]


@pytest.fixture
def talker(real: Model) -> ECore:
    return ECore(real)


def test_forms_of_one_dialogue_have_one_answer(talker: ECore) -> None:
    turns = CONTEXTS[1]
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    answer = talker.respond(turns, max_length=8)
    assert talker.respond(messages, max_length=8) == answer
    assert talker.respond([messages], max_length=8) == [answer]
    assert talker.respond(turns[0], max_length=8) == talker.respond(turns[:1], max_length=8)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_is_answered_as_each_alone(talker: ECore, options: dict) -> None:
    many = [CONTEXTS[i % len(CONTEXTS)] for i in range(BATCH + 3)]
    replies = talker.respond(many, max_length=6, **options)
    alone = [talker.respond(context, max_length=6, **options) for context in CONTEXTS]
    assert len({str(reply) for reply in alone}) > 1
    for i, reply in enumerate(replies):
        expected = alone[i % len(CONTEXTS)]
        assert reply == expected
        assert reply.relevant == expected.relevant
        assert [name for name, _ in reply.emotions] == [name for name, _ in expected.emotions]
        assert (reply.length, reply.complete) == (expected.length, expected.complete)


def test_counts_of_an_answer(talker: ECore, real: Model) -> None:
    for context in CONTEXTS:
        (words,) = generate(real, real_batch(real, [context]), Decoding(max_length=9))
        reply = talker.respond(context, max_length=9)
        assert reply.length == len(words)
        assert reply.complete == (len(words) < 9)
        assert reply.context_length == int(real_batch(real, [context]).lengths[0]) - 1
    assert {talker.respond(c, max_length=9).complete for c in CONTEXTS} | {
        talker.respond(c, max_length=1).complete for c in CONTEXTS
    } == {True, False}


@pytest.mark.parametrize("wrong", [[], [[]], [["Hello."], []], [["Hello."], 3], 3, None, {"role": "user"}])
def test_what_is_no_dialogue_is_refused(talker: ECore, wrong: object) -> None:
    with pytest.raises(InputError, match=r"^respond: "):
        talker.respond(wrong)  # type: ignore[call-overload]


# Word by word ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_streamed_words_are_the_answer(talker: ECore, options: dict) -> None:
    for context in CONTEXTS:
        check_stream(talker, context, max_length=9, **options)


def test_the_first_word_comes_before_the_last_is_chosen(
    talker: ECore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = talker.respond(CONTEXTS[1], max_length=9)
    assert reply.length > 3
    steps = 0
    first_heard = threading.Event()
    step = talker.model.step

    def slow(*arguments: object) -> torch.Tensor:
        nonlocal steps
        steps += 1
        assert steps <= 3 or first_heard.wait(20)
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(talker.model, "step", slow)
    stream = talker.stream(CONTEXTS[1], max_length=9)
    first = next(stream)
    first_heard.set()
    assert first + "".join(stream) == reply


def test_who_leaves_early_stops_the_model(talker: ECore, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    step = talker.model.step

    def counted(*arguments: object) -> torch.Tensor:
        nonlocal steps
        steps += 1
        time.sleep(0.02)
        scores = step(*arguments)  # type: ignore[arg-type]
        scores[:, EOS] = -100.0
        return scores

    monkeypatch.setattr(talker.model, "step", counted)
    threads = threading.active_count()
    stream = talker.stream(CONTEXTS[0], max_length=500)
    next(stream)
    stream.close()
    assert steps < 50
    assert threading.active_count() == threads
    assert not talker.model.training


def test_a_failure_in_the_middle_reaches_who_listens(talker: ECore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("no power")

    monkeypatch.setattr(talker.model, "step", fails)
    with pytest.raises(RuntimeError, match="no power"):
        list(talker.stream(CONTEXTS[0]))


def test_bad_input_is_refused_before_the_first_word(talker: ECore) -> None:
    with pytest.raises(InputError, match=r"^stream: turn 1 is empty"):
        talker.stream("")
    with pytest.raises(InputError, match="beams"):
        talker.stream("Hello.", method="beam", beams=0)
    for ask in (talker.stream, talker.respond, lambda _, **options: Conversation(talker, **options)):
        with pytest.raises(
            InputError, match=r"^beam: no such option of decoding; expected one of method, beams, "
        ):
            ask("Hello.", beam=3)


class Words:
    """A vocabulary whose ids are places in a list."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def text(self, ids: list[int]) -> str:
        return detokenize(self.words[i - EOS - 1] for i in ids)


@given(
    st.lists(
        st.sampled_from([*"abi:;()[].,?!'$#%-", "n't", "'s", "``", "''", "can", "not", "...", "we"]),
        min_size=1,
    )
)
@example(["a", ":", ")", "b"])
@example(["a", ":", ")"])
@example([":", "(", ")", "a", ":"])
def test_streamed_words_are_the_text_whatever_the_marks(words: list[str]) -> None:
    vocabulary = Words(words)
    stream = WordStream(vocabulary)
    ids = [EOS + 1 + i for i in range(len(words))]
    heard = [word for i in [*ids, EOS] for word in stream.add(i)]
    answer = vocabulary.text(ids)
    assert answer.startswith("".join(heard))
    heard += stream.rest(answer)
    assert "".join(heard) == answer
    assert [word.strip() for word in heard] == answer.split()


# The watcher of a search ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["greedy", "sample"])
def test_a_watcher_hears_every_word(method: str) -> None:
    heard: dict[int, list[int]] = {row: [] for row in range(20)}

    def watch(rows: list[int], words: list[int]) -> tuple:
        for row, word in zip(rows, words, strict=True):
            heard[row].append(word)
        return ()

    decoding = Decoding(method, max_length=6, seed=1)
    answers = generate(Table(length=6, eos=1.0), make_batch(20), decoding, watch=watch)
    assert answers == generate(Table(length=6, eos=1.0), make_batch(20), decoding)
    for row, answer in enumerate(answers):
        assert heard[row][: len(answer)] == answer
        assert set(heard[row][len(answer) :]) <= {EOS}


@pytest.mark.parametrize("method", ["greedy", "sample", "beam"])
def test_answers_given_up_leave_the_batch_and_change_no_other(method: str) -> None:
    decoding = Decoding(method, max_length=12, seed=1)
    expected = generate(Table(length=12, eos=-3.0), make_batch(40), decoding)
    gone = set(range(0, 40, 2))
    calls = 0

    def watch(rows: list[int], words: list[int]) -> set[int]:
        nonlocal calls
        calls += 1
        return gone if calls == 2 else set()

    model = Table(length=12, eos=-3.0)
    answers = generate(model, make_batch(40), decoding, watch=watch)
    kept = [row for row in range(40) if row not in gone]
    assert [answers[row] for row in kept] == [expected[row] for row in kept]
    assert model.cache.stepped[-1] <= model.cache.stepped[0] * len(kept) * max(1, model.cache.width) / 40
    # When all are given up, nothing is stepped any more.
    model = Table(length=12, eos=-3.0)
    generate(model, make_batch(40), decoding, watch=lambda rows, words: rows)
    assert len(model.cache.stepped) <= 2


def test_without_a_seed_rows_of_one_context_differ(talker: ECore) -> None:
    replies = talker.respond([CONTEXTS[1]] * 8, method="sample", max_length=8)
    assert len(set(map(str, replies))) > 1
    same = talker.respond([CONTEXTS[1]] * 8, method="sample", seed=5, max_length=8)
    assert len(set(map(str, same))) == 1


# Conversations --------------------------------------------------------------------------------------------------


def test_a_conversation_keeps_its_turns(talker: ECore) -> None:
    talk = Conversation(talker, max_length=6)
    first = talk.say(CONTEXTS[1][0])
    second = talk.say(CONTEXTS[1][2])
    assert talk.turns == [CONTEXTS[1][0], first, CONTEXTS[1][2], second]
    assert talk.replies == [first, second]
    assert second == talker.respond([CONTEXTS[1][0], str(first), CONTEXTS[1][2]], max_length=6)
    assert talk.undo() == CONTEXTS[1][2]
    assert talk.turns == [CONTEXTS[1][0], first]
    streamed = "".join(talk.stream(CONTEXTS[1][2]))
    assert streamed == second
    assert talk.turns == [CONTEXTS[1][0], first, CONTEXTS[1][2], second]
    talk.reset()
    assert talk.turns == talk.replies == []
    assert talk.undo() is None


def test_what_fails_was_not_said(talker: ECore) -> None:
    talk = Conversation(talker, max_length=6)
    talk.say("I passed my exam!")
    before = list(talk.turns)
    with pytest.raises(InputError, match=r"turn 3 is empty"):
        talk.say("  ")
    with pytest.raises(InputError, match=r"turn 3 is empty"):
        talk.stream("  ")
    left = talk.stream("We won.")
    next(left)
    left.close()
    assert talk.turns == before
    assert len(talk.replies) == 1
    with pytest.raises(InputError, match="method"):
        Conversation(talker, method="guess")


# Perception alone -----------------------------------------------------------------------------------------------


def test_perception_is_the_replys(talker: ECore) -> None:
    perceptions = talker.perceive(CONTEXTS)
    for context, seen in zip(CONTEXTS, perceptions, strict=True):
        reply = talker.respond(context, max_length=2)
        assert [name for name, _ in seen.emotions] == [name for name, _ in reply.emotions]
        assert seen.relevant == reply.relevant
        assert sum(share for _, share in seen.attention) == pytest.approx(1.0)
        ranked = [name for name, _ in seen.attention]
        assert seen.relevant == ranked[: len(seen.relevant)]


def test_perception_in_a_batch_is_that_of_each_alone(talker: ECore) -> None:
    for context, seen in zip(CONTEXTS, talker.perceive(CONTEXTS), strict=True):
        (alone,) = talker.perceive([context])
        assert seen.words == alone.words
        assert seen.words[0] == "[CLS]"
        assert seen.word_edges.shape == (len(seen.words), len(seen.names))
        for name in ("word_edges", "emotion_edges", "before", "after", "perceived_before"):
            torch.testing.assert_close(getattr(seen, name), getattr(alone, name), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(seen.word_edges.sum(0), seen.before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen.emotion_edges @ seen.before, seen.after, rtol=1e-4, atol=1e-4)


def test_texts_are_texts_and_messages_one_dialogue(talker: ECore) -> None:
    first, second = CONTEXTS[0][0], CONTEXTS[2][0]
    one, two = talker.perceive([first, second])
    assert (one.words, two.words) == (talker.perceive(first).words, talker.perceive(second).words)
    messages = [{"role": "user", "content": first}]
    assert talker.perceive(messages).words == one.words
    assert talker.perceive([messages, [first]])[1].words == one.words
    for wrong in ([], "", [""], 3, [3]):
        with pytest.raises(InputError, match=r"^perceive: "):
            talker.perceive(wrong)


@pytest.fixture
def training(talker: ECore) -> Iterator[ECore]:
    talker.model.train()
    yield talker
    talker.model.eval()


def test_dropout_is_off_while_it_perceives(training: ECore) -> None:
    first, second = (training.perceive("I passed my exam!") for _ in range(2))
    assert first.emotions == second.emotions
    assert training.model.training


def test_to_moves_the_model_and_gives_it_back(talker: ECore) -> None:
    assert talker.to("cpu") is talker
    assert talker.to(torch.device("meta")).model.device.type == "meta"
