"""Talking with a run that has a GPT-2 backbone: from Python, in the terminal, over HTTP and on the page."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecore import Conversation, ECore
from ecore.cli import main
from ecore.config import TrainingConfig
from ecore.data.prepare import prepare
from ecore.data.prepared import PreparedData
from ecore.data.vocabulary import EOS
from ecore.demo import sample_corpus
from ecore.errors import InputError
from ecore.generation.word_stream import WordStream
from ecore.training.trainer import train
from tests.ecore.generation.dialogues import CONTEXTS
from tests.ecore.generation.streams import check_stream
from tests.ecore.model.gpt2.tiny import TINY

pytest.importorskip("transformers", reason="needs the extra `pretrained`")

from ecore.data.subwords.vocabulary import OFFSET
from ecore.model.gpt2 import GPT2ECore

OPTIONS = [{}, {"method": "beam", "beams": 3}, {"method": "sample", "seed": 3}]
TURNS = CONTEXTS[1]


@pytest.fixture(scope="module")
def run(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on the sample corpus, which has all 32 emotions."""
    folder = tmp_path_factory.mktemp("talking")
    prepare(sample_corpus(), folder / "prepared", progress=False)
    config = dataclasses.replace(TINY, backbone=str(gpt2_folder))
    steps = TrainingConfig(batch_size=4, max_steps=2, warmup=2, validate_every=10, checkpoint_every=2)
    train(folder / "run", PreparedData.load(folder / "prepared"), config, steps, progress=False)
    return folder / "run"


@pytest.fixture(scope="module")
def talker(run: Path) -> ECore:
    """The run's model: in float64, so that rounding decides nothing, and with weights that make its answers differ."""
    talker = ECore.from_pretrained(run)
    assert isinstance(talker.model, GPT2ECore)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (*talker.model.gpt2.h.parameters(), talker.model.join_guidance.weight):
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 4 / weight.shape[0] ** 0.5)
    talker.model.double()
    return talker


