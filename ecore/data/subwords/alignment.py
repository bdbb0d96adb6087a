"""The emotion intensity of subwords: a subword has that of the word that it is part of."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ecore.data.text import tokenize
from ecore.data.vocabulary import UNK, Vocabulary

Floats = npt.NDArray[np.float32]


class WordIntensity:
    """Looks up, for the characters of a text as written, the intensity of their word.

    Words are those of :func:`ecore.data.text.tokenize`, which changes the text (lower case, "don't" becomes "do
    not"), so they are found again from left to right within each piece between spaces. Text between two
    words found belongs to those that were not ("n't" to "not"), the most intense of them; else it is an unknown word.

    Args:
        vocabulary: the words that intensities are known of.
        intensity: [V], c of each.
    """

    def __init__(self, vocabulary: Vocabulary, intensity: Floats) -> None:
        self._vocabulary = vocabulary
        self._intensity = intensity
        self._pieces: dict[str, Floats] = {}  # a corpus repeats its words

    def subwords(self, text: str, spans: Iterable[tuple[int, int]]) -> list[float]:
        """Intensity of each subword, given where in ``text`` it begins and ends; across two words, the larger.

        ``text`` has one space between words and none around them; a space belongs to the word that follows.
        """
        characters: list[float] = []
        for piece in text.split():
            values = self._piece(piece).tolist()
            characters += [values[0], *values] if characters else values
        # A byte of a character may be a token of its own: its span is then the character's, or empty.
        return [max(characters[begin : max(end, begin + 1)]) for begin, end in spans]

    def _piece(self, piece: str) -> Floats:
        """[len(piece)]: of each character."""
        known = self._pieces.get(piece)
        if known is not None:
            return known
        # Letter by letter: a few letters become two in lower case, which would shift those behind them.
        lower = "".join(letter.lower()[:1] for letter in piece)
        words = tokenize(piece)
        result = np.full(len(piece), self._intensity[UNK], dtype=np.float32)
        end = 0
        missing: list[float] = []
        for word, value in zip(words, self._intensity[self._vocabulary.encode(words)].tolist(), strict=True):
            begin = lower.find(word, end)
            if begin < 0:
                missing.append(value)
                continue
            if missing:
                result[end:begin] = max(missing)
                missing = []
            end = begin + len(word)
            result[begin:end] = value
        if missing:
            result[end:] = max(missing)
        self._pieces[piece] = result
        return result
