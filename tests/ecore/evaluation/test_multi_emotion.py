"""Label files with several emotions a dialogue, and Recall@k as the paper's Table 3 counts it."""

import json
import os
from pathlib import Path

import pytest

from ecore.errors import InputError
from ecore.evaluation.multi_emotion import (
    format_multi_emotion,
    labelled_records,
    multi_emotion_recall,
    read_labels,
    read_multi_emotion,
    write_labels,
)
from ecore.evaluation.predictions import evaluate_file

EMOTIONS = ("afraid", "grateful", "hopeful", "joyful", "lonely", "proud", "sad")
TRUE = {"a": "afraid", "b": "joyful", "c": "sad"}


def record(conv_id, turn, ranked, relevant=None):
    emotions = [[name, 0.5 / (i + 1)] for i, name in enumerate(ranked.split())]
    made = {"conv_id": conv_id, "turn": turn, "emotions": emotions}
    return made if relevant is None else {**made, "relevant": relevant.split()}


LABELS = {"a": ("afraid", "grateful", "hopeful"), "b": ("joyful", "proud")}
RECORDS = [
    record("a", 1, "sad sad sad sad sad", "sad"),
    record("b", 3, "sad lonely joyful afraid proud", "sad lonely"),  # turns out of order on purpose
    record("b", 1, "joyful proud sad afraid lonely", "joyful proud"),
    record("c", 1, "sad joyful proud afraid lonely", "sad"),
    record("a", 3, "grateful afraid sad hopeful lonely", "grateful afraid sad hopeful"),
]


def test_recall_is_the_mean_number_of_true_emotions_at_the_last_turn():
    result = multi_emotion_recall(RECORDS, LABELS)
    # conversation a finds grateful; then afraid; then hopeful: 1, 2, 3. b: 0, 1 (joyful), 2 (proud).
    assert result["recall_at"] == {"1": 0.5, "3": 1.5, "5": 2.5}
    assert result["ceiling_at"] == {"1": 1.0, "3": 2.5, "5": 2.5}
    assert (result["samples"], result["labels_per_sample"]) == (2, 2.5)
    # relevant sets: all 3 of a, none of b.
    assert (result["recall_relevant"], result["relevant_size"]) == (1.5, 3.0)


def test_soft_strategy_has_no_relevant_set():
    soft = [{k: v for k, v in r.items() if k != "relevant"} for r in RECORDS]
    result = multi_emotion_recall(soft, LABELS)
    assert "recall_relevant" not in result
    assert result["recall_at"]["5"] == 2.5
    assert "relevant" not in format_multi_emotion(result)
    assert "R@relevant" in format_multi_emotion(multi_emotion_recall(RECORDS, LABELS))


def test_labelled_records_are_one_a_conversation():
    assert [(r["conv_id"], r["turn"]) for r in labelled_records(RECORDS, LABELS)] == [("a", 3), ("b", 3)]


@pytest.mark.parametrize(
    "records, message",
    [
        (RECORDS[1:4], "no predictions for 1 of 2 conversations (a first)"),
        ([{"turn": 1}], "prediction 1: expected the text conv_id"),
        ([{"conv_id": "a", "turn": "1"}], "prediction 1: expected the text conv_id and the number turn"),
        ([RECORDS[4], {"conv_id": "b", "turn": 1}], "prediction of b, turn 1: expected emotions, pairs"),
        ([RECORDS[4], {"conv_id": "b", "turn": 1, "emotions": ["joyful"]}], "prediction of b, turn 1"),
        ([RECORDS[4], {"conv_id": "b", "turn": 1, "emotions": [[["x"], 1]]}], "expected emotions, pairs"),
        ([RECORDS[4], {**RECORDS[4], "conv_id": "b", "relevant": 3}], "expected relevant, a list of names"),
    ],
)
def test_records_that_cannot_be_scored(records, message):
    with pytest.raises(InputError) as error:
        multi_emotion_recall(records, LABELS)
    assert message in str(error.value)


def test_no_labels_are_nothing_to_measure():
    with pytest.raises(InputError):
        multi_emotion_recall(RECORDS, {})


