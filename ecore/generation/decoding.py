"""Settings of decoding; light to import, for the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ecore.config import setting
from ecore.errors import InputError
from ecore.ranges import check

METHODS = ("greedy", "beam", "sample")


@dataclass(frozen=True)
class Decoding:
    """Settings of decoding.

    Raises:
        InputError: a value out of range, or ``top_k``, ``top_p`` or ``temperature`` where nothing is sampled.
    """

    method: str = setting("greedy", "how words are chosen", METHODS)
    beams: int = setting(4, "beam: hypotheses kept alive")
    length_penalty: float = setting(1.0, "beam: power of the length that log-probabilities are divided by")
    top_k: int = setting(0, "sample: only among the k likeliest words (0: all)")
    top_p: float = setting(1.0, "sample: only among the likeliest words that together have this probability")
    temperature: float = setting(1.0, "sample: divides the scores; under 1 is more certain")
    max_length: int = setting(30, "words of an answer at most")
    no_repeat_ngram: int = setting(
        0,
        "no sequence of this many words comes twice in an answer (0: any may; with a backbone, of subwords)",
    )
    seed: int | None = setting(None, "sample: seed (default: from torch's own generator)")

    def __post_init__(self) -> None:
        check(self)
        if self.method != "sample":
            for name, unset in (("top_k", 0), ("top_p", 1.0), ("temperature", 1.0)):
                if getattr(self, name) != unset:
                    raise InputError(f"{name}: only for method 'sample', the method is {self.method!r}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Decoding:
        """Return the decoding with the settings ``options``.

        Raises:
            InputError: a name that is no setting, or as for :class:`Decoding`.
        """
        names = [field.name for field in fields(cls)]
        for name in options:
            if name not in names:
                raise InputError(f"{name}: no such option of decoding; expected one of {', '.join(names)}")
        return cls(**options)
