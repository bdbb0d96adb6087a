"""The counting models against numbers worked out by hand, against plain loops, and on the sample corpus."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from ecore.data.batches import Batch
from ecore.data.prepared import PreparedData
from ecore.data.vocabulary import BOS, CLS, EOS, PAD, SPECIAL_WORDS, Vocabulary
from ecore.evaluation import yardsticks
from ecore.evaluation.yardsticks import naive_bayes, ngram_probabilities

SIZE = 9  # UNK, EOS and four words can come: 6


def ids(*sentences: list[int]) -> np.ndarray:
    return np.array([word for sentence in sentences for word in [*sentence, EOS]])


TRAIN = ids([5, 6], [5, 7], [6, 5, 6], [5])
# counts: 5 four times, 6 three, 7 one, EOS four: 12. After BOS: 5 5 6 5.


def test_unigram_by_hand() -> None:
    p = ngram_probabilities(TRAIN, ids([5, 8]), SIZE, 1)
    rest = 0.75 * 4 / 12 / 6  # the discount of four kinds of word, over six that can come
    assert p == pytest.approx([3.25 / 12 + rest, rest, 3.25 / 12 + rest])


def test_bigram_by_hand() -> None:
    rest = 0.75 * 4 / 12 / 6
    six, eos = 2.25 / 12 + rest, 3.25 / 12 + rest
    p = ngram_probabilities(TRAIN, ids([5, 6], [8]), SIZE, 2)
    # BOS 5 three times of four, BOS 6 once. After 5: 6 twice, 7, EOS. After 6: EOS twice, 5. After 8: none.
    five = 3.25 / 12 + rest
    assert p == pytest.approx(
        [
            2.25 / 4 + 0.75 * 2 / 4 * five,
            1.25 / 4 + 0.75 * 3 / 4 * six,
            1.25 / 3 + 0.75 * 2 / 3 * eos,
            0.75 * 2 / 4 * rest,
            eos,
        ]
    )


def test_kneser_ney_bigram_by_hand() -> None:
    # Different bigrams: BOS5 BOS6 56 57 5E 6E 65 7E, counted 3 1 2 1 1 2 1 1: n1 = 5, n2 = 2, discount 5/9.
    # Words before: 5 two, 6 two, 7 one, EOS three of 8: n1 = 1, n2 = 2, discount 1/5.
    high, low = 5 / 9, 1 / 5
    rest = low * 4 / 8 / 6
    six = (2 - low) / 8 + rest
    eos = (3 - low) / 8 + rest
    p = ngram_probabilities(TRAIN, ids([5, 6], [8]), SIZE, 2, kneser_ney=True)
    five = (2 - low) / 8 + rest
    assert p == pytest.approx(
        [
            (3 - high) / 4 + high * 2 / 4 * five,
            (2 - high) / 4 + high * 3 / 4 * six,
            (2 - high) / 3 + high * 2 / 3 * eos,
            high * 2 / 4 * rest,
            eos,
        ]
    )


@pytest.mark.parametrize("kneser_ney", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_every_history_has_a_distribution(order: int, kneser_ney: bool) -> None:
    rng = np.random.default_rng(0)
    train = ids(
        *(rng.choice([1, 5, 6, 7, 8], rng.integers(0, 6), p=[0.1, 0.4, 0.3, 0.2, 0]) for _ in range(60))
    )
    for history in itertools.product([1, 5, 6, 7, 8], repeat=2):
        total = sum(
            ngram_probabilities(train, np.array([*history, word]), SIZE, order, kneser_ney)[2]
            for word in (1, EOS, 5, 6, 7, 8)
        )
        assert total == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("kneser_ney", [False, True])
def test_trigram_against_plain_loops(kneser_ney: bool) -> None:
    rng = np.random.default_rng(1)
    sentences = [rng.choice([5, 6, 7], rng.integers(0, 6)).tolist() for _ in range(40)]
    test = [[5, 6, 7, 8], [], [8, 5], [7, 7, 7]]

    def grams(sentences: list[list[int]], order: int) -> list[tuple[int, ...]]:
        padded = [[BOS] * (order - 1) + s + [EOS] for s in sentences]
        return [tuple(s[i : i + order]) for s in padded for i in range(len(s) - order + 1)]

    counts = {3: Counter(grams(sentences, 3))}
    for order in (2, 1):
        # The sentence start is padded for trigrams, so the lower orders are the ends of those.
        ends = counts[3].elements() if not kneser_ney else counts[order + 1].keys()
        counts[order] = Counter(gram[-order:] for gram in ends)

    def probability(gram: tuple[int, ...]) -> float:
        if not gram:
            return 1 / 6
        order = len(gram)
        ones, twos = (sum(c == n for c in counts[order].values()) for n in (1, 2))
        d = ones / (ones + 2 * twos) if kneser_ney and ones else 0.75
        followers = {g: c for g, c in counts[order].items() if g[:-1] == gram[:-1]}
        if not followers:
            return probability(gram[1:])
        total = sum(followers.values())
        kept = sum(min(c, d) for c in followers.values()) / total
        return max(followers.get(gram, 0) - d, 0) / total + kept * probability(gram[1:])

    expected = [probability(gram) for gram in grams(test, 3)]
    assert ngram_probabilities(ids(*sentences), ids(*test), SIZE, 3, kneser_ney) == pytest.approx(expected)


def test_naive_bayes_by_hand() -> None:
    # Class 0: words 5 5 6; class 1: word 6, and class 1 has two samples of three.
    words, labels = np.array([5, 5, 6, 6]), np.array([0, 0, 0, 1])
    word, prior = naive_bayes(words, labels, np.array([0, 1, 1]), 7, 2)
    assert prior == pytest.approx([math.log(2 / 5), math.log(3 / 5)])
    assert word[5] == pytest.approx([math.log(2.1 / 3.7), math.log(0.1 / 1.7)])
    assert word[6] == pytest.approx([math.log(1.1 / 3.7), math.log(1.1 / 1.7)])


class FakeSplit:
    """Samples of (emotion, context words); every response is one word."""

    def __init__(self, *samples: tuple[int, list[int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: np.ndarray) -> Batch:
        rows = [self.samples[i] for i in indices]
        width = max(len(words) for _, words in rows) + 1
        context = torch.tensor([[CLS, *words] + [PAD] * (width - 1 - len(words)) for _, words in rows])
        response = torch.tensor([[5, EOS]] * len(rows))
        emotion = torch.tensor([emotion for emotion, _ in rows])
        return Batch(context, context, (context > 0).sum(1), context[:, :0], response, emotion)


def test_naive_bayes_accuracy_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yardsticks, "_CHUNK", 2)
    vocabulary = Vocabulary((*SPECIAL_WORDS, "sad", "proud", "dog", "cat"), ("proud", "sad"))
    # Emotion 0 has three samples and 40 words, 1 has one and 3: [CLS], were it counted, would speak for 1.
    train = FakeSplit((0, [7] * 20), (0, [8] * 15), (1, [7, 8, 8]), (0, [7] * 5))
    test = FakeSplit(
        (0, []),  # the prior alone: 0
        (1, [8]),  # 4/6 * 15.1/40.4 (0) over 2/6 * 2.1/3.4 (1): 0, wrong
        (1, [8, 8, 8]),  # 4/6 * .374^3 under 2/6 * .618^3: 1
        (0, [7]),  # 0
        (1, [7, 7, 8, 8, 8]),  # 4/6 * .621^2 * .374^3 = .0134 over 2/6 * .324^2 * .618^3 = .0082: 0, wrong
    )
    for sample, right in enumerate((True, False, True, True, False)):
        alone = yardsticks.yardsticks(train, test, vocabulary, np.array([sample]))
        assert alone["naive_bayes_accuracy"] == 100.0 * right
    counted = yardsticks.yardsticks(train, test, vocabulary)
    assert counted["naive_bayes_accuracy"] == pytest.approx(100 * 3 / 5)
    some = yardsticks.yardsticks(train, test, vocabulary, np.array([4, 2, 3]))
    assert some["naive_bayes_accuracy"] == pytest.approx(100 * 2 / 3)
    assert counted["bigram"] == some["bigram"] < counted["unigram"]


def test_sample_corpus(prepared: Path) -> None:
    data = PreparedData.load(prepared)
    whole = yardsticks.yardsticks(data.train, data.test, data.vocabulary)
    assert whole["kneser_ney_trigram"] < whole["kneser_ney_bigram"] < whole["unigram"] < len(data.vocabulary)
    assert 100 / 32 < whole["naive_bayes_accuracy"] <= 100
