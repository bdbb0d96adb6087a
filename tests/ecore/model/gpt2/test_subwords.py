"""Contexts as subwords: their intensities, and the order and number that the backbone reads."""

import numpy as np
import pytest
import torch

from ecore.data.vocabulary import CLS, EOS, PAD, SPECIAL_WORDS, Vocabulary
from ecore.errors import InputError
from ecore.generation.decoding import Decoding
from ecore.generation.search import generate

pytest.importorskip("transformers", reason="needs the extra `pretrained`")

from ecore.data.subwords.alignment import WordIntensity
from ecore.data.subwords.batches import TurnReader, context_batch
from ecore.data.subwords.vocabulary import OFFSET


def intensities(words, values, text):
    """[(character, intensity)] of ``text`` where ``words`` have ``values`` and an unknown word has 9."""
    vocabulary = Vocabulary(SPECIAL_WORDS + words, words[:1])
    table = np.array([0, 9, 0, 0, 0, *values], dtype=np.float32)
    return WordIntensity(vocabulary, table).subwords(text, [(i, i + 1) for i in range(len(text))])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Do not", [1, 1, 2, 2, 2, 2]),
        ("Don't do", [1, 1, 2, 2, 2, 1, 1, 1]),
        ("Don’t", [1, 1, 2, 2, 2]),
        ("won't", [3, 3, 3, 3, 3]),  # "will not": neither stands there, so the more intense
        ("do.Xy", [9, 9, 9, 9, 9]),  # one word for the tokenizer, and not known
        ('"will"', [9, 3, 3, 3, 3, 9]),
        ("İdo will", [9, 9, 9, 3, 3, 3, 3, 3]),
        ("will!", [3, 3, 3, 3, 4]),
        ("do!do", [1, 1, 4, 1, 1]),
    ],
)
def test_characters_have_their_words_intensity(text, expected):
    assert intensities(("do", "not", "will", "!"), (1, 2, 3, 4), text) == expected


def test_a_subword_has_the_larger_intensity_of_what_it_spans(data):
    vocabulary = Vocabulary((*SPECIAL_WORDS, "do", "not"), ("do",))
    reader = WordIntensity(vocabulary, np.array([0, 9, 0, 0, 0, 1, 2], dtype=np.float32))
    assert reader.subwords("do not", [(0, 2), (1, 4), (2, 6), (5, 5)]) == [1, 2, 2, 2]


def test_split_holds_the_texts_as_subwords(make, data):
    model = make()
    split = model.view(data.test, progress=False)
    batch = split.batch(range(len(split)))
    assert len(split) == len(data.test) == 40
    eos = model.vocabulary.tokenizer.eos_token
    decode = model.vocabulary.tokenizer.decode
    for row in range(len(split)):
        text = data.test.texts(row)
        context = [i for i in batch.context[row].tolist() if i != PAD]
        assert context[0] == CLS
        assert len(context) == batch.lengths[row] == split.context_lengths[row]
        turns = [" ".join(turn.split()) for turn in text["context"]]
        decoded = decode([0 if i == EOS else i - OFFSET for i in context[1:]])
        assert decoded == (eos.join(turns) or eos)
        response = [i for i in batch.response[row].tolist() if i != PAD]
        assert len(response) == split.response_lengths[row]
        assert model.vocabulary.text(response) == " ".join(text["response"].split())
        assert response[-1] == EOS
        assert EOS not in response[:-1]
        assert model.vocabulary.emotions[batch.emotion[row]] == text["emotion"]
    assert (batch.intensity[batch.context == PAD] == 0).all()


def test_split_gives_every_subword_its_words_intensity(make, data):
    model = make()
    batch = model.view(data.train, progress=False).batch([0])
    pieces = [model.vocabulary.tokenizer.decode([i - OFFSET]) for i in batch.context[0, 1:].tolist()]
    text, ends = "".join(pieces), np.cumsum([len(piece) for piece in pieces])
    assert text.startswith("A terrible noise scared me")
    for word in ("terrible", "noise", "scared"):
        value = data.tables.intensity[data.vocabulary.encode([word])[0]]
        begin = text.index(word)
        parts = range(
            np.searchsorted(ends, begin, "right"), np.searchsorted(ends, begin + len(word) - 1, "right") + 1
        )
        assert word in "".join(pieces[i] for i in parts)
        assert all(batch.intensity[0, 1 + i] == value for i in parts)
        assert (value > 0.02) == (word != "noise")


def test_raw_contexts_read_as_the_split_does(make, data):
    model = make()
    split = model.view(data.test, progress=False)
    batch = split.batch(range(6))
    raw = model.read([data.test.texts(i)["context"] for i in range(6)])
    for name in ("context", "lengths", "intensity"):
        assert torch.equal(getattr(raw, name), getattr(batch, name))
    with pytest.raises(InputError, match="at least one turn"):
        model.read([[]])


def test_long_contexts_keep_their_latest_subwords(make, data):
    model = make()
    reader = TurnReader(model.vocabulary, data.tables.intensity.numpy())
    whole = context_batch([["It was bad.", "Why?"]], reader, 100)
    cut = context_batch([["It was bad.", "Why?"]], reader, 3)
    assert cut.context[0].tolist() == [CLS, *whole.context[0, -3:].tolist()]
    assert model.most_context + model.most_response == 256
    split = model.view(data.train, progress=False)
    model.most_context = 5
    short = model.view(data.train, progress=False)
    last, kept = split.batch([3]), short.batch([3])
    assert short.context_lengths.max() == 6
    assert kept.context[0].tolist() == [CLS, *last.context[0, -5:].tolist()]
    model.most_context = 128
    long = model.read([["bad " * 200]])
    assert long.lengths.tolist() == [model.most_context + 1]
    with torch.no_grad():
        generate(model, long, Decoding(max_length=model.most_response))  # all positions, and not one more
    with pytest.raises(InputError, match="max_length: expected at most 128, got 129"):
        generate(model, long, Decoding(max_length=model.most_response + 1))


def test_responses_must_fit_the_positions(make, data):
    model = make()
    model.most_response = 5
    with pytest.raises(
        InputError, match=r"test: the response of turn \d of test:\d+ has \d+ subwords, expected at most 5"
    ):
        model.view(data.test, progress=False)