def test_a_predictions_file_has_the_true_emotions_itself(tmp_path):
    """Anybody's, with the mark that some programs write first: labels of other emotions are refused by line."""
    record = {"conv_id": "a", "turn": 1, "prediction": "oh", "reference": "oh", "emotion": "sad"}
    record |= {"predicted_emotion": "sad", "emotions": [["sad", 0.9], ["joyful", 0.1]]}
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8-sig")
    write_labels(tmp_path / "l.jsonl", {"a": ["sad", "joyful"]})
    scores = evaluate_file(tmp_path / "p.jsonl", tmp_path / "l.jsonl")["multi_emotion"]
    assert scores["recall_at"] == {"1": 1.0, "3": 2.0, "5": 2.0}
    write_labels(tmp_path / "l.jsonl", {"a": ["joyful", "sad"]})
    with pytest.raises(
        InputError, match=r"l\.jsonl:1: the first emotion is 'joyful'; expected the true one of a"
    ):
        evaluate_file(tmp_path / "p.jsonl", tmp_path / "l.jsonl")
    (tmp_path / "p.jsonl").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"p\.jsonl:1: not valid JSON"):
        evaluate_file(tmp_path / "p.jsonl")


def test_labels_come_back_as_written(tmp_path):
    path = tmp_path / "labels.jsonl"
    write_labels(path, LABELS)
    assert read_multi_emotion(path, EMOTIONS, TRUE) == LABELS
    path.write_text("\n" + path.read_text() + "\n\n")
    assert read_multi_emotion(path) == LABELS
    assert [number for number, *_ in read_labels(path)] == [2, 3]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object with the text conv_id"),
        ('{"emotions": ["sad"]}', "expected an object with the text conv_id"),
        ('{"conv_id": 3, "emotions": ["sad"]}', "expected an object with the text conv_id"),
        ('{"conv_id": "c"}', "expected emotions to be a list"),
        ('{"conv_id": "c", "emotions": "sad"}', "expected emotions to be a list"),
        ('{"conv_id": "c", "emotions": ["sad", 1]}', "expected emotions to be a list"),
        (
            '{"conv_id": "c", "emotions": ["sad", "Joyful"]}',
            "unknown emotion 'Joyful'; expected one of afraid",
        ),
        ('{"conv_id": "c", "emotions": ["sad", "joyful", "sad"]}', "emotion 'sad' twice"),
        ('{"conv_id": "a", "emotions": ["afraid", "sad"]}', "'a' again; it is on line 1"),
        ('{"conv_id": "c", "emotions": ["sad"]}', "1 emotions; expected the true one and at least one more"),
        ('{"conv_id": "c", "emotions": []}', "0 emotions"),
        ('{"conv_id": "d", "emotions": ["sad", "joyful"]}', "no conversation 'd' among the 3 of the split"),
        (
            '{"conv_id": "c", "emotions": ["joyful", "sad"]}',
            "the first emotion is 'joyful'; expected the true",
        ),
    ],
)
def test_bad_lines_are_reported_by_number(tmp_path, line, message):
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps({"conv_id": "a", "emotions": ["afraid", "sad"]}) + "\n\n" + line + "\n")
    with pytest.raises(InputError) as error:
        read_multi_emotion(path, EMOTIONS, TRUE)
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("none.jsonl", "no such file"),
        ("empty.jsonl", "no conv"),
        ("bytes.jsonl", "cannot"),
    ):
        with pytest.raises(InputError, match=message):
            read_multi_emotion(tmp_path / name)


@pytest.mark.skipif("ECORE_DATA" not in os.environ, reason="ECORE_DATA names no folder of real data")
def test_the_proxy_subset_agrees_with_the_test_split():
    folder = Path(os.environ["ECORE_DATA"])
    lines = (folder / "ed" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    true = {r["conv_id"]: r["emotion"] for r in map(json.loads, lines)}
    proxy = read_multi_emotion(
        folder / "multi_emotion" / "ed_test_pseudo_multi.jsonl", set(true.values()), true
    )
    assert len(proxy) == 1292
    table_11 = read_multi_emotion(folder / "multi_emotion" / "ecore_paper_table11.jsonl", None, true)
    assert sorted(map(len, table_11.values())) == [2, 3, 3, 3, 3]
