"""The words a model knows and the emotions it distinguishes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from ecore.data.text import detokenize
from ecore.errors import InputError
from ecore.files import read_json, write_json

PAD, UNK, BOS, EOS, CLS = 0, 1, 2, 3, 4
SPECIAL_WORDS = ("<pad>", "<unk>", "<bos>", "<eos>", "<cls>")
VOCABULARIES = ("literature", "train")
"""Which words of a corpus a vocabulary may hold (:func:`ecore.data.prepare.prepare`)."""


class Vocabulary:
    """Words with their ids (a word's place in ``words``) and the emotions' names.

    ``words`` starts with :data:`SPECIAL_WORDS` and holds every emotion's own word; ``emotions`` gives an
    emotion's id by its place.

    Raises:
        ValueError: ``words`` breaks one of these rules or names a word twice.
    """

    def __init__(self, words: Sequence[str], emotions: Sequence[str]) -> None:
        self.words = tuple(words)
        self.emotions = tuple(emotions)
        self._ids = {word: i for i, word in enumerate(self.words)}
        if self.words[: len(SPECIAL_WORDS)] != SPECIAL_WORDS:
            raise ValueError(f"expected the words to start with {' '.join(SPECIAL_WORDS)}")
        if len(self._ids) != len(self.words):
            raise ValueError("expected every word once")
        if not self.emotions or len(set(self.emotions)) != len(self.emotions):
            raise ValueError("expected at least one emotion, and every emotion once")
        missing = [e for e in self.emotions if own_word(e) not in self._ids]
        if missing:
            raise ValueError(f"expected the word of every emotion, {missing[0]!r} is missing")

    @classmethod
    def from_counts(
        cls, counts: Mapping[str, int], emotions: Sequence[str], min_count: int = 1
    ) -> Vocabulary:
        """Words counted at least ``min_count`` times and the emotions' words, the most frequent first."""
        kept = {word for word, count in counts.items() if count >= min_count}
        kept |= {own_word(e) for e in emotions}
        kept -= set(SPECIAL_WORDS)
        return cls(SPECIAL_WORDS + tuple(sorted(kept, key=lambda w: (-counts.get(w, 0), w))), emotions)

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self._ids

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """Ids of ``tokens``; :data:`UNK` replaces a word that is not in the vocabulary."""
        return [self._ids.get(token, UNK) for token in tokens]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Words of ``ids``, the special ones dropped."""
        return [self.words[i] for i in ids if i >= len(SPECIAL_WORDS)]

    def text(self, ids: Iterable[int]) -> str:
        """Readable text of ``ids``, the special words dropped."""
        return detokenize(self.decode(ids))

    @cached_property
    def emotion_words(self) -> list[int]:
        """The id of each emotion's own word."""
        return self.encode(own_word(e) for e in self.emotions)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that identify this vocabulary."""
        content = json.dumps([self.words, self.emotions]).encode()
        return hashlib.sha256(content).hexdigest()[:16]

    def save(self, path: Path | str) -> None:
        """Write the vocabulary to ``path`` as JSON, atomically."""
        write_json(Path(path), {"emotions": self.emotions, "words": self.words})

    @classmethod
    def load(cls, path: Path | str) -> Vocabulary:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the file is missing or holds no vocabulary.
        """
        value = read_json(Path(path))
        try:
            words, emotions = value["words"], value["emotions"]
            if not all(isinstance(w, str) for w in (*words, *emotions)):
                raise ValueError("expected words and emotions to be text")
            return cls(words, emotions)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a vocabulary ({error})") from None


def own_word(emotion: str) -> str:
    """Return the word whose embedding represents an emotion: its name, in lower case."""
    return emotion.lower()
