"""Commonsense: words related to a word, and the few shown to the model with a context (Appendix D)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ecore.data.intensity import is_number
from ecore.data.vocabulary import PAD, SPECIAL_WORDS
from ecore.errors import InputError
from ecore.files import numbered_lines

if TYPE_CHECKING:
    from ecore.data.word_tables import WordTables

MOST_WEIGHT = 1e6
"""Largest weight of a relation; ConceptNet's are under 100, and sums of these stay finite."""
MOST_CONCEPTS = 10
"""Related words kept for a word, and shown with a context."""

NEUTRAL_PREFERENCE = 0.2
"""Share of a relation's weight that a neutral word keeps; one with the strongest emotion keeps 1.2 times it."""

# Relations of form or place, or that negate what they link: KEMP leaves them out as well.
EXCLUDED_RELATIONS = frozenset(
    """Antonym AtLocation DerivedFrom DistinctFrom EtymologicallyDerivedFrom EtymologicallyRelatedTo
    ExternalURL FormOf LocatedNear NotCapableOf NotDesires NotHasA NotHasProperty NotIsA NotMadeOf RelatedForm
    SimilarSize SymbolOf""".split()  # noqa: SIM905
)

FUNCTION_WORDS = frozenset(
    """about above across after again against ago all almost along already also although always among and
    another any anybody anyone anything anyway are around away back because been before behind being below
    beside besides between beyond both but came can could did does doing done down during each either else
    enough even ever every everybody everyone everything few for from further get gets getting give given goes
    going gone gonna got had has have having hence her here hers herself him himself his how however indeed
    instead into its itself just keep least less let lot lots made make makes making many may maybe might mine
    more most much must myself near neither never nobody none nor not nothing now off often once one ones only
    onto other others our ours ourselves out over own per perhaps please put quite rather really same say see
    seem several shall she should since some somebody someone something sometimes soon still stuff such sure
    take than that the their theirs them themselves then there these they thing things think this those though
    through thus till together too took toward towards two under unless until upon use used using usually very
    was way well went were what whatever when whenever where whether which while who whole whom whose why will
    with within without would yes yet you your yours yourself""".split()  # noqa: SIM905
)
"""Words that carry no content: nothing is related to them, and they are related to nothing."""


def related_words(
    path: Path | str, words: Sequence[str], intensity: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """At most :data:`MOST_CONCEPTS` related words for each word, best first, and their scores.

    The file has tab-separated columns head, relation, tail, weight, and perhaps more; ``.gz`` or
    plain. Kept are pairs of two different content words of the vocabulary by a relation that does not deny or
    merely locate. In the spirit of KEMP (Li et al. 2022b), which ranks by confidence and emotion, a pair's
    score is

        w / (1 + w) · (0.2 + 2·√c)

    with w its weights' sum over relations and c the tail's intensity; 2·√c = |2η − 1| is 0 for a neutral word
    and 1 for the most emotional. Equal scores go alphabetically.

    Returns:
        ``related`` int32 [V, R], PAD-padded, and ``score`` float32 [V, R], 0 where padded.

    Raises:
        InputError: the file is missing or unreadable, or a line malformed.
    """
    path = Path(path)
    ids = {word: i for i, word in enumerate(words) if i >= len(SPECIAL_WORDS) and _has_content(word)}
    weights: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for number, line in numbered_lines(path):
        fields = line.split("\t")
        if number == 1 and len(fields) >= 4 and not is_number(fields[3]):
            continue  # the header
        if (
            len(fields) < 4 or not is_number(fields[3]) or not abs(float(fields[3])) <= MOST_WEIGHT
        ):  # NaN, too
            raise InputError(
                f"{path}:{number}: expected head, relation, tail and weight, parted by tabs, and a weight from "
                f"-{MOST_WEIGHT:g} to {MOST_WEIGHT:g}"
            )
        head, relation, tail, weight = fields[0], fields[1], fields[2], float(fields[3])
        i, j = ids.get(head), ids.get(tail)
        if i is not None and j is not None and i != j and weight > 0 and relation not in EXCLUDED_RELATIONS:
            weights[i][j] += weight
    preference = NEUTRAL_PREFERENCE + 2.0 * np.sqrt(intensity.astype(np.float64))
    related = np.full((len(words), MOST_CONCEPTS), PAD, dtype=np.int32)
    score = np.zeros((len(words), MOST_CONCEPTS), dtype=np.float32)
    for i, tails in weights.items():
        scored = {j: w / (1.0 + w) * preference[j] for j, w in tails.items()}
        best = sorted(scored, key=lambda j: (-scored[j], words[j]))[:MOST_CONCEPTS]
        related[i, : len(best)] = best
        score[i, : len(best)] = [scored[j] for j in best]
    return related, score


def _has_content(word: str) -> bool:
    return len(word) > 2 and word.isalpha() and word not in FUNCTION_WORDS


def select_related(context_ids: Sequence[int], tables: WordTables, most: int = MOST_CONCEPTS) -> list[int]:
    """At most ``most`` distinct words related to a context's words, none of them in the context, the best
    first.

    A word's score is the best that any context word gives it; equal scores go by id. ``tables`` lie on the
    CPU.
    """
    words = np.unique(np.asarray(context_ids, dtype=np.int64))
    related = tables.related.numpy()[words].ravel()
    score = tables.related_score.numpy()[words].ravel()
    new = (related != PAD) & ~np.isin(related, words)
    order = np.lexsort((related[new], -score[new]))
    return list(dict.fromkeys(related[new][order].tolist()))[:most]
