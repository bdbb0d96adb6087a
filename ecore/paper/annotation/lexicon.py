"""Dialogues' emotions by the words of the paper's Table 12 (Appendix A, Figure 2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ecore.data.corpus import Conversation
from ecore.data.emotion_words import TABLE_12, count_emotions
from ecore.errors import InputError


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
