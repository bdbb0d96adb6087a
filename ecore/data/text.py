"""From text to words and back, as the literature on EmpatheticDialogues counts words."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nltk.tokenize import NLTKWordTokenizer
from nltk.tokenize.treebank import TreebankWordDetokenizer

_TOKENIZER = NLTKWordTokenizer()
_DETOKENIZER = TreebankWordDetokenizer()
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
_ENDS = frozenset(".?!")
_CLOSING_QUOTES = frozenset(("'", "''"))
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+")

# Most sentences are plain, and there one pattern does in a tenth of the time what the tokenizer's thirty do.
_PLAIN_SENTENCE = re.compile(r"(?:[a-z0-9]+,? )*[a-z0-9]+(?:\.|[?!]+)?")
_PLAIN_WORD = re.compile(r"[a-z0-9]+|[,.?!]")
_RUN_TOGETHER = re.compile(r"\b(?:cannot|gimme|gonna|gotta|lemme|wanna)\b")


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
    return _TOKENIZER.tokenize(sentence)


def detokenize(tokens: Iterable[str]) -> str:
    """Readable text from words: usual spacing, a capital where a sentence starts, "I".

    :func:`tokenize` finds the same words in it, but for a few with unusual marks.
    """
    sentences: list[list[str]] = [[]]
    starts_sentence = True
    for word in tokens:
        # Sentence by sentence: the detokenizer joins what follows a full stop to it, and "you.:)" has no word "you".
        before = sentences[-1][-1] if sentences[-1] else ""
        joined = word in _CLOSING_QUOTES or (before != "." and word in "?!)]}")
        if before in _ENDS and not joined:
            sentences.append([])
        sentences[-1].append(word.capitalize() if starts_sentence or word == "i" else word)
        if word in _ENDS:
            starts_sentence = True
        elif word[:1].isalnum():
            starts_sentence = False
    return " ".join(_DETOKENIZER.detokenize(words) for words in sentences)
