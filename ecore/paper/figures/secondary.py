"""Figure 2: the number of dialogues whose words name emotions other than the labelled one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ecore.data.corpus import Conversation
from ecore.data.emotion_words import count_emotions
from ecore.errors import InputError
from ecore.paper.figures.drawing import INK, name_ticks, new_figure, styled
from ecore.progress import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 5
"""Dialogues with this many secondary emotions or more are one group."""


class Mentions(NamedTuple):
    """A dialogue's labelled emotion, and the emotions whose words it holds."""

    emotion: str
    found: frozenset[str]


def mentions(conversations: Sequence[Conversation], progress: bool = True) -> list[Mentions]:
    """Find Table 12's words in all turns of each conversation (the situation is not read)."""
    bar = tqdm(conversations, "count emotion words", unit=" dialogues", disable=None if progress else True)
    return [Mentions(c.emotion, frozenset(count_emotions(c.turns))) for c in bar]


@dataclass(frozen=True)
class SecondaryShares:
    """``by_emotion[emotion][n]``: dialogues labelled ``emotion`` that hold words of exactly n others."""

    by_emotion: dict[str, tuple[int, ...]]

    @property
    def by_number(self) -> tuple[int, ...]:
        """Dialogues with exactly n secondary emotions, whatever their label."""
        return tuple(map(sum, zip(*self.by_emotion.values(), strict=True)))

    def shares(self) -> dict[str, float]:
        """Percentage of each emotion's dialogues with at least one secondary emotion, the highest first."""
        found = {emotion: _share(numbers) for emotion, numbers in self.by_emotion.items()}
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    @property
    def share(self) -> float:
        """Percentage of all dialogues with at least one secondary emotion."""
        return _share(self.by_number)

    def to_json(self) -> dict[str, Any]:
        """Counts and percentages."""
        counts = {"dialogues": sum(self.by_number), "by_number": self.by_number, "share": self.share}
        return counts | {"shares": self.shares(), "by_emotion": self.by_emotion}


def _share(numbers: Sequence[int]) -> float:
    return 100.0 * sum(numbers[1:]) / sum(numbers)


def secondary_shares(found: Iterable[Mentions]) -> SecondaryShares:
    """Count secondary emotions by labelled emotion.

    Raises:
        InputError: no dialogues.
    """
    counted: dict[str, Counter[int]] = {}
    for emotion, emotions in found:
        counted.setdefault(emotion, Counter())[len(emotions - {emotion})] += 1
    if not counted:
        raise InputError("figure 2: expected at least one dialogue, got none")
    most = max(max(numbers) for numbers in counted.values())
    return SecondaryShares({e: tuple(counted[e][n] for n in range(most + 1)) for e in sorted(counted)})


@styled
def draw_secondary(shares: SecondaryShares) -> Figure:
    """Figure 2: (a) dialogues by their number of secondary emotions, (b) the share with any, by labelled emotion."""
    numbers = shares.by_number
    samples = sum(numbers)
    parts = [*numbers[:MOST], *[0] * (MOST - len(numbers)), sum(numbers[MOST:])]
    emotions = shares.shares()
    figure = new_figure(9.0, max(3.2, 0.165 * len(emotions) + 1.0))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    figure.subplots_adjust(0.07, 0.1, 0.98, 0.92, wspace=0.4)

    bars = left.bar(
        range(MOST + 1), [100 * n / samples for n in parts], color="#9ecae1", edgecolor=INK, linewidth=0.6
    )
    left.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    left.set_xticks(range(MOST + 1), [*map(str, range(MOST)), f"≥ {MOST}"])
    left.set_xlabel("secondary emotions")
    left.set_ylabel("% of dialogues")
    left.set_title(
        f"(a) {samples:,} dialogues: {shares.share:.2f} % with a secondary emotion", fontsize=8, loc="left"
    )

    rows = range(len(emotions))
    ends = [0.0] * len(emotions)
    for label, first, last, color, hatch in (
        ("one", 1, 2, "#deebf7", ""),
        ("two", 2, 3, "#9ecae1", "////"),
        ("three or more", 3, None, "#4292c6", ""),
    ):
        counts = [shares.by_emotion[emotion] for emotion in emotions]
        widths = [100 * sum(n[first:last]) / sum(n) for n in counts]
        right.barh(
            rows, widths, left=ends, color=color, hatch=hatch, edgecolor=INK, linewidth=0.5, label=label
        )
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    edge = 1.12 * max(*emotions.values(), 1.0)
    for row, share in enumerate(emotions.values()):
        right.text(edge, row, f"{share:.1f}", fontsize=7, va="center", ha="right")
    right.axvline(shares.share, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))
    right.set_xlim(0, edge)
    right.set_ylim(len(emotions) - 0.4, -0.6)
    name_ticks(right, "y", list(emotions), fontsize=7)
    right.set_xlabel("% of the emotion's dialogues (dashed line: all dialogues)")
    right.set_title("(b) with secondary emotions, by labelled emotion", fontsize=8, loc="left")
    kinds = right.get_legend_handles_labels()
    left.legend(
        *kinds,
        title="secondary emotions in (b)",
        title_fontsize=7,
        fontsize=7,
        loc="upper right",
        frameon=False,
    )
    return figure
