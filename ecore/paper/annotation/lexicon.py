"""The emotion words of the paper's Table 12, counted in dialogues (Appendix A, Figure 2)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import zip_longest
from typing import Any

from ecore.data.corpus import Conversation
from ecore.data.text import tokenize
from ecore.errors import InputError
from ecore.packages import needed

# Fu et al. (2023), Table 12: words beside the emotion's own name, which is a word of it too. A word that the
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
    "hoping" and "hopeful" count alike, as do a few words that only share a stem with a listed one
    ("position" with "positive"). What a word is doing there is not looked at: "not afraid" counts as afraid,
    and a polite "sorry" as sad.
    """
    counts: Counter[str] = Counter()
    emotions_of = _emotions_of()
    for turn in turns:
        stems = [_stem(word) for word in tokenize(turn)]
        for pair in zip_longest(stems, stems[1:]):
            counts.update(emotions_of.get(pair[:1], ()))
            counts.update(emotions_of.get(pair, ()))
    return counts


@dataclass(frozen=True)
class SecondaryEmotions:
    """The counts of Figure 2. ``by_number[n]``: conversations with exactly n secondary emotions, n from 0 without
    gaps; ``samples``: all of them; ``share``: percentage with at least one; ``any_word``: conversations with a
    listed word of any emotion, the labelled one included."""

    by_number: tuple[int, ...]
    any_word: int

    @property
    def samples(self) -> int:
        return sum(self.by_number)

    @property
    def share(self) -> float:
        return 100.0 * (1 - self.by_number[0] / self.samples)


def secondary_emotions(conversations: Sequence[Conversation]) -> SecondaryEmotions:
    """Count the emotions in each conversation's words other than the labelled one (Figure 2).

    All turns of both sides are counted, the situation is not. The paper prints a share of 84.04 % without
    telling how words were matched.

    Raises:
        InputError: no conversations.
    """
    if not conversations:
        raise InputError("secondary_emotions: expected at least one conversation, got none")
    numbers: Counter[int] = Counter()
    any_word = 0
    for conversation in conversations:
        found = set(count_emotions(conversation.turns))
        any_word += bool(found)
        numbers[len(found - {conversation.emotion})] += 1
    return SecondaryEmotions(tuple(numbers[n] for n in range(max(numbers) + 1)), any_word)


class LexiconAnnotator:
    """Annotates with the emotions whose words a dialogue holds: the most words first, then the first
    mentioned.

    Args:
        emotions: the emotions that there are; words of others are passed over.

    Raises:
        InputError: Table 12 has words for none of them.
    """

    name = "lexicon"

    def __init__(self, emotions: Collection[str] = tuple(TABLE_12)) -> None:
        self._emotions = frozenset(emotions) & TABLE_12.keys()
        if not self._emotions:
            raise InputError(
                f"lexicon: no words for {', '.join(emotions)}; expected emotions of EmpatheticDialogues"
            )

    def annotate(self, conversation: Conversation) -> tuple[str, ...]:
        """The emotions of ``conversation``'s turns; none where no listed word occurs."""
        ranked = count_emotions(conversation.turns).most_common()
        return tuple(emotion for emotion, _ in ranked if emotion in self._emotions)
