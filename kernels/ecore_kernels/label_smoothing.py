"""Label smoothing as a distribution over classes: the target probability of each class in a cross entropy."""

from __future__ import annotations

from typing import NamedTuple


class Goal(NamedTuple):
    """The target distribution: ``base`` on every class but ``hole``, and ``extra`` more on the target.

    Attributes:
        hole: the class that smoothing leaves out; -1 for none.
        spread: number of classes that have ``base``.
    """

    base: float
    extra: float
    hole: int
    spread: int

    @property
    def mass(self) -> float:
        """The sum of the distribution: 1, unless smoothing counts other classes than it is spread over."""
        return self.extra + self.base * self.spread


def goal_of(classes: int, label_smoothing: float, smoothing_classes: int | None, ignore_index: int) -> Goal:
    """Return the distribution that :func:`ecore_kernels.linear_cross_entropy` describes.

    Args:
        classes: V, all of them.
    """
    if smoothing_classes is None:
        return Goal(label_smoothing / classes, 1.0 - label_smoothing, -1, classes)
    base = label_smoothing / smoothing_classes if label_smoothing else 0.0
    hole = ignore_index if 0 <= ignore_index < classes else -1
    return Goal(base, 1.0 - label_smoothing - base, hole, classes - (hole >= 0))
