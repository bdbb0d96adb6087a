"""Dialogues with several emotions: their label files, and how many of the emotions a model perceives (Table 3).

A label file is JSON lines, one ``{"conv_id": ..., "emotions": [...]}`` a conversation; other keys are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecore.errors import InputError
from ecore.files import atomic_path, numbered_lines, parse_json
from ecore.metrics import recall_at

if TYPE_CHECKING:
    from ecore.data.batches import Split

RECALL_AT = (1, 3, 5)

Labels = dict[str, tuple[str, ...]]
"""Emotions of each conversation, by its id."""


def read_multi_emotion(
    path: Path | str,
    emotions: Collection[str] | None = None,
    true_emotions: Mapping[str, str] | None = None,
) -> Labels:
    """The conversations of a multi-emotion subset with their emotions, the true one first.

    Args:
        path: a label file.
        emotions: the emotions that there are; None accepts any.
        true_emotions: the true emotion of every conversation of the split (:func:`split_emotions`), which the
            file must agree with; None accepts any conversation.

    Raises:
        InputError: the file is missing, unreadable or empty; or, with its line: not such an object, an unknown
            emotion or one twice, a conversation twice, fewer than two emotions, a conversation that the split
            does not have, or a first emotion that is not its true one.
    """
    labels = {}
    for number, conv_id, names in read_labels(path, emotions):
        if len(names) < 2:
            raise InputError(
                f"{path}:{number}: {len(names)} emotions; expected the true one and at least one more"
            )
        if true_emotions is not None:
            if conv_id not in true_emotions:
                raise InputError(
                    f"{path}:{number}: no conversation {conv_id!r} among the {len(true_emotions):,} of the split; "
                    "expected one of the data that is evaluated"
                )
            if names[0] != true_emotions[conv_id]:
                raise InputError(
                    f"{path}:{number}: the first emotion is {names[0]!r}; expected the true one of {conv_id}, "
                    f"{true_emotions[conv_id]!r}"
                )
        labels[conv_id] = names
    if not labels:
        raise InputError(f"{path}: no conversations in it; expected JSON lines of conv_id and emotions")
    return labels


def read_labels(
    path: Path | str, emotions: Collection[str] | None = None
) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Line number, ``conv_id`` and ``emotions`` of every line of a label file; blank lines are skipped.

    Raises:
        InputError: see :func:`read_multi_emotion`, of which only any number and any order of emotions is
            accepted here.
    """
    path = Path(path)
    seen: dict[str, int] = {}
    for number, line in numbered_lines(path):
        record = parse_json(line, f"{path}:{number}")
        try:
            conv_id, names = _label(record, emotions)
        except ValueError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        if conv_id in seen:
            raise InputError(f"{path}:{number}: {conv_id!r} again; it is on line {seen[conv_id]} already")
        seen[conv_id] = number
        yield number, conv_id, names


def _label(record: Any, emotions: Collection[str] | None) -> tuple[str, tuple[str, ...]]:
    if not isinstance(record, dict) or not isinstance(record.get("conv_id"), str):
        raise ValueError(f"expected an object with the text conv_id, got {repr(record)[:40]}")
    names = record.get("emotions")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected emotions to be a list of names, got {names!r}")
    for i, name in enumerate(names):
        if emotions is not None and name not in emotions:
            raise ValueError(f"unknown emotion {name!r}; expected one of {', '.join(sorted(emotions))}")
        if name in names[:i]:
            raise ValueError(f"emotion {name!r} twice; expected each once")
    return record["conv_id"], tuple(names)


