"""Sampled answers: they follow the seed and the context alone, in the shares of the limits."""

from __future__ import annotations

import math

import pytest
import torch

from ecore.data.vocabulary import EOS
from ecore.generation.decoding import Decoding
from ecore.generation.search import generate
from tests.ecore.generation.table import SIZE, WORDS, Table, make_batch, pick


@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 1.7}])
def test_sample_follows_seed_and_context_alone(limits: dict[str, float]) -> None:
    model, batch = Table(), make_batch(30)
    decoding = Decoding("sample", max_length=5, seed=11, **limits)
    answers = generate(model, batch, decoding)
    assert answers == generate(model, batch, decoding)
    assert answers != generate(model, batch, Decoding("sample", max_length=5, seed=12, **limits))
    some = [17, 3, 25]
    wider = pick(make_batch(30, width=9), some)
    assert generate(model, wider, decoding) == [answers[row] for row in some]


def test_sample_without_seed_follows_torch() -> None:
    model, batch = Table(), make_batch(30)
    torch.manual_seed(5)
    first = generate(model, batch, Decoding("sample", max_length=5))
    assert first != generate(model, batch, Decoding("sample", max_length=5))
    torch.manual_seed(5)
    assert first == generate(model, batch, Decoding("sample", max_length=5))


class Fixed(Table):
    """The same probabilities whatever came before: 5, 6, 7 in the proportion 5 : 3 : 2."""

    def __init__(self) -> None:
        self.scores = torch.full((SIZE,), 40.0, dtype=torch.float64)
        self.scores[EOS] = -math.inf
        self.scores[list(WORDS)] = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64).log()

    def logits(self, context: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return self.scores.repeat(len(context), 1)


@pytest.mark.parametrize(
    "limits, expected",
    [
        ({}, (0.3, 0.5, 0.2)),
        ({"temperature": 0.5}, (0.09 / 0.38, 0.25 / 0.38, 0.04 / 0.38)),
        ({"temperature": 1e-30}, (0.0, 1.0, 0.0)),
        ({"top_k": 2}, (3 / 8, 5 / 8, 0.0)),
        ({"top_k": 50}, (0.3, 0.5, 0.2)),
        ({"top_p": 0.4}, (0.0, 1.0, 0.0)),
        ({"top_p": 0.6}, (3 / 8, 5 / 8, 0.0)),
        ({"top_p": 0.85}, (0.3, 0.5, 0.2)),
        ({"top_k": 2, "top_p": 0.6}, (0.0, 1.0, 0.0)),
    ],
)
def test_sampled_shares(limits: dict[str, float], expected: tuple[float, ...]) -> None:
    answers = generate(Fixed(), make_batch(1500), Decoding("sample", max_length=8, seed=0, **limits))
    flat = torch.tensor([word for answer in answers for word in answer])
    assert len(flat) == 12_000
    for word, share in zip(WORDS, expected, strict=True):
        # Five standard deviations; exact where a word must or must not come.
        allowed = 5 * math.sqrt(share * (1 - share) / len(flat))
        assert abs(float((flat == word).double().mean()) - share) <= allowed


def test_top_p_over_a_vocabulary_larger_than_it_sorts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are the same whether the likeliest are found among a few, among more or by sorting all."""
    answers = []
    for first in (1, 3, 400):
        monkeypatch.setattr("ecore.generation.sampling.NUCLEUS", first)
        model = Table(size=400, spread=3.0)
        answers.append(generate(model, make_batch(30), Decoding("sample", max_length=5, seed=2, top_p=0.9)))
    assert answers[0] == answers[1] == answers[2]
    assert len({word for answer in answers[0] for word in answer}) > 50
