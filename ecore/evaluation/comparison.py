"""Two models on the same samples: differences of metrics, with intervals of a paired bootstrap over samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ecore.errors import InputError
from ecore.evaluation.predictions import Record, has_emotions, read_predictions
from ecore.packages import needed

CONFIDENCE = 0.95
MOST_NLL = 700.0  # exp of it is still a number
RESAMPLES_AT_ONCE = 200  # some 8 MB an array for a test split


class Difference(NamedTuple):
    """A metric of two models on the same samples, and the interval of ``second`` minus ``first``."""

    metric: str
    first: float
    second: float
    low: float
    high: float


def predictions_of(path: Path) -> Path:
    """Return the predictions file of a run's test split, of an evaluation's folder, or ``path`` itself."""
    for file in (path / "evaluation-test" / "predictions.jsonl", path / "predictions.jsonl"):
        if file.exists():
            return file
    if path.is_dir():
        raise InputError(f"{path}: no predictions in it; `ecore evaluate` writes them")
    return path


def paired_records(first: Path, second: Path) -> tuple[list[Record], list[Record]]:
    """Read two predictions files of the same samples in the same order.

    Raises:
        InputError: a file that cannot be read, or other samples: another number, context or reference.
    """
    one, other = read_predictions(first), read_predictions(second)
    if len(one) != len(other):
        raise InputError(f"{second}: expected the {len(one):,} samples of {first}, got {len(other):,}")
    for number, (a, b) in enumerate(zip(one, other, strict=True), start=1):
        if any(a.get(name) != b.get(name) for name in ("reference", "context", "tokens")):
            raise InputError(
                f"{second}: sample {number}: not the sample of {first}, or counted in other words"
            )
    return one, other


def compare(
    first: Sequence[Record], second: Sequence[Record], resamples: int = 10_000, seed: int = 0
) -> list[Difference]:
    """Compare two models' records of the same samples.

    Perplexities where both have ``nll`` and ``tokens``, accuracy where both perceive emotions. The interval covers what
    another draw of test samples could change; other seeds of training are a further source of difference.

    Args:
        resamples: draws of n samples with replacement, the same for both models.
        seed: of the draws.

    Raises:
        InputError: the records share no metric, are fewer than two, or hold numbers that are no losses and counts; or
            SciPy is not installed.
    """
    stats = needed("scipy.stats", "the paired bootstrap", "'ecore[experiments]'")
    metrics: list[tuple[str, list[np.ndarray], Callable[..., np.ndarray]]] = []
    both = [*first, *second]
    if all("nll" in record and "tokens" in record for record in both):
        tokens = _column(first, "tokens")  # [n], equal in both
        nll = [_column(records, "nll") for records in (first, second)]  # [n] each
        if not (tokens > 0).all():
            raise InputError("compare: expected at least one token in every sample")
        if max((x / tokens).max() for x in nll) > MOST_NLL:
            raise InputError(f"compare: expected at most {MOST_NLL:g} as 'nll' of a token, in nats")
        metrics.append(("ppl_per_sample", [x / tokens for x in nll], _exponential_of_mean))
        metrics.append(("ppl", [np.stack([x, tokens]) for x in nll], _exponential_of_ratio))
    if all(has_emotions(record) for record in both):
        right = [
            np.array([100.0 * (r["predicted_emotion"] == r["emotion"]) for r in x]) for x in (first, second)
        ]
        metrics.append(("accuracy, %", right, lambda x, axis: x.mean(axis=axis)))
    if not metrics:
        raise InputError("compare: the records share neither nll and tokens nor perceived emotions")
    if len(first) < 2:
        raise InputError(f"compare: expected at least two samples to draw from, got {len(first)}")

    differences = []
    for name, (one, other), metric in metrics:
        columns = [*np.atleast_2d(one), *np.atleast_2d(other)]  # [n] each
        half = len(columns) // 2

        def difference(
            *drawn: np.ndarray, axis: int, half: int = half, metric: Callable[..., np.ndarray] = metric
        ):
            return metric(*drawn[half:], axis=axis) - metric(*drawn[:half], axis=axis)

        interval = stats.bootstrap(
            columns,
            difference,
            n_resamples=resamples,
            batch=RESAMPLES_AT_ONCE,
            paired=True,
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="percentile",
            random_state=seed,
        ).confidence_interval
        values = (float(metric(*part, axis=0)) for part in (columns[:half], columns[half:]))
        differences.append(
            Difference(name, next(values), next(values), float(interval.low), float(interval.high))
        )
    return differences


def _column(records: Sequence[Record], name: str) -> np.ndarray:
    try:
        return np.array([float(record[name]) for record in records])
    except (TypeError, ValueError):
        raise InputError(f"compare: expected numbers as {name!r} of every sample") from None


def _exponential_of_mean(mean_nll: np.ndarray, axis: int) -> np.ndarray:
    return np.exp(mean_nll.mean(axis=axis))


def _exponential_of_ratio(nll: np.ndarray, tokens: np.ndarray, axis: int) -> np.ndarray:
    return np.exp(nll.sum(axis=axis) / tokens.sum(axis=axis))