def wants(talker: ECore, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model want ``ids`` in turn, and then the end."""
    step = talker.model.step

    def scripted(words: torch.Tensor, cache: Any) -> torch.Tensor:
        scores = step(words, cache)
        wanted = [*ids, EOS][min(cache.length - 1, len(ids))]
        scores[:, wanted] = scores[scores.isfinite()].max() + 100.0
        return scores

    monkeypatch.setattr(talker.model, "step", scripted)


# From Python ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_answer_is_the_likeliest_subword_after_subword(talker: ECore) -> None:
    """Found by whole passes of the model over response and context, one context at a time, without a cache."""
    model = talker.model
    answers = set()
    for context in CONTEXTS:
        batch, ids = model.read([context]), []
        while len(ids) < 7 and EOS not in ids:
            # A response of which only what precedes its last subword is read.
            logits = model(batch._replace(response=torch.tensor([[*ids, EOS]]))).logits[0, -1]
            logits[[i for i in range(OFFSET) if i != EOS or not ids]] = -torch.inf
            if not ids:
                logits[model.blank] = -torch.inf
            ids.append(int(logits.argmax()))
        said = [i for i in ids if i != EOS]
        reply = talker.respond(context, max_length=7)
        assert reply == model.vocabulary.text(said)
        assert (reply.length, reply.complete) == (len(said), EOS in ids)
        assert reply.context_length == len(model.read([context]).context[0]) - 1
        answers.add(str(reply))
    assert len(answers) > 1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_is_answered_as_each_alone(talker: ECore, options: dict[str, Any]) -> None:
    together = talker.respond(CONTEXTS, max_length=6, **options)
    alone = [talker.respond(context, max_length=6, **options) for context in CONTEXTS]
    assert together == alone
    assert len(set(map(str, alone))) > 1
    for one, other in zip(together, alone, strict=True):
        assert one.relevant == other.relevant
        assert [name for name, _ in one.emotions] == [name for name, _ in other.emotions]
        assert (one.length, one.complete) == (other.length, other.complete)
        assert one.context_length == other.context_length


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_streamed_words_are_the_answer(talker: ECore, options: dict[str, Any]) -> None:
    for context in CONTEXTS:
        check_stream(talker, context, max_length=8, **options)


@given(st.lists(st.integers(0, 399), min_size=1, max_size=20))
def test_streamed_words_are_the_text_whatever_the_tokens(talker: ECore, tokens: list[int]) -> None:
    """White space of several bytes, and halves of characters among them."""
    vocabulary = talker.model.vocabulary
    ids = [OFFSET + token % len(vocabulary.tokenizer) for token in tokens]
    stream = WordStream(vocabulary)
    words = [word for i in [*ids, EOS] for word in stream.add(i)]
    words += stream.rest(vocabulary.text(ids))
    assert "".join(words) == vocabulary.text(ids)


def test_a_conversation_keeps_its_turns(talker: ECore) -> None:
    talk = Conversation(talker, max_length=6)
    first, second = talk.say(TURNS[0]), talk.say(TURNS[2])
    assert talk.turns == [TURNS[0], first, TURNS[2], second]
    assert second == talker.respond([TURNS[0], str(first), TURNS[2]], max_length=6)
    assert talk.undo() == TURNS[2]
    assert "".join(talk.stream(TURNS[2])) == second
    assert talk.turns == [TURNS[0], first, TURNS[2], second]


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_an_answer_is_never_without_text(talker: ECore, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first subword of white space alone would make an empty turn, which the next request could not send."""
    vocabulary = talker.model.vocabulary
    space = vocabulary.encode([" "])[0][0]
    assert len(space) == 1
    assert vocabulary.text(space) == ""
    wants(talker, space, monkeypatch)
    talk = Conversation(talker, method=method, max_length=4)
    for text in (TURNS[0], TURNS[2]):
        assert talk.say(text).strip()
    # Later on, white space is as good as any subword.
    word = vocabulary.encode(["it"])[0][0]
    monkeypatch.undo()
    wants(talker, [*word, *space, *word], monkeypatch)
    assert talker.respond(TURNS, method=method, max_length=9) == "it it"


def test_perception_is_of_all_emotions(talker: ECore) -> None:
    perceptions = talker.perceive(CONTEXTS)
    for context, seen in zip(CONTEXTS, perceptions, strict=True):
        for shares in (seen.emotions, seen.attention):
            assert len({name for name, _ in shares}) == 32
            assert sum(share for _, share in shares) == pytest.approx(1.0)
        reply = talker.respond(context, max_length=2)
        assert [name for name, _ in seen.emotions] == [name for name, _ in reply.emotions]
        assert seen.relevant == reply.relevant
        (alone,) = talker.perceive([context])
        assert seen.words == alone.words
        assert seen.word_edges.shape == (len(seen.words), 32)
        for name in ("word_edges", "emotion_edges", "before", "after", "perceived_before"):
            torch.testing.assert_close(getattr(seen, name), getattr(alone, name), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.word_edges.sum(0), seen.before, rtol=1e-4, atol=1e-4)


def test_every_node_of_the_graph_has_a_name(talker: ECore) -> None:
    (seen,) = talker.perceive([TURNS])
    assert seen.words[0] == "[CLS]"
    assert all(seen.words)
    turns = (
        "".join(seen.words[1:]).replace("Ġ", "").split("<|endoftext|>")
    )  # Ġ: a space that is a subword of its own
    assert turns == [turn.replace(" ", "") for turn in TURNS]


def test_what_the_backbone_cannot_do_is_refused_before_anything_is_said(
    talker: ECore, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "max_length: expected at most 128, got 129; the model has no positions for more"
    for refused in (talker.respond, talker.stream, lambda _, **options: Conversation(talker, **options)):
        with pytest.raises(InputError) as caught:
            refused(TURNS, max_length=129)
        assert str(caught.value) == line
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TURNS[0]}\n"))
    assert main(["chat", str(run), "--max-length", "129"]) == 2
    assert capsys.readouterr().err == f"ecore: error: {line}\n"
    assert main(["chat", str(run), "--weights", "int8"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "with a pre-trained backbone there are no others" in error


def test_what_a_run_saved_answers_alike(run: Path, tmp_path: Path) -> None:
    talker = ECore.from_pretrained(run)
    talker.save_pretrained(tmp_path / "saved")
    again = ECore.from_pretrained(tmp_path / "saved")
    assert again.respond(CONTEXTS, max_length=5) == talker.respond(CONTEXTS, max_length=5)


# In the terminal ------------------------------------------------------------------------------------------------


def test_the_terminals_dialogue(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [TURNS[0], TURNS[2], "/emotions", "/undo", "/method beam", TURNS[2]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    transcript = tmp_path / "dialogue.jsonl"
    flags = ["--max-length", "5", "--device", "cpu", "--transcript", str(transcript)]
    assert main(["chat", str(run), *flags]) == 0
    printed = capsys.readouterr().out
    talk = Conversation(ECore.from_pretrained(run), max_length=5)
    first, second = talk.say(TURNS[0]), talk.say(TURNS[2])
    beam = talk.model.respond([TURNS[0], str(first), TURNS[2]], method="beam", max_length=5)
    said = [json.loads(line) for line in transcript.read_text("utf-8").splitlines()]
    assert [record.get("ecore") for record in said] == [first, second, None, beam]
    assert said[2]["undo"] == TURNS[2]
    assert f"(taken back: {TURNS[2]})" in printed
    assert f"{second.emotions[0][0]} " in printed


# Over HTTP and on the page --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(talker: ECore) -> Iterator[Any]:
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package, reason="the server needs the extra `serve`")
    from ecore.serving.server import longest_answer
    from tests.ecore.serving.server import serving

    with serving(talker, longest=longest_answer(talker), page=True) as server:
        yield server


def messages(turns: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


@pytest.mark.parametrize("context", CONTEXTS, ids=len)
def test_a_served_completion_is_the_answer(server: Any, talker: ECore, context: list[str]) -> None:
    reply = talker.respond(context, max_length=8)
    answer = server.chat({"messages": messages(context)}).json
    assert answer["choices"][0]["message"]["content"] == reply
    assert answer["choices"][0]["finish_reason"] == ("stop" if reply.complete else "length")
    assert answer["usage"]["prompt_tokens"] == reply.context_length
    assert answer["usage"]["completion_tokens"] == reply.length
    assert len(answer["ecore"]["emotions"]) == 32
    assert answer["ecore"]["relevant"] == reply.relevant

    sent = server.chat({"messages": messages(context), "stream": True}).body.decode()
    *chunks, done = [line.removeprefix("data: ") for line in sent.strip().split("\n\n")]
    deltas = [json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(deltas) == reply
    assert json.loads(chunks[-1])["ecore"]["relevant"] == reply.relevant
    assert done == "[DONE]"


def test_a_request_gets_no_more_subwords_than_there_are_positions(server: Any, talker: ECore) -> None:
    answer = server.chat({"messages": messages(TURNS), "max_tokens": 200}).json
    assert answer["choices"][0]["message"]["content"] == talker.respond(TURNS, max_length=128)


def test_what_the_page_asks_for(server: Any, talker: ECore) -> None:
    assert b"<html" in server.request("GET", "/").body
    assert server.request("GET", "/defaults").json["max_tokens"] == 8
    assert len(server.request("GET", "/emotions").json["emotions"]) == 32
    seen = talker.perceive([TURNS])[0]
    asked = server.request("POST", "/emotions", {"messages": messages(TURNS), "edges": True}).json
    assert asked["strategy"] == "soft"
    assert [emotion["name"] for emotion in asked["emotions"]] == [name for name, _ in seen.emotions]
    assert sum(emotion["share"] for emotion in asked["emotions"]) == pytest.approx(1.0)
    assert asked["graph"]["words"] == list(seen.words)
    column = seen.names.index(asked["graph"]["emotions"][0])
    edges = torch.tensor([row[0] for row in asked["graph"]["word_edges"]])
    torch.testing.assert_close(edges, seen.word_edges[:, column], rtol=1e-4, atol=1e-5)
