"""Ratios of paired times, their intervals, and the slowdowns that these support."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.99
"""Of each interval. A comparison has several cases: at 95 % one in twenty would be wrong by chance."""
FEWEST_ROUNDS = 8
"""So many pairs are the fewest whose extremes make an interval of 99 %."""


@dataclasses.dataclass(frozen=True)
class Ratio:
    """HEAD's time over BASE's: the median of the rounds, with an interval for it.

    Attributes:
        low, high: a 99 % interval of the median that assumes no distribution (the sign test's, from two order
            statistics).
    """

    median: float
    low: float
    high: float

    def slower_by(self, percent: float) -> bool:
        """Return True for a slowdown of ``percent`` or more, the whole interval on the slow side."""
        return self.median >= 1 + percent / 100 and self.low > 1

    @property
    def verdict(self) -> str:
        if self.low > 1:
            return f"{100 * (self.median - 1):.1f} % slower"
        if self.high < 1:
            return f"{100 * (1 - self.median):.1f} % less time"
        return "no difference shown"


def ratio(base: Sequence[float], head: Sequence[float]) -> Ratio:
    """Return the ratio of paired seconds, the two of a round one after the other.

    Raises:
        ValueError: fewer than :data:`FEWEST_ROUNDS` pairs.
    """
    found = sorted(after / before for before, after in zip(base, head, strict=True))
    count = len(found)
    if count < FEWEST_ROUNDS:
        raise ValueError(f"expected at least {FEWEST_ROUNDS} rounds, got {count}")
    # The interval from the k-th smallest to the k-th largest misses the median with 2 P(Binomial(count, 1/2) < k).
    dropped, missed = 0, 2 * 0.5**count
    while True:
        missed += 2 * math.comb(count, dropped + 1) * 0.5**count
        if missed > 1 - CONFIDENCE:
            return Ratio(statistics.median(found), found[dropped], found[count - 1 - dropped])
        dropped += 1
