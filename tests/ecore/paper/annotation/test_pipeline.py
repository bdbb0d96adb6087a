"""Annotating dialogues: label files that vote, screening, and what a run writes."""

import json
import threading

import pytest

from ecore.errors import InputError
from ecore.evaluation.multi_emotion import read_multi_emotion
from ecore.paper.annotation.annotators import FileAnnotator, NoAnnotation
from ecore.paper.annotation.pipeline import annotate, run, screen
from ecore.paper.annotation.review import read_sheet
from tests.ecore.paper.annotation.dialogues import EMOTIONS, FOUR, SAID, Says, conversation, labels_file


def test_label_files_vote(tmp_path):
    one = labels_file(tmp_path / "1", a=["sad", "afraid"], b=[])
    two = labels_file(tmp_path / "2", a=["afraid", "joyful"])
    said = conversation("a")
    assert FileAnnotator([one], EMOTIONS).annotate(said) == ("sad", "afraid")
    assert FileAnnotator([one], EMOTIONS).annotate(conversation("b")) == ()
    assert FileAnnotator([one, two], EMOTIONS).annotate(said) == ("afraid", "sad", "joyful")
    assert FileAnnotator([one, two], EMOTIONS, votes=2).annotate(said) == ("afraid",)
    three = labels_file(tmp_path / "3", a=["joyful", "afraid", "grateful", "sad"])
    four = labels_file(tmp_path / "4", a=["sad"])  # two votes count more than one first place
    assert FileAnnotator([three, four], EMOTIONS).annotate(said) == ("sad", "joyful", "afraid", "grateful")
    with pytest.raises(NoAnnotation):
        FileAnnotator([one, two], EMOTIONS).annotate(conversation("b"))
    with pytest.raises(InputError, match="1 to 2"):
        FileAnnotator([one, two], EMOTIONS, votes=3)
    with pytest.raises(InputError, match="the same file twice"):
        FileAnnotator([one, one], EMOTIONS)
    with pytest.raises(InputError, match="2:1: unknown emotion 'joyful'"):
        FileAnnotator([one, two], ("sad", "afraid"))


def test_screening_wants_several_emotions_and_the_true_one_first():
    labels = {i: tuple(names.split()) for i, names in SAID.items()}
    assert screen(FOUR, labels) == {"a": ("sad", "joyful", "afraid"), "c": ("joyful", "grateful")}


def test_a_run_writes_what_it_counts(tmp_path):
    said = {**SAID, "b": NoAnnotation("asleep")}
    summary = run(FOUR, Says(**said), tmp_path, progress=False)
    assert summary == {
        "annotator": "says",
        "conversations": 4,
        "annotated": 3,
        "several": 2,
        "screened": 2,
        "labels_per_sample": 2.5,
        "problems": {"b": "asleep"},
    }
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    true = {c.conv_id: c.emotion for c in FOUR}
    labels = read_multi_emotion(tmp_path / "labels.jsonl", EMOTIONS, true)
    assert labels == {"a": ("sad", "joyful", "afraid"), "c": ("joyful", "grateful")}
    assert '{"conv_id": "d", "emotions": ["afraid"]}\n' in (tmp_path / "annotations.jsonl").read_text()
    assert not any(read_sheet(tmp_path / "review.csv", labels).values())


@pytest.mark.parametrize("error", [InputError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("jobs", [1, 2])
def test_what_ends_the_work_leaves_no_files_and_wakes_who_waits(tmp_path, error, jobs):
    stopped = threading.Event()
    with pytest.raises(type(error)):
        run(FOUR, Says(**{**SAID, "c": error}), tmp_path, jobs, stopped, progress=False)
    assert list(tmp_path.iterdir()) == []
    assert stopped.is_set() or jobs == 1


def test_nothing_to_annotate():
    with pytest.raises(InputError, match="no conversations"):
        annotate([], Says(), progress=False)
    with pytest.raises(InputError, match="--jobs"):
        annotate(FOUR, Says(**SAID), jobs=0, progress=False)
