"""From a split's conversations to labels that a person can review (Appendix H): annotate, then screen."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ecore.data import prepared
from ecore.data.corpus import Conversation, read_corpus
from ecore.errors import InputError
from ecore.evaluation.multi_emotion import Labels, write_labels
from ecore.files import write_json
from ecore.paper.annotation.annotators import Annotator, NoAnnotation
from ecore.paper.annotation.review import refuse_marked, write_sheet
from ecore.progress import tqdm


def read_conversations(folder: Path | str, split: str) -> tuple[list[Conversation], tuple[str, ...]]:
    """The conversations with a listener's turn of one split, and the emotions that there are.

    Args:
        folder: a corpus (:func:`ecore.data.corpus.read_corpus`) or a prepared folder.

    Raises:
        InputError: neither, or damaged; or two conversations of one ``conv_id``, by which labels are kept.
    """
    folder = Path(folder)
    if prepared.is_prepared(folder):
        conversations, emotions = prepared.read_conversations(folder, split), prepared.read_emotions(folder)
    else:
        corpus = read_corpus(folder)
        conversations, emotions = getattr(corpus, split), corpus.emotions
    counts = Counter(c.conv_id for c in conversations)
    for conv_id, count in counts.items():
        if count > 1:
            raise InputError(f"{folder}: {split}: {count} conversations of conv_id {conv_id!r}; expected one")
    return [c for c in conversations if len(c.turns) > 1], emotions


def annotate(
    conversations: Sequence[Conversation],
    annotator: Annotator,
    jobs: int = 1,
    stopped: threading.Event | None = None,
    progress: bool = True,
) -> tuple[Labels, dict[str, str]]:
    """The emotions of every conversation, as ``annotator`` has them, and why those are missing that are.

    Args:
        jobs: conversations at once, each in a thread of its own.
        stopped: set when an error or Ctrl-C ends the work, for an annotator that waits.

    Raises:
        InputError: no conversations, ``jobs`` under 1, or what the annotator raises.
    """
    if not conversations or jobs < 1:
        what = f"--jobs: expected at least 1, got {jobs}" if conversations else "no conversations to annotate"
        raise InputError(what)
    labels: Labels = {}
    problems: dict[str, str] = {}

    def one(conversation: Conversation) -> None:
        try:
            labels[conversation.conv_id] = annotator.annotate(conversation)
        except NoAnnotation as error:
            problems[conversation.conv_id] = str(error)

    with tqdm(
        total=len(conversations), desc="annotate", unit=" dialogues", disable=None if progress else True
    ) as bar:
        if jobs == 1:
            for conversation in conversations:
                one(conversation)
                bar.update()
        else:
            with ThreadPoolExecutor(jobs) as executor:
                try:
                    for _ in executor.map(one, conversations):
                        bar.update()
                except BaseException:
                    bar.set_description("stopping, requests under way end first")
                    if stopped is not None:
                        stopped.set()
                    executor.shutdown(wait=False, cancel_futures=True)
                    raise
    order = [conversation.conv_id for conversation in conversations]
    return {i: labels[i] for i in order if i in labels}, {i: problems[i] for i in order if i in problems}


def screen(conversations: Sequence[Conversation], labels: Mapping[str, Sequence[str]]) -> Labels:
    """Those with several emotions, the true one among them: it comes first, the others keep their order."""
    screened = {}
    for conversation in conversations:
        names = labels.get(conversation.conv_id, ())
        if len(names) > 1 and conversation.emotion in names:
            others = (name for name in names if name != conversation.emotion)
            screened[conversation.conv_id] = (conversation.emotion, *others)
    return screened


def run(
    conversations: Sequence[Conversation],
    annotator: Annotator,
    out: Path | str,
    jobs: int = 1,
    stopped: threading.Event | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Annotate and screen; the files go to ``out``.

    ``annotations.jsonl`` has what the annotator said, ``labels.jsonl`` what is left after screening, ``review.csv``
    the sheet for a person, and ``summary.json`` what is returned: ``annotator``; ``conversations``; ``annotated``,
    less the ``problems`` (reasons by conv_id); ``several``, with two emotions or more; ``screened``, with the true one
    among them; ``labels_per_sample`` of these.

    Raises:
        InputError: see :func:`annotate`; no conversation could be annotated; or a review sheet with strikes lies in
            ``out``, which would be lost.
    """
    out = Path(out)
    refuse_marked(out / "review.csv")
    labels, problems = annotate(conversations, annotator, jobs, stopped, progress)
    if not labels:
        conv_id, why = next(iter(problems.items()))
        raise InputError(f"no dialogue of {len(conversations):,} was annotated, {conv_id} first: {why}")
    screened = screen(conversations, labels)
    write_labels(out / "annotations.jsonl", labels)
    write_labels(out / "labels.jsonl", screened)
    write_sheet(out / "review.csv", conversations, screened)
    summary = {
        "annotator": annotator.name,
        "conversations": len(conversations),
        "annotated": len(labels),
        "several": sum(len(names) > 1 for names in labels.values()),
        "screened": len(screened),
        "labels_per_sample": sum(map(len, screened.values())) / len(screened) if screened else None,
        "problems": problems,
    }
    write_json(out / "summary.json", summary)
    return summary
