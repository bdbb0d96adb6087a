"""Answers without repeated sequences of words: the rule on hand-made answers, and each way of decoding under it."""

from __future__ import annotations

import math

import pytest
import torch

from ecore.data.vocabulary import BOS, EOS
from ecore.generation.decoding import Decoding
from ecore.generation.search import generate, without_repeats
from tests.ecore.generation.dialogues import CONTEXTS, real_batch
from tests.ecore.generation.table import WORDS, Table, every_answer, make_batch, pick


def repeats(answer: list[int] | tuple[int, ...], length: int) -> bool:
    """Return True if a sequence of ``length`` words comes twice."""
    sequences = [tuple(answer[i : i + length]) for i in range(len(answer) - length + 1)]
    return len(set(sequences)) < len(sequences)


@pytest.mark.parametrize(
    "length, forbidden",
    [
        (0, [[], []]),
        (1, [[5, 6, 7], [5, 6]]),
        (2, [[6, 7], [5, 6]]),  # "5 6" and "5 7" came; "6 5" and "6 6"
        (3, [[7], [5, 6]]),  # "6 5 7"; "6 6 6" and "6 6 5"
        (4, [[], []]),  # neither "7 6 5" nor "5 6 6" went on before
        (9, [[], []]),
    ],
)
def test_the_rule_by_hand(length: int, forbidden: list[list[int]]) -> None:
    words = torch.tensor([[5, 6, 5, 7, 6, 5], [6, 6, 6, 5, 6, 6]])
    scores = without_repeats(torch.zeros(2, 9), words, length)
    assert [(row == -math.inf).nonzero()[:, 0].tolist() for row in scores[:, 1:]] == [
        [word - 1 for word in row] for row in forbidden
    ]


def test_an_answer_can_always_end() -> None:
    """Finished answers hold EOS again and again, and are decoded until all are done."""
    words = torch.full((1, 5), EOS)
    assert without_repeats(torch.zeros(1, 9), words, 2)[0, EOS] == 0.0


@pytest.mark.parametrize("length", [1, 2, 3])
def test_greedy_takes_the_best_word_that_repeats_nothing(length: int) -> None:
    model, batch = Table(length=8, eos=-1.0), make_batch(20)
    answers = generate(model, batch, Decoding(max_length=8, no_repeat_ngram=length))
    for row, answer in enumerate(answers):
        expected: list[int] = []
        while len(expected) < 8:
            scores = model.logits(batch.context[row : row + 1], torch.tensor([[BOS, *expected]]))[0]
            options = [w for w in WORDS if not repeats([*expected, w], length)] + [EOS] * bool(expected)
            best = max(options, key=lambda word: scores[word])
            if best == EOS:
                break
            expected.append(best)
        assert answer == expected
    assert answers != generate(model, batch, Decoding(max_length=8))


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("length", [1, 2])
def test_wide_beam_finds_the_best_of_all_answers_that_repeat_nothing(power: float, length: int) -> None:
    """By the model's own probability, which is not shared out anew among the words that are left."""
    model, batch = Table(spread=1.5), make_batch(12)
    decoding = Decoding("beam", beams=200, length_penalty=power, max_length=4, no_repeat_ngram=length)
    answers = generate(model, batch, decoding)
    allowed = [a for a in every_answer(4) if not repeats([w for w in a if w != EOS], length)]
    for row, answer in enumerate(answers):
        best = max(allowed, key=lambda a: model.log_probability(batch.context[row], a) / len(a) ** power)
        assert tuple(answer) == tuple(w for w in best if w != EOS)


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_no_answer_repeats_and_a_batch_answers_as_each_alone(method: str, length: int) -> None:
    batch = make_batch(25)
    options = {"beams": 3} if method == "beam" else {}
    decoding = Decoding(method, max_length=9, seed=2, no_repeat_ngram=length, **options)
    answers = generate(Table(length=9, eos=-1.0), batch, decoding)
    assert not any(repeats(answer, length) for answer in answers)
    assert max(map(len, answers)) > length
    for row, answer in enumerate(answers):
        assert generate(Table(length=9, eos=-1.0), pick(batch, [row]), decoding) == [answer]


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_a_real_model(real, method: str) -> None:
    batch = real_batch(real, CONTEXTS)
    decoding = Decoding(method, max_length=20, seed=1, no_repeat_ngram=2)
    answers = generate(real, batch, decoding)
    assert not any(repeats(answer, 2) for answer in answers)
    for context, answer in zip(CONTEXTS, answers, strict=True):
        assert generate(real, real_batch(real, [context]), decoding) == [answer]


def test_without_a_repetition_nothing_changes() -> None:
    batch = make_batch(30)
    for method in ("greedy", "beam", "sample"):
        free = generate(Table(length=7), batch, Decoding(method, max_length=7, seed=4))
        kept = generate(Table(length=7), batch, Decoding(method, max_length=7, seed=4, no_repeat_ngram=3))
        for one, other in zip(free, kept, strict=True):
            if method != "beam" and not repeats(one, 3):
                assert one == other
        assert free != kept
