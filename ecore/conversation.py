"""A dialogue that keeps its turns."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from ecore.generation.decoding import Decoding
from ecore.pipeline import ECore, Reply


class Conversation:
    """A dialogue with a model that keeps its turns.

    Args:
        model: answers.
        **decoding: as for :meth:`ECore.respond`, for every answer.

    Attributes:
        turns: what was said so far, the user's first and then in turn.
        replies: the model's turns, with their emotions.

    Raises:
        InputError: a decoding option out of range.
    """

    def __init__(self, model: ECore, **decoding: Any) -> None:
        # What is out of range should be said before anything is.
        model.model.check_length(Decoding.of(decoding).max_length)
        self.model, self.decoding = model, decoding
        self.turns: list[str] = []
        self.replies: list[Reply] = []

    def say(self, text: str) -> Reply:
        """Say something and return the answer. Where that fails, nothing was said.

        Raises:
            InputError: as for :meth:`ECore.respond`.
        """
        reply = self.model.respond([*self.turns, text], **self.decoding)
        self._keep(text, reply)
        return reply

    def stream(self, text: str) -> Generator[str, None, Reply]:
        """Say something and return the answer word by word, as :meth:`ECore.stream`; it is kept once it is complete.

        Raises:
            InputError: as for :meth:`ECore.respond`.
        """
        words = self.model.stream([*self.turns, text], **self.decoding)
        return self._streamed(text, words)

    def _streamed(self, text: str, words: Generator[str, None, Reply]) -> Generator[str, None, Reply]:
        reply = yield from words
        self._keep(text, reply)
        return reply

    def _keep(self, text: str, reply: Reply) -> None:
        self.turns += [text, str(reply)]
        self.replies.append(reply)

    def undo(self) -> str | None:
        """Take the last exchange back; returns what the user had said in it, None where there is nothing."""
        if not self.replies:
            return None
        self.replies.pop()
        text, _ = self.turns[-2:]
        del self.turns[-2:]
        return text

    def reset(self) -> None:
        """Forget all that was said."""
        self.turns, self.replies = [], []
