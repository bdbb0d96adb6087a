"""Emotional intensity of words: c = (η − 0.5)², η in [0, 1] its positivity (Section 3.2), from five sources."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

from ecore.data.vocabulary import SPECIAL_WORDS, UNK
from ecore.errors import InputError
from ecore.files import numbered_lines
from ecore.packages import needed

SOURCES = ("vader", "sentiwordnet", "vad", "skep", "none")
FILE_SOURCES = ("skep", "vad", "sentiwordnet")
"""Sources that a user brings as a file; each also takes one of two columns, word and η."""
NLTK_SENTIWORDNET = "corpora/sentiwordnet/SentiWordNet_3.0.0.txt"
"""Its place under one of ``nltk.data.path``, chosen by NLTK's downloader."""
MATCHED_SHARES = {0.075: 0.10, 0.15: 0.03}
"""The paper's thresholds, and the share of training contexts' words that may pass the one matched to it."""


def word_intensity(
    words: Sequence[str], source: str, file: Path | str | None = None
) -> npt.NDArray[np.float32]:
    """Intensity c of every word, float32 [V].

    A word that the source does not know is neutral: c = 0. Source ``none`` gives 1 everywhere. ``sentiwordnet`` without
    a file is NLTK's corpus, where that is installed.

    Raises:
        InputError: see :func:`expect_source`; or a malformed line in the file.
    """
    file = expect_source(source, file)
    if source == "none":
        return np.ones(len(words), dtype=np.float32)
    positivity = _vader() if file is None else read_positivity(file, source)
    eta = np.array([positivity.get(word, 0.5) for word in words], dtype=np.float64)
    return ((eta - 0.5) ** 2).astype(np.float32)


def expect_source(source: str, file: Path | str | None = None) -> Path | None:
    """The file of a source, None for one that has none; cheap, so that what is missing shows before long work.

    Raises:
        InputError: an unknown source, a missing or unexpected file, or a package that the source needs is missing.
    """
    if source not in SOURCES:
        raise InputError(f"intensity: expected one of {', '.join(SOURCES)}, got {source!r}")
    if source == "vader":
        _vader_module()
    if source == "sentiwordnet" and file is None:
        file = _nltk_sentiwordnet()
    if source in FILE_SOURCES and file is None:
        raise InputError(f"intensity: source {source} expects a file of word scores (--intensity-file)")
    if source not in FILE_SOURCES and file is not None:
        raise InputError(f"intensity: source {source} takes no file, got {file}")
    return None if file is None else Path(file)


def with_floor(intensity: npt.NDArray[np.float32], floor: float) -> npt.NDArray[np.float32]:
    """``intensity`` [V] with every word's at least ``floor``, unknown ones' too; other special words keep theirs.

    An edge with c = 0 stays 0 through all layers (Eq. 7 multiplies by it), and lexicons are silent on most
    words.

    Raises:
        InputError: a floor that is no intensity.
    """
    if not 0.0 <= floor <= 0.25:
        raise InputError(f"intensity_floor: expected a number in [0, 0.25], got {floor}")
    result = np.maximum(intensity, np.float32(floor))
    others = [i for i in range(len(SPECIAL_WORDS)) if i != UNK]
    result[others] = intensity[others]
    return result


def _nltk_sentiwordnet() -> Path:
    nltk = needed(
        "nltk", "intensity: source sentiwordnet without a file of word scores (--intensity-file)", "nltk"
    )
    try:
        return Path(str(nltk.data.find(NLTK_SENTIWORDNET)))
    except LookupError:
        raise InputError(
            "intensity: source sentiwordnet expects a file of word scores (--intensity-file) or NLTK's corpus "
            "(python -m nltk.downloader sentiwordnet)"
        ) from None


def _vader_module() -> ModuleType:
    return needed("vaderSentiment.vaderSentiment", "intensity: source vader", "vaderSentiment")


def _vader() -> dict[str, float]:
    """VADER's mean valence of −4…4 on η's scale."""
    lexicon = _vader_module().SentimentIntensityAnalyzer().lexicon
    return {word: (value + 4.0) / 8.0 for word, value in lexicon.items()}


