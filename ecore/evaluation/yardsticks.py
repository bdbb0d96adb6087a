"""Scores of models that only count words, on the same split: a model that does not reach them has not learned.

Perplexities are per token, of the responses under the prepared vocabulary, EOS counted, trained on the
training responses. Two families, both interpolated down to the uniform distribution:

- absolute discounting (Ney, Essen and Kneser 1994), raw counts at every order, discount 0.75;
- Kneser-Ney (Chen and Goodman 1999, interpolated, one discount an order): below the highest order an n-gram
  counts the different words seen before it, and the discount is n1 / (n1 + 2 n2).

On EmpatheticDialogues' validation split the first gives 71 (bigram) and 57 (trigram), the second 66 and 49.
Emotion accuracy is that of multinomial naive Bayes on the words of the context.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ecore.data.batches import Split
from ecore.data.vocabulary import BOS, CLS, EOS, PAD, Vocabulary
from ecore.errors import InputError

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

DISCOUNT = 0.75
"""Of absolute discounting."""
ALPHA = 0.1
"""Added to every count of a word under an emotion. Not tuned for accuracy: 0.5 gives 41.6 and 38.4 % on
EmpatheticDialogues' validation and test splits, where 0.1 gives 40.4 and 37.1 %."""
_CHUNK = 2048  # samples read at once


def yardsticks(
    train: Split, split: Split, vocabulary: Vocabulary, samples: Ids | None = None
) -> dict[str, float]:
    """The yardsticks of ``split`` (``samples`` of it, or all): five perplexities, ``naive_bayes_accuracy``.

    ``unigram``, ``bigram`` and ``trigram`` are absolute discounting's, ``kneser_ney_bigram`` and
    ``kneser_ney_trigram`` Kneser-Ney's.

    Raises:
        InputError: no samples.
    """
    if len(split if samples is None else samples) == 0:
        raise InputError("yardsticks: expected at least one sample, got none")
    train_words, train_rows, train_responses, train_emotions = _read(train, np.arange(len(train)))
    words, rows, responses, emotions = _read(split, np.arange(len(split)) if samples is None else samples)
    size = len(vocabulary)
    names = {"unigram": 1, "bigram": 2, "trigram": 3, "kneser_ney_bigram": 2, "kneser_ney_trigram": 3}
    result = {}
    for name, order in names.items():
        kneser_ney = name.startswith("kneser_ney")
        p = ngram_probabilities(train_responses, responses, size, order, kneser_ney)
        result[name] = float(np.exp(-np.log(p).mean()))
    emotion_count = len(vocabulary.emotions)
    scores = naive_bayes(train_words, train_emotions[train_rows], train_emotions, size, emotion_count)
    totals = _sum_by_row(scores[0], words, rows, len(emotions)) + scores[1]
    result["naive_bayes_accuracy"] = 100.0 * float((totals.argmax(1) == emotions).mean())
    return result


