"""Scores against other people's implementations: n-grams of nltk.lm, scikit-learn's naive Bayes, BLEU of NLTK."""

from __future__ import annotations

import numpy as np
import pytest
from nltk.lm import KneserNeyInterpolated
from nltk.lm.models import InterpolatedLanguageModel
from nltk.lm.smoothing import AbsoluteDiscounting
from nltk.translate.bleu_score import corpus_bleu

from ecore.data.vocabulary import BOS, EOS
from ecore.evaluation import yardsticks
from ecore.evaluation.bleu import bleu_4
from ecore.evaluation.yardsticks import ALPHA, DISCOUNT, naive_bayes, ngram_probabilities

SIZE = 13  # eight words, UNK and EOS can come
WORDS = np.arange(5, SIZE)


def sentences(seed: int, count: int) -> list[list[int]]:
    """Sentences of a skewed vocabulary, some empty, so that histories are seen, rare and unseen."""
    rng = np.random.default_rng(seed)
    share = 1.0 / np.arange(1, len(WORDS) + 1) ** 1.5
    return [rng.choice(WORDS, rng.integers(0, 9), p=share / share.sum()).tolist() for _ in range(count)]


def flat(spoken: list[list[int]]) -> np.ndarray:
    return np.array([word for sentence in spoken for word in [*sentence, EOS]])


def ngrams(spoken: list[list[int]], order: int) -> list[tuple[str, ...]]:
    """Each word of each sentence with the words before it, as NLTK has them: of strings."""
    padded = [[BOS] * (order - 1) + sentence + [EOS] for sentence in spoken]
    return [tuple(map(str, s[i : i + order])) for s in padded for i in range(len(s) - order + 1)]


def fitted(model: InterpolatedLanguageModel, order: int) -> InterpolatedLanguageModel:
    """The model on the training sentences: every n-gram, and its ends for the lower orders."""
    train = ngrams(sentences(0, 60), order)
    ends = [[gram[start:] for start in range(order)] for gram in train]
    model.fit(ends, vocabulary_text=[str(word) for word in range(SIZE)])
    return model


class OverUniform(AbsoluteDiscounting):
    """NLTK's absolute discounting, its unigrams discounted as well, towards the uniform distribution."""

    def unigram_score(self, word: str) -> float:
        unigrams = self.counts.unigrams
        kept = self.discount * len(unigrams) / unigrams.N()
        return max(unigrams[word] - self.discount, 0) / unigrams.N() + kept / (SIZE - 3)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_absolute_discounting_is_nltks(order: int) -> None:
    theirs = fitted(InterpolatedLanguageModel(OverUniform, order, params={"discount": DISCOUNT}), order)
    test = sentences(1, 40)
    ours = ngram_probabilities(flat(sentences(0, 60)), flat(test), SIZE, order)
    grams = ngrams(test, order)
    assert ours == pytest.approx([theirs.score(gram[-1], gram[:-1]) for gram in grams], rel=1e-12)
    assert np.exp(-np.log(ours).mean()) == pytest.approx(theirs.perplexity(grams), rel=1e-9)


@pytest.mark.parametrize("order", [2, 3])
def test_kneser_ney_is_nltks(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """NLTK has one discount for all orders, and none for the lowest."""
    discount = 0.6
    theirs = fitted(KneserNeyInterpolated(order, discount), order)
    by_level = iter([0.0] + [discount] * (order - 1))
    monkeypatch.setattr(yardsticks, "_discount", lambda counts: next(by_level))
    test = sentences(1, 40)
    ours = ngram_probabilities(flat(sentences(0, 60)), flat(test), SIZE, order, kneser_ney=True)
    grams = ngrams(test, order)
    assert ours == pytest.approx([theirs.score(gram[-1], gram[:-1]) for gram in grams], rel=1e-12)
    assert np.exp(-np.log(ours).mean()) == pytest.approx(theirs.perplexity(grams), rel=1e-9)


def test_naive_bayes_is_scikit_learns() -> None:
    models = pytest.importorskip("sklearn.naive_bayes", reason="needs scikit-learn")
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 4, 80)
    counts = rng.poisson(
        rng.gamma(0.3, 2.0, (4, SIZE))[labels]
    )  # [samples, words], each class with its own words
    sample, word = np.nonzero(counts)
    repeats = counts[sample, word]
    words, word_labels = np.repeat(word, repeats), np.repeat(labels[sample], repeats)
    by_word, prior = naive_bayes(words, word_labels, labels, SIZE, 4)
    raised = np.bincount(labels, minlength=4) + 1.0  # theirs does not smooth the classes' shares
    theirs = models.MultinomialNB(alpha=ALPHA, class_prior=raised / raised.sum()).fit(counts, labels)
    assert by_word == pytest.approx(theirs.feature_log_prob_.T, rel=1e-12)
    assert prior == pytest.approx(theirs.class_log_prior_, rel=1e-12)
    unseen = rng.poisson(1.0, (50, SIZE))
    assert ((unseen @ by_word + prior).argmax(1) == theirs.predict(unseen)).all()


def test_bleu_of_sacrebleu_is_nltks() -> None:
    pytest.importorskip("sacrebleu", reason="needs sacrebleu")
    rng = np.random.default_rng(3)
    spoken = [[str(word) for word in sentence] for sentence in sentences(4, 60)]
    pairs = [([word for word in sentence if rng.random() < 0.85], sentence) for sentence in spoken]
    # NLTK counts one 4-gram too many in a response of fewer than four words.
    predictions, references = zip(*(pair for pair in pairs if len(pair[0]) >= 4), strict=True)
    theirs = corpus_bleu([[reference] for reference in references], predictions)
    found = bleu_4(predictions, references)["bleu_4"]
    assert 1 < found < 99
    assert found == pytest.approx(100 * theirs, rel=1e-9)
