"""Tables with a row for every word of a vocabulary, besides its embedding."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class WordTables(NamedTuple):
    """Properties of every word, besides its embedding; torch tensors.

    ``intensity`` float32 [V]: c of Section 3.2. ``related`` int32 [V, R]: related words, best first,
    PAD-padded; R may be 0. ``related_score`` float32 [V, R]: their scores, 0 where padded.
    """

    intensity: Tensor
    related: Tensor
    related_score: Tensor
