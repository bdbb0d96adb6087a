"""The numbers of the literature's tables, counted as the published systems count them.

Every function takes measurements and returns plain floats that are never NaN: no sample at all is an
:class:`~ecore.errors.InputError`, and a group without samples has the value None.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence, Sized
from typing import Any

import numpy as np
import numpy.typing as npt

from ecore.errors import InputError

LENGTH_BINS = (16, 32, 64, 128)
"""Last context length, in words, of each group but the open one; contexts have 36 words on average, 120 at
the 99th percentile."""


def perplexity(nll: npt.ArrayLike, tokens: npt.ArrayLike) -> tuple[float, float]:
    """``ppl`` and ``ppl_per_sample`` from each sample's summed negative log-likelihood and token count,
    both [n].

    ``ppl`` = exp(total NLL / total tokens). ``ppl_per_sample`` = exp(mean over samples of the sample's mean
    NLL): what the published code prints, and the one to compare with the papers' numbers.

    Raises:
        InputError: no samples, a sample without tokens, or an NLL that is not finite.
    """
    nll, tokens = _column(nll, "perplexity"), _column(tokens, "perplexity")
    if not (tokens > 0).all():
        raise InputError("perplexity: expected at least one token in every sample")
    if not np.isfinite(nll).all():
        raise InputError("perplexity: expected finite negative log-likelihoods")
    return float(np.exp(nll.sum() / tokens.sum())), float(np.exp((nll / tokens).mean()))


def distinct(responses: Sequence[Sequence[Hashable]], n: int) -> float:
    """Dist-n: distinct n-grams over all n-grams of the whole set of responses, times 100 (Li et al. 2016).

    0 where every response is shorter than ``n``.

    Raises:
        InputError: no responses.
    """
    _some(responses, "distinct")
    ngrams = [tuple(words[i : i + n]) for words in responses for i in range(len(words) - n + 1)]
    return 100.0 * len(set(ngrams)) / max(len(ngrams), 1)


def repetition(responses: Sequence[Sequence[Hashable]], n: int) -> float:
    """Rep-n: n-grams that came before in the same response over all n-grams of all responses, times 100.

    Dist-n counts a sentence that many responses share; this counts a response that says a thing twice. 0 where every
    response is shorter than ``n``.

    Raises:
        InputError: no responses.
    """
    _some(responses, "repetition")
    ngrams = [[tuple(words[i : i + n]) for i in range(len(words) - n + 1)] for words in responses]
    total = sum(map(len, ngrams))
    return 100.0 * (total - sum(len(set(one)) for one in ngrams)) / max(total, 1)


def mean_length(responses: Sequence[Sequence[Hashable]]) -> float:
    """Mean number of words of a response.

    Raises:
        InputError: no responses.
    """
    _some(responses, "mean_length")
    return sum(len(words) for words in responses) / len(responses)


def accuracy(predicted: Sequence[Hashable], true: Sequence[Hashable]) -> float:
    """Share of samples whose prediction is right, times 100.

    Raises:
        InputError: no samples.
    """
    _some(predicted, "accuracy")
    return 100.0 * sum(p == t for p, t in zip(predicted, true, strict=True)) / len(predicted)


def accuracy_by_emotion(
    predicted: Sequence[str], true: Sequence[str], emotions: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """For each emotion its ``samples``, their ``accuracy`` (None without any) and how often ``predicted``."""
    table = {}
    for emotion in emotions:
        right = [p == emotion for p, t in zip(predicted, true, strict=True) if t == emotion]
        table[emotion] = {
            "samples": len(right),
            "accuracy": 100.0 * sum(right) / len(right) if right else None,
            "predicted": sum(p == emotion for p in predicted),
        }
    return table


def accuracy_by_length(
    predicted: Sequence[str], true: Sequence[str], lengths: Sequence[int], bins: Sequence[int] = LENGTH_BINS
) -> list[dict[str, Any]]:
    """``words`` ("17-32"), ``samples`` and ``accuracy`` (None without samples) for groups of context length.

    ``bins`` rises and names the last length of each group but the open one.
    """
    groups = np.searchsorted(bins, lengths, side="left")
    table = []
    for group, first in enumerate((1, *(last + 1 for last in bins))):
        rows = np.flatnonzero(groups == group)
        right = [predicted[i] == true[i] for i in rows.tolist()]
        table.append(
            {
                "words": f"{first}-{bins[group]}" if group < len(bins) else f"{first}+",
                "samples": len(rows),
                "accuracy": 100.0 * sum(right) / len(right) if right else None,
            }
        )
    return table


def recall_at(ranked: Sequence[Sequence[str]], true: Sequence[set[str]], k: int | None = None) -> float:
    """R@k: mean number of true emotions among the first ``k`` of ``ranked`` (the paper's Table 3).

    With one true emotion a sample this is top-k accuracy as a fraction. ``k=None`` takes all that are
    listed: the relevant set of the hard strategy, which is scored as one number.

    Raises:
        InputError: no samples.
    """
    _some(ranked, "recall_at")
    return sum(len(set(names[:k]) & right) for names, right in zip(ranked, true, strict=True)) / len(ranked)


def _some(values: Sized, name: str) -> None:
    if len(values) == 0:
        raise InputError(f"{name}: expected at least one sample, got none")


def _column(values: npt.ArrayLike, name: str) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    _some(array, name)
    return array
