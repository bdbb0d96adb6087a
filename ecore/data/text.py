"""From text to words and back, as the literature on EmpatheticDialogues counts words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from ecore.packages import needed

_QUOTES = str.maketrans({"‘": "'", "’": "'", "´": "'", "`": "'", "“": '"', "”": '"'})

# Applied in this order to lower-case text. What is left of 's is the possessive.
_CONTRACTIONS = tuple(
    (re.compile(pattern), full)
    for pattern, full in (
        (r"\bwon't\b", "will not"),
        (r"\bcan't\b", "can not"),
        (r"\bshan't\b", "shall not"),
        (r"\bain't\b", "is not"),
        (r"\blet's\b", "let us"),
        (r"\by'all\b", "you all"),
        (r"n't\b", " not"),
        (r"'re\b", " are"),
        (r"'m\b", " am"),
        (r"'ll\b", " will"),
        (r"'ve\b", " have"),
        (r"'d\b", " would"),
        (r"\b(he|she|it|that|this|there|here|what|who|where|when|why|how)'s\b", r"\1 is"),
    )
)
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+")

# The tokenizer parts these words.
_PARTED = (("can", "not"), ("gim", "me"), ("gon", "na"), ("got", "ta"), ("lem", "me"), ("wan", "na"))

# Most sentences are plain, and there one pattern does in a tenth of the time what the tokenizer's thirty do.
_PLAIN_SENTENCE = re.compile(r"(?:[a-z0-9]+,? )*[a-z0-9]+(?:\.|[?!]+)?")
_PLAIN_WORD = re.compile(r"[a-z0-9]+|[,.?!]")
_RUN_TOGETHER = re.compile(rf"\b(?:{'|'.join(map(''.join, _PARTED))})\b")

# How words are joined.
_ENDS = frozenset(".?!")
_QUOTE = {"``": '"', "''": '"'}
_CLOSING_QUOTES = frozenset(("'", "''"))
_NO_SPACE_BEFORE = frozenset((*",;:?!)]}%", "'s", "n't", *_CLOSING_QUOTES))
_NO_SPACE_AFTER = frozenset((*"([{<$#", "``"))
_SMILEY = re.compile(r"(?<!\S)([:;]) ([()])(?!\S)")


def tokenize(text: str) -> list[str]:
    """Words of ``text``: lower case, contractions expanded, sentences parted, Treebank conventions."""
    text = " ".join(text.translate(_QUOTES).lower().split())
    if "'" in text:
        for pattern, full in _CONTRACTIONS:
            text = pattern.sub(full, text)
    return [word for sentence in _SENTENCE_END.split(text) for word in _sentence_words(sentence)]


def _sentence_words(sentence: str) -> list[str]:
    if _PLAIN_SENTENCE.fullmatch(sentence) and not _RUN_TOGETHER.search(sentence):
        return _PLAIN_WORD.findall(sentence)
    return list(_tokenizer().tokenize(sentence))


@cache
def _tokenizer() -> Any:
    purpose = "finding the words of a sentence with more than letters, digits, commas and a mark at its end"
    return needed("nltk.tokenize", purpose, "nltk").NLTKWordTokenizer()


def detokenize(tokens: Iterable[str]) -> str:
    """Readable text from words: usual spacing, a capital where a sentence starts, "I".

    :func:`tokenize` finds the same words in it, but for a few with unusual marks.
    """
    text = before = ""
    starts_sentence = True
    for word in _SMILEY.sub(r"\1\2", " ".join(tokens)).split(" "):
        if before and not _joined(before, word):
            text += " "
        text += _QUOTE.get(word) or (word.capitalize() if starts_sentence or word == "i" else word)
        if word in _ENDS:
            starts_sentence = True
        elif word[:1].isalnum():
            starts_sentence = False
        before = word
    return text


def _joined(before: str, word: str) -> bool:
    """Tell whether ``word`` follows ``before`` without a space."""
    if before in _NO_SPACE_AFTER or (before, word) in _PARTED:
        return True
    if before == ".":  # in "you.)" the tokenizer finds no word "you"
        return word in _CLOSING_QUOTES
    if not word.strip("."):
        return not before.endswith(".")  # dots behind dots are one word
    return word in _NO_SPACE_BEFORE
