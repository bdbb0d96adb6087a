"""The emotion words of the paper's Table 12, counted in dialogues."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from ecore.data.batches import Split
from ecore.data.text import tokenize
from ecore.data.vocabulary import Vocabulary
from ecore.packages import needed

# Fu et al. (2023), Table 12: words besides the emotion's own name, which is one of its words too. A word that the
# table lists under two emotions speaks for both.
TABLE_12 = {
    "afraid": "scared, alarmed, petrified, fearful",
    "angry": "mad, indignant, cross, irate",
    "annoyed": "irritated, miffed, nettled, peeved, pissed, riled, roiled, stung",
    "anticipating": "prediction, prevision, expect, prescience, expectation",
    "anxious": "concerned, nervous, uneasy, worried",
    "apprehensive": "perturbed, troubled, agitated, uneasy",
    "ashamed": "mortified, humiliated, abashed",
    "caring": "lovingness, loving, care, affectionate, sympathetic",
    "confident": "sure, convinced, certain, positive",
    "content": "satisfy, gratify, meet, satisfied",
    "devastated": "demolish, destroy, ravage, raze, ruin, wreck, desecrate, desolate, despoil",
    "disappointed": "defeated, discomfited, foiled, frustrated, thwarted",
    "disgusted": "sick of, tired of, outraged, appalled, offended, sickened, scandalized",
    "embarrassed": "awkward, cringe, abash, blush, discomfiture, chagrined",
    "excited": "aroused, ecstatic, elated, rapturous, euphoric, exhilarated",
    "faithful": "loyal, reliable, staunch, fidelity, honest, allegiance, faith",
    "furious": "enraged, ferocious, fierce, savage, infuriated, maddened, raging, tempestuous, wild",
    "grateful": "gratitude, grate, thankful, appreciative",
    "guilty": "criminal, blameworthy, fault, culpable, hangdog, shamefaced, shamed",
    "hopeful": "optimistic, promising, hope, aspirant, bright",
    "impressed": "awed, overcome, overwhelmed, dazzled, stunned",
    "jealous": "envious, covetous, envy",
    "joyful": "pleasant, agreeable, cheerful, elated, gleeful, jubilant",
    "lonely": "alone, lone, solitary, unfrequented, lonesome, desolate",
    "nostalgic": "homesick, wistful, maudlin, regretful",
    "prepared": "ready, disposed, inclined",
    "proud": "gallant, lofty, majestic, arrogant, haughty",
    "sad": "deplorable, distressing, lamentable, pitiful, sorry",
    "sentimental": "slushy, maudlin, bathetic, mushy, schmaltzy, soppy",
    "surprised": "astonish, astound, amaze, startle",
    "terrified": "panicky, panic-stricken, fright, frighted",
    "trusting": "trust, believable, believe, trusty",
}


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    return needed("nltk.stem", "matching emotion words by their stems", "nltk").PorterStemmer()


@cache
def _stem(word: str) -> str:
    return str(_stemmer().stem(word))


@lru_cache(maxsize=1)
def _emotions_of() -> dict[tuple[str, ...], list[str]]:
    """The emotions of every listed word or two words, by their stems."""
    index: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for emotion, words in TABLE_12.items():
        for phrase in (emotion, *words.split(", ")):
            stems = tuple(map(_stem, phrase.split()))
            if emotion not in index[stems]:
                index[stems].append(emotion)
    return dict(index)


def count_emotions(turns: Iterable[str]) -> Counter[str]:
    """Count the words of each emotion in ``turns``, in the order of first mention.

    Words are those of :func:`ecore.data.text.tokenize`; they match by Porter stem, so that "hopes",
    "hoping" and "hopeful" count as the same word, as do a few words that only share a stem with a listed one
    ("position" with "positive"). What a word is doing there is not looked at: "not afraid" counts as afraid,
    and a polite "sorry" as sad.
    """
    counts: Counter[str] = Counter()
    for turn in turns:
        counts.update(_named(tokenize(turn)))
    return counts


def _named(words: Sequence[str]) -> Iterator[str]:
    """Yield the emotions of the listed words, and of pairs of words, among ``words`` in a row."""
    emotions_of = _emotions_of()
    stems = [_stem(word) for word in words]
    for pair in zip_longest(stems, stems[1:]):
        yield from emotions_of.get(pair[:1], ())
        yield from emotions_of.get(pair, ())


def cooccurrence(emotions: Iterable[Iterable[str]], names: Sequence[str]) -> npt.NDArray[np.float64]:
    """In how many dialogues each pair of emotions occurs, [P, P], symmetric with a diagonal of 0.

    Args:
        emotions: the emotions of each dialogue, repetitions counted once; those that ``names`` lacks count nothing.
        names: the P emotions.
    """
    index = {name: i for i, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)))
    for present in emotions:
        rows = [index[name] for name in set(present) if name in index]
        counts[np.ix_(rows, rows)] += 1
    np.fill_diagonal(counts, 0)
    return counts


def word_cooccurrence(split: Split, vocabulary: Vocabulary) -> npt.NDArray[np.float64]:
    """In how many dialogues of ``split`` words of each pair of emotions occur, [P, P] as :func:`cooccurrence`'s.

    Dialogues are read as the model reads them, from the first turn to the last response; labels are not. Emotions that
    Table 12 lacks have no words.
    """
    words, names = vocabulary.words, vocabulary.emotions
    dialogues = (
        _named([words[i] for i in split.arrays.words[begin:end].tolist()]) for begin, end in split.dialogues()
    )
    return cooccurrence(dialogues, names)