def ngram_probabilities(train: Ids, words: Ids, size: int, order: int, kneser_ney: bool = False) -> Floats:
    """Probability of each of ``words`` after the ``order`` - 1 words before it in its sentence.

    ``train`` and ``words`` are flat sequences of word ids, every sentence ended by EOS; a sentence's first
    words follow BOS. With c(h w) a count, d the discount and T(h) the number of different words after h,

        p(w | h) = (c(h w) - d) / c(h) + d T(h) / c(h) * p(w | h without its first word),

    down to 1 / (number of words that can come); without the first term where c(h w) is 0, the shorter
    history's alone where c(h) is. No discount is over 1.

    Args:
        size: words of the vocabulary, special ones counted; ``size ** order`` must fit in 63 bits.
    """
    train_grams, grams = _ngrams(train, order), _ngrams(words, order)
    keys, counts = np.unique(_keys(train_grams, size), return_counts=True)
    tables = {order: (keys, counts)}
    for level in range(order - 1, 0, -1):
        # Kneser-Ney: each different (level + 1)-gram counts once for the n-gram it ends with.
        raw = _keys(train_grams[:, order - level :], size)
        tables[level] = np.unique(
            tables[level + 1][0] % size**level if kneser_ney else raw, return_counts=True
        )

    # PAD, BOS and CLS never come; UNK does, where the vocabulary leaves words out.
    p = np.full(len(words), 1.0 / (size - 3))
    for level in range(1, order + 1):
        keys, counts = tables[level]
        discount = _discount(counts) if kneser_ney else DISCOUNT
        histories, history = np.unique(keys // size, return_inverse=True)
        total = np.bincount(history, counts)
        kept = discount * np.bincount(history) / total  # the weight of the shorter history
        wanted = _keys(grams[:, order - level :], size)
        at, known = _find(keys, wanted)
        history_at, history_known = _find(histories, wanted // size)
        own = np.where(known, counts[at] - discount, 0.0) / total[history_at]
        p = np.where(history_known, own + kept[history_at] * p, p)
    return p


def naive_bayes(
    words: Ids, labels: Ids, sample_labels: Ids, size: int, classes: int
) -> tuple[Floats, Floats]:
    """Multinomial naive Bayes: log p(word | class) [size, classes] and log p(class) [classes].

    ``words`` are the words of all samples, ``labels`` the class of each one's sample, ``sample_labels`` [n]
    the class of every sample. Every word's count in a class is raised by :data:`ALPHA`, a class's samples
    by one.
    """
    counts = np.bincount(words * classes + labels, minlength=size * classes).reshape(size, classes) + ALPHA
    prior = np.bincount(sample_labels, minlength=classes) + 1.0
    return np.log(counts / counts.sum(0)), np.log(prior / prior.sum())


def _read(split: Split, samples: Ids) -> tuple[Ids, Ids, Ids, Ids]:
    """Return context words, the sample of each, all responses in one sequence, and the emotions."""
    words, rows, responses, emotions = [], [], [], []
    for begin in range(0, len(samples), _CHUNK):
        batch = split.batch(samples[begin : begin + _CHUNK])
        context, response = batch.context.numpy(), batch.response.numpy()
        row, column = np.nonzero((context != PAD) & (context != CLS))
        words.append(context[row, column])
        rows.append(row + begin)
        responses.append(response[response != PAD])
        emotions.append(batch.emotion.numpy())
    return tuple(np.concatenate(parts) for parts in (words, rows, responses, emotions))  # type: ignore[return-value]


def _ngrams(words: Ids, order: int) -> Ids:
    """[len(words), order]: each word, last, after the words before it in its sentence, or BOS."""
    places = np.arange(len(words))
    starts = np.concatenate([[True], words[:-1] == EOS])
    in_sentence = places - np.maximum.accumulate(np.where(starts, places, 0))
    columns = [np.where(in_sentence >= back, np.roll(words, back), BOS) for back in range(order - 1, -1, -1)]
    return np.stack(columns, axis=1)


def _keys(ngrams: Ids, size: int) -> Ids:
    """One number per n-gram: its words as digits, the last the lowest."""
    keys = np.zeros(len(ngrams), dtype=np.int64)
    for column in ngrams.T:
        keys = keys * size + column
    return keys


def _find(sorted_keys: Ids, wanted: Ids) -> tuple[Ids, npt.NDArray[np.bool_]]:
    """Place of each wanted key, and whether it is really there."""
    at = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return at, sorted_keys[at] == wanted


def _discount(counts: Ids) -> float:
    """n1 / (n1 + 2 n2); absolute discounting's where there are no n-grams counted once."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once else DISCOUNT


def _sum_by_row(scores: Floats, words: Ids, rows: Ids, count: int) -> Floats:
    """[count, classes]: the rows of ``scores`` that a sample's words pick, added up."""
    totals = [np.bincount(rows, scores[words, column], minlength=count) for column in range(scores.shape[1])]
    return np.stack(totals, axis=1)
