"""The annotator's interface, and the annotator that reads label files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

from ecore.data.corpus import Conversation
from ecore.errors import InputError
from ecore.evaluation.multi_emotion import read_labels


class NoAnnotation(Exception):
    """An annotator has nothing usable to say of a conversation; the message says why."""


class Annotator(Protocol):
    """A dialogue in, its emotions out.

    Only ``conv_id`` and ``turns`` may be looked at: the annotation is screened by the true emotion later, and the
    situation was written by somebody who knew it.
    """

    name: str

    def annotate(self, conversation: Conversation) -> tuple[str, ...]:
        """The emotions of ``conversation``, the strongest first; none is an answer too.

        Raises:
            NoAnnotation: this conversation has no annotation; the others continue.
            InputError: of none.
        """


class FileAnnotator:
    """Annotates with what label files say, several of them by vote.

    Args:
        paths: label files (:mod:`ecore.evaluation.multi_emotion`).
        emotions: the emotions that there are.
        votes: how many of the files must name an emotion. Emotions come by falling votes, then by the sum of their
            ranks (one past the end where a file does not name them), then in the first file's order.

    Raises:
        InputError: no file or a damaged one, or ``votes`` out of 1 … number of files.
    """

    name = "file"

    def __init__(self, paths: Sequence[Path | str], emotions: Collection[str], votes: int = 1) -> None:
        if not paths:
            raise InputError("--labels: expected at least one file of labels")
        found = [os.path.realpath(path) for path in paths]
        if len(set(found)) < len(found):
            raise InputError("--labels: the same file twice; expected each once, with one vote")
        if not 1 <= votes <= len(paths):
            raise InputError(f"--votes: expected 1 to {len(paths)}, the number of files, got {votes}")
        self._votes = votes
        self._files = [{conv_id: names for _, conv_id, names in read_labels(p, emotions)} for p in paths]

    def annotate(self, conversation: Conversation) -> tuple[str, ...]:
        """See :class:`Annotator`; every file must have each conversation."""
        answers = [file.get(conversation.conv_id) for file in self._files]
        given = [names for names in answers if names is not None]
        if len(given) < len(answers):
            raise NoAnnotation("not in every file of labels" if given else "not in the file of labels")
        votes = Counter(name for names in given for name in names)
        rank = {e: sum(n.index(e) if e in n else len(n) for n in given) for e in votes}
        ordered = sorted(votes, key=lambda emotion: (-votes[emotion], rank[emotion]))
        return tuple(emotion for emotion in ordered if votes[emotion] >= self._votes)
