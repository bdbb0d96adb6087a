"""Decoding, against a table of probabilities small enough to enumerate."""

from __future__ import annotations

import math

import pytest
import torch

from ecore.data.vocabulary import BOS, EOS
from ecore.errors import InputError
from ecore.generation.decoding import Decoding
from ecore.generation.search import _Steps, generate
from tests.ecore.generation.table import WORDS, Table, every_answer, make_batch


def test_greedy_takes_the_best_allowed_word_and_stops_at_eos() -> None:
    model, batch = Table(length=6, eos=1.0), make_batch(20)
    answers = generate(model, batch, Decoding(max_length=6))
    for row, answer in enumerate(answers):
        expected: list[int] = []
        while len(expected) < 6:
            scores = model.logits(batch.context[row : row + 1], torch.tensor([[BOS, *expected]]))[0]
            options = WORDS if not expected else (EOS, *WORDS)
            best = max(options, key=lambda word: scores[word])
            if best == EOS:
                break
            expected.append(best)
        assert answer == expected
    assert len({len(a) for a in answers}) > 3  # otherwise the case is too easy


def test_rows_that_are_done_cost_nothing() -> None:
    model = Table(length=20, eos=1.5)
    generate(model, make_batch(40), Decoding(max_length=20))
    stepped = model.cache.stepped
    assert stepped[0] == 40
    assert stepped[-1] < 10
    assert sum(stepped) < 0.5 * 40 * 20


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
@pytest.mark.parametrize("max_length", [1, 2, 5])
def test_length_limit_no_empty_answer_no_special_word(method: str, max_length: int) -> None:
    for eos in (-2.0, 30.0):  # an end that hardly ever comes, and one that always would
        answers = generate(Table(eos=eos), make_batch(30), Decoding(method, max_length=max_length, seed=1))
        assert all(1 <= len(answer) <= max_length for answer in answers)
        assert {word for answer in answers for word in answer} <= set(WORDS)


@pytest.mark.parametrize("power", [0.0, 0.7, 1.0, -0.5])
def test_wide_beam_finds_the_best_of_all_answers(power: float) -> None:
    model, batch = Table(spread=1.5), make_batch(12)
    # 200 beams are more than there ever are options: nothing is pruned.
    answers = generate(model, batch, Decoding("beam", beams=200, length_penalty=power, max_length=4))
    every = every_answer(4)
    for row, answer in enumerate(answers):
        best = max(every, key=lambda a: model.log_probability(batch.context[row], a) / len(a) ** power)
        assert tuple(answer) == tuple(w for w in best if w != EOS)
    assert len({len(a) for a in answers}) > 1


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_beam_against_a_plain_one(power: float) -> None:
    """Three beams prune; a search written down word by word, without any early stop, prunes the same."""
    model, batch = Table(spread=1.0, length=5), make_batch(25)
    answers = generate(model, batch, Decoding("beam", beams=3, length_penalty=power, max_length=5))
    for row, answer in enumerate(answers):
        alive: list[tuple[int, ...]] = [()]
        finished: list[tuple[int, ...]] = []
        for position in range(5):
            options = [(*a, w) for a in alive for w in ((EOS, *WORDS) if position else WORDS)]
            options.sort(key=lambda a: -model.log_probability(batch.context[row], a))
            finished += [a for a in options[:3] if a[-1] == EOS]
            alive = [a for a in options[:3] if a[-1] != EOS]
        scores = {a: model.log_probability(batch.context[row], a) / len(a) ** power for a in finished + alive}
        best = max(scores, key=scores.__getitem__)
        assert tuple(answer) == tuple(w for w in best if w != EOS)


def test_ends_with_the_longest_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where finished rows stay in the batch: what they are fed is EOS, and they do not come back."""
    monkeypatch.setattr("ecore.generation.search.KEEP_ROWS", 0.0)
    model = Table(length=20, eos=1.5)
    answers = generate(model, make_batch(10), Decoding(max_length=20))
    assert model.cache.stepped == [10] * (max(map(len, answers)) + 1)
    assert len(model.cache.stepped) < 20


def test_beam_rows_that_are_done_cost_nothing() -> None:
    model = Table(length=20, eos=2.0)
    generate(model, make_batch(40), Decoding("beam", beams=3, length_penalty=0.0, max_length=20))
    stepped = model.cache.stepped
    assert stepped[:2] == [40, 120]
    assert stepped[-1] < 40
    assert sum(stepped) < 0.5 * 120 * 20


def test_beam_stops_early() -> None:
    model = Table(length=20, eos=8.0)
    generate(model, make_batch(8), Decoding("beam", beams=3, length_penalty=0.0, max_length=20))
    assert len(model.cache.stepped) < 10


def test_one_beam_is_greedy() -> None:
    batch = make_batch(40)
    for eos in (-1.0, 2.0):
        model = Table(length=6, eos=eos)
        one = generate(model, batch, Decoding("beam", beams=1, max_length=6))
        assert one == generate(model, batch, Decoding(max_length=6))


@pytest.mark.parametrize("look", [2, 3, 50])
@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_looking_seldom_for_the_end_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, method: str, look: int
) -> None:
    decoding = Decoding(method, max_length=9, seed=3, **({"beams": 3} if method == "beam" else {}))
    batch, models = make_batch(30), [Table(length=9, eos=1.5) for _ in range(2)]
    answers = generate(models[0], batch, decoding)
    monkeypatch.setattr(_Steps, "looks", lambda self, position: (position + 1) % look == 0)
    assert generate(models[1], batch, decoding) == answers
    assert sum(models[1].cache.stepped) > sum(models[0].cache.stepped)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"method": "best"}, "method"),
        ({"method": "beam", "beams": 0}, "beams"),
        ({"max_length": 0}, "max_length"),
        ({"method": "sample", "top_k": -1}, "top_k"),
        ({"method": "sample", "top_p": 0.0}, "top_p"),
        ({"method": "sample", "top_p": 1.5}, "top_p"),
        ({"method": "sample", "top_p": math.nan}, "top_p"),
        ({"method": "sample", "temperature": 0.0}, "temperature"),
        ({"method": "sample", "temperature": math.nan}, "temperature"),
        ({"method": "beam", "length_penalty": math.inf}, "length_penalty"),
        ({"top_k": 5}, "top_k"),
        ({"method": "beam", "temperature": 0.5}, "temperature"),
    ],
)
def test_refuses_what_makes_no_sense(options: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=f"^{named}: ") as caught:
        Decoding(**options)
    assert "\n" not in str(caught.value)
