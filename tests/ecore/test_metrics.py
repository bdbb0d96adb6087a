"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from ecore import metrics
from ecore.errors import InputError


def test_perplexities_weigh_tokens_and_samples() -> None:
    # Sample means are 1 and 3: mean 2. Over tokens: (2 + 24) / 10.
    ppl, per_sample = metrics.perplexity([2.0, 24.0], [2, 8])
    assert ppl == pytest.approx(math.exp(2.6), rel=1e-12)
    assert per_sample == pytest.approx(math.exp(2.0), rel=1e-12)


def test_distinct_counts_over_the_whole_set() -> None:
    responses = [["i", "am", "i", "am"], ["i", "am"], ["oh"]]
    assert metrics.distinct(responses, 1) == pytest.approx(100 * 3 / 7)
    # i-am, am-i, i-am, i-am: none runs from one response into the next.
    assert metrics.distinct(responses, 2) == pytest.approx(100 * 2 / 4)
    assert metrics.distinct(responses, 5) == 0.0
    assert metrics.mean_length(responses) == pytest.approx(7 / 3)


def test_repetition_counts_within_a_response() -> None:
    responses = [["i", "am", "i", "am", "i"], ["i", "am"], ["i", "am", "i"]]
    # i-am am-i i-am am-i: two came before; the other responses repeat nothing of their own.
    assert metrics.repetition(responses, 2) == pytest.approx(100 * 2 / 7)
    assert metrics.repetition(responses, 3) == pytest.approx(100 * 1 / 4)
    assert metrics.repetition(responses, 9) == 0.0
    with pytest.raises(InputError, match="repetition: expected at least one sample"):
        metrics.repetition([], 3)


def test_accuracies() -> None:
    true = ["sad", "sad", "sad", "joyful"]
    predicted = ["sad", "joyful", "sad", "sad"]
    assert metrics.accuracy(predicted, true) == 50.0
    table = metrics.accuracy_by_emotion(predicted, true, ["joyful", "proud", "sad"])
    assert table["sad"] == {"samples": 3, "accuracy": pytest.approx(200 / 3), "predicted": 3}
    assert table["joyful"] == {"samples": 1, "accuracy": 0.0, "predicted": 1}
    assert table["proud"] == {"samples": 0, "accuracy": None, "predicted": 0}


def test_accuracy_by_length_puts_the_edge_in_the_lower_group() -> None:
    table = metrics.accuracy_by_length(list("aaabc"), list("abaab"), [1, 4, 5, 8, 9], bins=(4, 8, 20))
    assert table == [
        {"words": "1-4", "samples": 2, "accuracy": 50.0},
        {"words": "5-8", "samples": 2, "accuracy": 50.0},
        {"words": "9-20", "samples": 1, "accuracy": 0.0},
        {"words": "21+", "samples": 0, "accuracy": None},
    ]


def test_recall_is_a_mean_number_of_emotions() -> None:
    ranked = [["sad", "lonely", "angry"], ["proud", "joyful", "sad"]]
    true = [{"lonely", "sad"}, {"sad"}]
    assert metrics.recall_at(ranked, true, 1) == 0.5
    assert metrics.recall_at(ranked, true, 2) == 1.0
    assert metrics.recall_at(ranked, true, 3) == 1.5
    assert metrics.recall_at([["sad"], []], true) == 0.5


def test_nothing_to_measure_is_an_error_and_never_nan() -> None:
    for call in (
        lambda: metrics.perplexity([], []),
        lambda: metrics.perplexity([1.0], [0]),
        lambda: metrics.perplexity([math.nan], [1]),
        lambda: metrics.distinct([], 1),
        lambda: metrics.mean_length([]),
        lambda: metrics.accuracy([], []),
        lambda: metrics.recall_at([], [], 1),
    ):
        with pytest.raises(InputError):
            call()
