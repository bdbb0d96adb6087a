"""Cases: the rule by which they are drawn, every system's own answer, and Markdown that shows texts as they are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ecore.data.corpus import read_split
from ecore.errors import InputError
from ecore.paper.cases import Answer, Case, cases, format_cases, write_cases
from ecore.paper.experiments.drawings import PAPERS_CASES


def record(conv: int, turn: int, emotion: str, **more: object) -> dict:
    context = [f"turn {t} of {conv}" for t in range(turn)]
    fields = {"conv_id": f"c{conv}", "turn": turn, "context": context, "reference": f"human {conv} {turn}"}
    fields |= {"prediction": f"answer {conv} {turn}", "emotion": emotion, "predicted_emotion": "sad"}
    return fields | {"emotions": [["sad", 0.6], [emotion, 0.25], ["proud", 0.1], ["angry", 0.01]]} | more


def write(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture
def soft(tmp_path: Path) -> Path:
    """Twelve conversations of three emotions, two samples each; "sad" is as frequent as the others together."""
    emotions = ["sad", "sad", "proud", "angry"] * 3
    records = [record(i, turn, emotion) for i, emotion in enumerate(emotions) for turn in (1, 3)]
    return write(tmp_path / "soft.jsonl", records)


@pytest.fixture
def hard(tmp_path: Path) -> Path:
    emotions = ["sad", "sad", "proud", "angry"] * 3
    records = [
        record(i, turn, emotion, prediction=f"hard answer {i} {turn}", relevant=[emotion, "lonely"])
        for i, emotion in reversed(list(enumerate(emotions)))  # another order, and one conversation less
        for turn in (1, 3)
        if i
    ]
    return write(tmp_path / "run" / "evaluation-test" / "predictions.jsonl", records).parents[1]


def test_every_system_answers_the_same_sample(soft: Path, hard: Path) -> None:
    for case in cases({"soft": soft, "hard": hard}, number=6):
        conv = case.conv_id.removeprefix("c")
        assert case.context == tuple(f"turn {t} of {conv}" for t in range(case.turn))
        assert case.reference == f"human {conv} {case.turn}"
        assert list(case.answers) == ["soft", "hard"]
        assert case.answers["soft"].text == f"answer {conv} {case.turn}"
        assert case.answers["hard"].text == f"hard answer {conv} {case.turn}"
        assert case.answers["soft"].relevant is None
        assert case.answers["hard"].relevant == (case.emotion, "lonely")
        assert case.answers["soft"].perceived == "sad"
        assert case.answers["soft"].attention[:2] == (("sad", 0.6), (case.emotion, 0.25))


def test_the_draw_goes_round_the_emotions_and_takes_a_conversation_once(soft: Path, hard: Path) -> None:
    systems = {"soft": soft, "hard": hard}
    drawn = cases(systems, number=9)
    for begin in (0, 3, 6):
        assert {case.emotion for case in drawn[begin : begin + 3]} == {"sad", "proud", "angry"}
    assert len({case.conv_id for case in drawn}) == 9
    assert "c0" not in {case.conv_id for case in cases(systems, number=100)}  # one file lacks it
    assert len(cases(systems, number=100)) == 11  # each conversation once; then there are no more
    assert cases(systems, number=9) == drawn
    assert cases(systems, number=4) == drawn[:4]
    others = [[case.conv_id for case in cases(systems, number=3, seed=seed)] for seed in range(8)]
    assert len({tuple(sorted(ids)) for ids in others}) > 3
    assert {case.turn for seed in range(8) for case in cases(systems, number=3, seed=seed)} == {1, 3}


def test_named_conversations_come_in_their_order_at_their_last_turn(soft: Path) -> None:
    drawn = cases({"soft": soft}, ["c7", "c2"], number=1)
    assert [(case.conv_id, case.turn) for case in drawn] == [("c7", 3), ("c2", 3)]
    with pytest.raises(InputError, match="no conversation 'c99'"):
        cases({"soft": soft}, ["c7", "c99"])


def test_a_turn_may_be_named(soft: Path) -> None:
    drawn = cases({"soft": soft}, [("c7", 1), "c2"])
    assert [(case.conv_id, case.turn) for case in drawn] == [("c7", 1), ("c2", 3)]
    with pytest.raises(InputError, match="no turn 2 of 'c7'"):
        cases({"soft": soft}, [("c7", 2)])


@pytest.mark.skipif("ECORE_DATA" not in os.environ, reason="ECORE_DATA names no folder of real data")
def test_the_papers_cases_are_answered_where_the_paper_answers_them() -> None:
    humans = {
        ("hit:1430_conv:2860", 1): "Awww I bet that brought back memories.",
        ("hit:10320_conv:20641", 1): "Keep up the good work! You will do good in life",
        ("hit:5011_conv:10022", 3): "i am sorry to hear about that! i hope everything gets better for you!",
    }
    conversations = {
        c.conv_id: c.turns for c in read_split(Path(os.environ["ECORE_DATA"]) / "ed" / "test.jsonl")[0]
    }
    assert set(PAPERS_CASES) == set(humans)
    for (conv_id, turn), said in humans.items():
        assert conversations[conv_id][turn].startswith(said)


def test_anybodys_predictions_without_emotions(soft: Path, tmp_path: Path) -> None:
    wanted = ("conv_id", "turn", "context", "reference")
    theirs = [{k: record(i, 1, "x")[k] for k in wanted} | {"prediction": "ok"} for i in range(4)]
    baseline = write(tmp_path / "theirs.jsonl", theirs)
    case = cases({"theirs": baseline, "soft": soft}, number=1)[0]
    assert case.answers["theirs"] == Answer("ok", None, (), None)
    assert case.emotion is not None  # another file tells it
    assert cases({"theirs": baseline}, number=9)[0].emotion is None


def test_markdown_shows_texts_as_they_are() -> None:
    attention = (("sad", 0.456), ("proud", 0.3), ("angry", 0.2), ("lonely", 0.04))
    case = Case(
        "hit:1_conv:2",
        2,
        "proud",
        ("A | b *c*\nnew  line", "<b>_x_</b>"),
        "Good.",
        {
            "soft": Answer("Yes.", "sad", attention, None),
            "hard": Answer("No.", "proud", attention, ("sad", "proud")),
        },
    )
    assert format_cases([case, case]).splitlines()[:13] == [
        "### Case 1: proud",
        "Conversation `hit:1_conv:2`, turn 2 (counted from 0)",
        "",
        "| | |",
        "| --- | --- |",
        r"| S1 | A \| b \*c\* new line |",
        r"| L1 | \<b\>\_x\_\</b\> |",
        "| **Human** | Good. |",
        "| **soft** | Yes. |",
        "|  | perceived sad; attention: sad 46 %, **proud** 30 %, angry 20 % |",
        "| **hard** | No. |",
        "|  | perceived **proud**; attention: sad 46 %, **proud** 30 %, angry 20 %; relevant: sad, **proud** |",
        "",
    ]
    assert "### Case 2: proud" in format_cases([case, case])
    plain = Case("c", 1, None, ("Hi.",), "Hello.", {"theirs": Answer("Hey.", None, (), None)})
    assert format_cases([plain]).splitlines()[0] == "### Case 1"
    assert "perceived" not in format_cases([plain])


def test_written_as_markdown_and_json(soft: Path, tmp_path: Path) -> None:
    drawn = cases({"soft": soft}, number=2)
    write_cases(tmp_path / "out", drawn)
    assert (tmp_path / "out" / "cases.md").read_text() == format_cases(drawn)
    written = json.loads((tmp_path / "out" / "cases.json").read_text())
    assert [t["conv_id"] for t in written] == [case.conv_id for case in drawn]
    assert written[0]["answers"]["soft"]["attention"][0] == ["sad", 0.6]


def test_refusals(soft: Path, tmp_path: Path) -> None:
    def refused(match: str, systems: dict[str, Path], **options: int) -> None:
        with pytest.raises(InputError, match=match):
            cases(systems, **options)

    refused("at least one predictions file", {})
    refused("number: expected at least 1, got 0", {"soft": soft}, number=0)
    (tmp_path / "empty").mkdir()
    refused("`ecore evaluate", {"soft": tmp_path / "empty"})
    twice = write(tmp_path / "twice.jsonl", [record(1, 1, "sad"), record(1, 1, "sad")])
    refused(r"twice.jsonl: sample 2: turn 1 of c1 again", {"a": twice})
    for missing in ("conv_id", "turn", "context"):
        bad = write(tmp_path / "bad.jsonl", [{k: v for k, v in record(1, 1, "sad").items() if k != missing}])
        refused("sample 1: expected 'conv_id', 'turn' and 'context'", {"a": bad})
    refused("share no sample", {"a": soft, "b": write(tmp_path / "b.jsonl", [record(77, 1, "sad")])})
    other = write(tmp_path / "c.jsonl", [record(1, 1, "sad", reference="Another.")])
    refused("b tells another context or reference for turn 1 of c1", {"a": soft, "b": other})
    for broken in ({"emotions": [["sad"]]}, {"emotions": 3}, {"relevant": 3}):
        odd = write(tmp_path / "d.jsonl", [record(1, 1, "sad", **broken)])
        refused("d: turn 1 of c1: expected 'emotions' as", {"d": odd})
