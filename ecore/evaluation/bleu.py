"""BLEU-4 (Papineni et al. 2002) by sacrebleu, on the words that Dist-n counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ecore.errors import InputError
from ecore.packages import needed

INSTALL = "'ecore[experiments]'"
"""The package that BLEU needs. It brings four more, one of them compiled, so it is an extra."""


def bleu_4(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return ``bleu_4``, corpus BLEU-4 from 0 to 100, and ``bleu_signature``, sacrebleu's name for how it counts.

    Each response has one reference, and words are taken as they are (``tok:none``). BLEU grows with the case and the
    tokens that are counted, so it compares only under one signature and one tokenizer. Where sacrebleu is missing
    both are None: a run is evaluated all the same.

    Args:
        predictions, references: the words of each, in the same order.
    """
    try:
        metrics = needed("sacrebleu.metrics", "BLEU-4", INSTALL)
    except InputError:
        return {"bleu_4": None, "bleu_signature": None}
    metric = metrics.BLEU(tokenize="none", force=True)  # force: the words are meant to be tokens already
    texts = [[" ".join(words) for words in spoken] for spoken in (predictions, references)]
    score = metric.corpus_score(texts[0], [texts[1]]).score
    return {"bleu_4": float(score), "bleu_signature": str(metric.get_signature())}
