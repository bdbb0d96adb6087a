"""Agreement of annotators: Krippendorff's alpha, with the MASI distance where answers are sets of emotions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

from ecore.errors import InputError
from ecore.packages import needed

_PURPOSE = "the annotators' agreement"


def alpha(
    answers: Sequence[tuple[str, Hashable, Hashable]],
    distance: Callable[[Any, Any], float] | None = None,
) -> float | None:
    """Krippendorff's alpha of (annotator, item, answer): 1 is agreement, 0 what chance gives, below 0 less.

    Items that only one annotator answered do not count. None where alpha is not defined: all answers that count
    are the same, or there are none.
    """
    times: dict[Hashable, int] = {}
    for _, item, _ in answers:
        times[item] = times.get(item, 0) + 1
    counted = [answer for answer in answers if times[answer[1]] > 1]
    if len({answer for _, _, answer in counted}) < 2:
        return None
    if distance is None:
        distance = needed("nltk.metrics.distance", _PURPOSE, "nltk").binary_distance
    task = needed("nltk.metrics.agreement", _PURPOSE, "nltk").AnnotationTask
    # NLTK sorts items, which may be of any type here.
    numbers = {item: number for number, item in enumerate(times)}
    return float(task([(a, numbers[item], x) for a, item, x in counted], distance).alpha())


def label_agreement(files: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, Any]:
    """Return the agreement of two or more annotators; the order within a conversation does not count.

    Args:
        files: of each annotator the emotions of each conversation, by its id.

    Returns:
        ``pairs``: for each two annotators their ``names``, ``conversations`` that both annotated, ``alpha``
        (MASI distance, Passonneau 2006; None where not defined), ``jaccard``, the mean overlap (1 for two empty
        sets), and ``same``, the percentage with equal sets; ``alpha`` over all annotators; ``emotions_per_sample`` of
        each annotator over all that it annotated.

    Raises:
        InputError: fewer than two annotators, or two that share no conversation.
    """
    if len(files) < 2:
        raise InputError(f"agreement: expected at least two annotators, got {len(files)}")
    sets = {name: {i: frozenset(e) for i, e in labels.items()} for name, labels in files.items()}
    pairs = []
    for (first, a), (second, b) in combinations(sets.items(), 2):
        both = [(a[i], b[i]) for i in a if i in b]
        if not both:
            raise InputError(f"agreement: {first} and {second} share no conversation")
        pairs.append(
            {
                "names": [first, second],
                "conversations": len(both),
                "alpha": alpha(_answers({first: a, second: b}), _set_distance),
                "jaccard": sum(len(x & y) / len(x | y) if x | y else 1.0 for x, y in both) / len(both),
                "same": 100.0 * sum(x == y for x, y in both) / len(both),
            }
        )
    return {
        "pairs": pairs,
        "alpha": alpha(_answers(sets), _set_distance),
        "emotions_per_sample": {n: sum(map(len, e.values())) / len(e) for n, e in sets.items()},
    }


def _answers(sets: Mapping[str, Mapping[str, frozenset[str]]]) -> list[tuple[str, str, frozenset[str]]]:
    return [
        (name, conv_id, emotions) for name, labels in sets.items() for conv_id, emotions in labels.items()
    ]


def _set_distance(first: frozenset[str], second: frozenset[str]) -> float:
    """MASI; two empty sets, on which NLTK divides by zero, are the same."""
    if first == second:
        return 0.0
    return float(needed("nltk.metrics.distance", _PURPOSE, "nltk").masi_distance(first, second))
