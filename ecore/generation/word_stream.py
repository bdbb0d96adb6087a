"""An answer's words while they come."""

from __future__ import annotations

import re
from typing import Any

from ecore.data.vocabulary import EOS


class WordStream:
    """An answer's text while it grows, handed out in whole words.

    A word's text may depend on the next one (":" and ")" are a smiley, a subword may continue), so a word is handed out
    when the next one has begun.
    """

    def __init__(self, vocabulary: Any) -> None:
        self._vocabulary = vocabulary
        self._ids: list[int] = []
        self._sent = ""

    @property
    def begun(self) -> bool:
        """True once a word was handed out."""
        return bool(self._sent)

    def add(self, word: int) -> list[str]:
        """Add a word's id; returns the words of the text that are complete now, each with the space before it."""
        if word == EOS or (self._ids and self._ids[-1] == EOS):
            return []
        self._ids.append(word)
        text = self._vocabulary.text(self._ids)
        return self._send(text[: text.rfind(" ") + 1].rstrip())

    def rest(self, answer: str) -> list[str]:
        """Return the words of the complete ``answer`` that were not handed out yet."""
        return self._send(answer)

    def _send(self, text: str) -> list[str]:
        new = text[len(self._sent) :]
        self._sent += new
        return re.findall(r"\s*\S+\s*$|\s*\S+", new)