def read_positivity(path: Path, source: str) -> dict[str, float]:
    """Read η per lower-case word from a file, ``.gz`` or plain, tabs between columns, perhaps with a header.

    Two columns are word and η, for every source. Beyond that, ``skep`` ignores further columns; ``vad`` takes
    NRC-VAD's word, valence, arousal and dominance (η is the valence); ``sentiwordnet`` takes SentiWordNet 3.0
    as distributed (POS, id, PosScore, NegScore, terms, gloss), or one line a term and part of speech (term,
    POS, positive, negative, two more means, number of senses). There η = 0.5 + (pos − neg)/2, senses weighted
    by 1/rank within a part of speech, parts of speech equally.

    Raises:
        InputError: the file is missing or unreadable, or a line is malformed or its score out of range.
    """
    scores: dict[str, float] = {}
    senses: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    width = 0
    for number, line in numbered_lines(path):
        if source == "sentiwordnet" and line.lstrip().startswith("#"):
            continue  # a comment may stand behind empty columns
        fields = line.split("\t")
        try:
            if not width:
                width = len(fields)
                score_column = 1 if source != "sentiwordnet" or width == 2 else 2
                _check_width(width, source)
                if not is_number(fields[score_column]):
                    continue
            if len(fields) != width:
                raise ValueError(f"{len(fields)} columns where the first line has {width}")
            if score_column == 1:
                scores[fields[0].lower()] = _unit(fields[1])
                continue
            balance = _unit(fields[2]) - _unit(fields[3])
            if width == 6:
                for term in fields[4].split():
                    word, _, rank = term.rpartition("#")
                    if not rank.isdecimal() or len(rank) > 4 or int(rank) == 0:
                        raise ValueError(f"term {term!r} has no rank")
                    senses[word.lower(), fields[0]].append((balance, 1.0 / int(rank)))
            else:
                senses[fields[0].lower(), fields[1]].append((balance, 1.0))
        except ValueError as error:
            raise InputError(f"{path}:{number}: {error}; expected {_expected(source)}") from None
    scores |= _balance(senses)
    if not scores:
        raise InputError(f"{path}: empty; expected {_expected(source)}")
    return scores


def _balance(senses: Mapping[tuple[str, str], list[tuple[float, float]]]) -> dict[str, float]:
    """η per word, from (pos − neg, weight) of every sense of a word and part of speech."""
    means: dict[str, list[float]] = defaultdict(list)
    for (word, _), entries in senses.items():
        means[word].append(sum(value * w for value, w in entries) / sum(w for _, w in entries))
    return {word: 0.5 + sum(values) / len(values) / 2 for word, values in means.items()}


def is_number(text: str | bytes) -> bool:
    """Return whether ``float`` reads ``text``: a header's column names it does not."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _unit(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"score {text} is outside 0 to 1")
    return value


def _check_width(width: int, source: str) -> None:
    known = {"sentiwordnet": width in (2, 6, 7), "vad": width in (2, 4), "skep": width >= 2}[source]
    if not known:
        raise ValueError(f"{width} columns")


def _expected(source: str) -> str:
    return (
        "word<TAB>score from 0 to 1"
        + {
            "sentiwordnet": ", or SentiWordNet 3.0's six columns",
            "vad": ", or NRC-VAD's word, valence, arousal and dominance",
            "skep": "",
        }[source]
    )


def matched_thresholds(
    intensity: npt.NDArray[np.float32], token_counts: npt.NDArray[np.int64]
) -> dict[float, float]:
    """For each of the paper's thresholds the one that as many words pass here.

    It is the lowest intensity at which no more than :data:`MATCHED_SHARES` of the tokens take part (c ≥
    threshold); where even the highest has more, one just above it.

    Args:
        intensity: c, [V].
        token_counts: how often each word occurs in the training contexts, [V].
    """
    values, inverse = np.unique(intensity, return_inverse=True)
    counts = np.bincount(inverse, weights=token_counts, minlength=len(values))
    passing = counts[::-1].cumsum()[::-1] / max(counts.sum(), 1)
    candidates = np.append(values, np.nextafter(values[-1], np.float32(np.inf)))
    passing = np.append(passing, 0.0)
    return {
        literal: float(candidates[np.argmax(passing <= share)]) for literal, share in MATCHED_SHARES.items()
    }
