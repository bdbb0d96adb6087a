"""The terminal's dialogue: its commands and its transcript."""

import io
import json
import sys

import pytest

from ecore import cli
from ecore.cli.chat import Chat
from ecore.pipeline import ECore
from tests.ecore.generation.dialogues import CONTEXTS, differing_model

SAID = (CONTEXTS[0][0], CONTEXTS[2][0])


@pytest.fixture(scope="module")
def model():
    return ECore(differing_model("soft"))


@pytest.fixture
def chat(model, monkeypatch, capsys):
    def chat(*lines, transcript=None, **options):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert Chat(model, {"max_length": 6, **options}, transcript).run() == 0
        return capsys.readouterr().out.splitlines()

    return chat


def answers(lines):
    return [line.removeprefix("ecore: ") for line in lines if line.startswith("ecore: ")]


def test_undo_takes_one_exchange_back(chat, model):
    first, second, again = answers(chat(SAID[0], SAID[1], "/undo", SAID[1]))
    assert first == model.respond([SAID[0]], max_length=6)
    assert second == again == model.respond([SAID[0], first, SAID[1]], max_length=6)
    assert chat("/undo") == ["(nothing to take back)"]
    assert f"(taken back: {SAID[0]})" in chat(SAID[0], "/undo")


def test_method_changes_the_next_answers(chat, model):
    turns = [SAID[0]]
    greedy, beam = answers(chat(SAID[0], "/reset", "/method beam", SAID[0], beams=3))
    assert greedy == model.respond(turns, max_length=6)
    assert beam == model.respond(turns, method="beam", beams=3, max_length=6)
    for wrong in ("/method", "/method guess"):
        assert "method: expected one of greedy, beam, sample" in chat(wrong)[0]
    # What only sampling has is put aside, and is there again when the method is.
    lines = chat(
        "/method greedy", SAID[0], "/reset", "/method sample", SAID[0], method="sample", top_k=2, seed=1
    )
    assert answers(lines) == [
        model.respond(turns, max_length=6),
        model.respond(turns, method="sample", top_k=2, seed=1, max_length=6),
    ]


def test_emotions_are_those_of_the_last_answer(chat, model):
    seen = model.respond([SAID[0]], max_length=6)
    lines = chat("/emotions", SAID[0], "/emotions")
    assert lines[0] == "(nothing was said yet)"
    shown = lines[-7:-1]
    assert [line.split()[0] for line in shown] == [name for name, _ in seen.emotions]
    assert [line.split()[0] for line in shown if line.endswith(" *")] == [
        name for name, _ in seen.emotions if name in seen.relevant
    ]


def test_help_and_unknown_commands_list_all(chat):
    for line in ("/help", "/nonsense", "/"):
        assert [shown.split()[0] for shown in chat(line)] == [
            "/undo",
            "/reset",
            "/emotions",
            "/method",
            "/help",
            "/quit",
        ]


def test_a_transcript_is_appended_to(chat, tmp_path):
    path = tmp_path / "dialogue.jsonl"
    chat(SAID[0], "/undo", "/reset", transcript=path)
    lines = chat(SAID[1], transcript=path)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [set(record) - {"time"} for record in records] == [
        {"user", "ecore", "emotions", "relevant"},
        {"undo"},
        {"reset"},
        {"user", "ecore", "emotions", "relevant"},
    ]
    assert (records[-1]["user"], records[-1]["ecore"]) == (SAID[1], answers(lines)[0])


def test_a_transcript_that_cannot_be_written_is_said_first(tmp_path, capsys):
    assert cli.main(["chat", str(tmp_path / "none"), "--transcript", str(tmp_path / "no/such/file")]) == 2
    assert "no/such/file" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["soft", "hard"])
def test_only_the_hard_strategy_is_said_to_guide_by_a_few(strategy, monkeypatch):
    talk = ECore(differing_model(strategy))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{SAID[0]}\n/emotions\n"))
    written = io.StringIO()
    monkeypatch.setattr(sys, "stdout", written)
    assert Chat(talk, {"max_length": 6}, None).run() == 0
    assert ("these guide the answer" in written.getvalue()) == (strategy == "hard")