def write_labels(path: Path, labels: Mapping[str, Sequence[str]]) -> None:
    """Write a label file, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for conv_id, names in labels.items():
            file.write(json.dumps({"conv_id": conv_id, "emotions": list(names)}, ensure_ascii=False) + "\n")


def split_emotions(split: Split) -> dict[str, str]:
    """The true emotion of every conversation of a prepared split, by its id."""
    texts = (split.texts(i) for i in range(len(split)))
    return {text["conv_id"]: text["emotion"] for text in texts}


def labelled_records(records: Sequence[Mapping[str, Any]], labels: Labels) -> list[Mapping[str, Any]]:
    """One record of each labelled conversation, in the records' order: that of its last listener turn.

    The paper counts conversations as its samples (739 of the test split's 2,547) and labels each as a whole; only
    the context of the last listener turn holds the whole dialogue, and emotions may come up late in it.

    Args:
        records: records of a predictions file, with ``conv_id`` and ``turn``.

    Raises:
        InputError: records without these, or a labelled conversation without a record.
    """
    last: dict[str, Mapping[str, Any]] = {}
    for number, record in enumerate(records, start=1):
        conv_id, turn = record.get("conv_id"), record.get("turn")
        if not isinstance(conv_id, str) or not isinstance(turn, int):
            raise InputError(f"prediction {number}: expected the text conv_id and the number turn")
        if conv_id in labels and (conv_id not in last or turn > last[conv_id]["turn"]):
            last[conv_id] = record
    missing = [conv_id for conv_id in labels if conv_id not in last]
    if missing:
        raise InputError(
            f"multi-emotion labels: no predictions for {len(missing):,} of {len(labels):,} conversations "
            f"({missing[0]} first); expected predictions of the whole split"
        )
    return list(last.values())


def multi_emotion_recall(records: Sequence[Mapping[str, Any]], labels: Labels) -> dict[str, Any]:
    """R@1, R@3 and R@5 of the paper's Table 3, on the conversations of ``labels``.

    Args:
        records: records of a predictions file that E-CORE wrote, or anybody's with ``conv_id``, ``turn`` and
            ``emotions``, pairs of name and probability by falling probability; of a whole split, for of each
            conversation the last turn is scored (:func:`labelled_records`).
        labels: see :func:`read_multi_emotion`.

    Returns:
        ``samples``; ``labels_per_sample``, the mean number of true emotions; ``recall_at``, for "1", "3" and "5"
        the mean number of true emotions among so many highest of h_emo; ``ceiling_at``, the most that these
        labels allow. Where every record has a ``relevant`` set (hard strategy) also ``recall_relevant``, the mean
        number of true emotions in it, and its mean ``relevant_size``.

    Raises:
        InputError: no labels, a labelled conversation without a record, or a record without ``emotions``.
    """
    chosen = labelled_records(records, labels)
    true = [set(labels[record["conv_id"]]) for record in chosen]
    ranked = [_names(record) for record in chosen]
    result: dict[str, Any] = {
        "samples": len(chosen),
        "recall_at": {str(k): recall_at(ranked, true, k) for k in RECALL_AT},
        "ceiling_at": {str(k): sum(min(k, len(names)) for names in true) / len(true) for k in RECALL_AT},
        "labels_per_sample": sum(map(len, true)) / len(true),
    }
    if all("relevant" in record for record in chosen):
        relevant = [record["relevant"] for record in chosen]
        result["recall_relevant"] = recall_at(relevant, true)
        result["relevant_size"] = sum(map(len, relevant)) / len(relevant)
    return result


def _names(record: Mapping[str, Any]) -> list[str]:
    try:
        names = [name for name, _ in record["emotions"]]
    except (KeyError, TypeError, ValueError):
        names = [None]
    if not all(isinstance(name, str) for name in names):
        raise InputError(
            f"prediction of {record['conv_id']}, turn {record['turn']}: expected emotions, pairs of name and "
            "probability by falling probability"
        )
    relevant = record.get("relevant", [])
    if not isinstance(relevant, list) or not all(isinstance(name, str) for name in relevant):
        raise InputError(
            f"prediction of {record['conv_id']}, turn {record['turn']}: expected relevant, a list of names"
        )
    return names


def format_multi_emotion(result: Mapping[str, Any]) -> str:
    """:func:`multi_emotion_recall`'s numbers as lines to read."""
    lines = [
        f"multi-emotion subset: {result['samples']:,} conversations at their last listener turn, "
        f"{result['labels_per_sample']:.2f} emotions each"
    ]
    for k, value in result["recall_at"].items():
        lines.append(f"{'R@' + k:<27}{value:>9.2f}  true emotions, of at most {result['ceiling_at'][k]:.2f}")
    if "recall_relevant" in result:
        lines.append(
            f"{'R@relevant':<27}{result['recall_relevant']:>9.2f}  true emotions in the relevant set, "
            f"of {result['relevant_size']:.2f} on average"
        )
    return "\n".join(lines)
