"""A made-up vocabulary, random batches and tiny models: nothing here reads a file."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ecore.config import ModelConfig
from ecore.data.batches import CLS_STATE, LISTENER, SPEAKER, Batch
from ecore.data.vocabulary import CLS, EOS, SPECIAL_WORDS, Vocabulary
from ecore.data.word_tables import WordTables
from ecore.model import ECore

EMOTIONS = ("afraid", "angry", "content", "furious", "joyful", "proud", "sad", "terrified")
TINY = ModelConfig(dim=24, encoder_blocks=1, decoder_blocks=2, heads=2, feed_forward=32)
FIRST_WORD = len(SPECIAL_WORDS)


def vocabulary_of(words: int, emotions: tuple[str, ...] = EMOTIONS) -> Vocabulary:
    return Vocabulary(SPECIAL_WORDS + emotions + tuple(f"word{i}" for i in range(words)), emotions)


def tables_of(vocabulary: Vocabulary) -> WordTables:
    """Intensities of which some are 0, and no related words."""
    generator = torch.Generator().manual_seed(1)
    intensity = torch.rand(len(vocabulary), generator=generator) * 0.25
    intensity[::5] = 0.0
    return WordTables(
        intensity, torch.zeros(len(vocabulary), 0, dtype=torch.int32), torch.zeros(len(vocabulary), 0)
    )


def random_batch(
    vocabulary: Vocabulary,
    rows: int = 4,
    words: int = 12,
    response: int = 7,
    concepts: int = 3,
    seed: int = 0,
) -> Batch:
    """Random lengths, the first row's context and response the longest; row i has i related words at most."""
    g = torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(FIRST_WORD, len(vocabulary), shape, generator=g)

    lengths = torch.randint(2, words + 1, (rows,), generator=g)
    lengths[0] = words
    inside = torch.arange(words) < lengths[:, None]
    context = ids(rows, words) * inside
    context[:, 0] = CLS
    state = torch.where(torch.arange(words) < words // 2, SPEAKER, LISTENER) * inside
    state[:, 0] = CLS_STATE
    ends = torch.randint(1, response + 1, (rows,), generator=g)
    ends[0] = response
    target = ids(rows, response) * (torch.arange(response) < ends[:, None])
    target[torch.arange(rows), ends - 1] = EOS
    related = ids(rows, concepts) * (torch.arange(concepts) < torch.arange(rows)[:, None])
    emotion = torch.randint(0, len(vocabulary.emotions), (rows,), generator=g)
    return Batch(context, state, lengths, related, target, emotion)


def padded(batch: Batch, more: int) -> Batch:
    """The batch with ``more`` columns of padding in everything."""
    names = ("context", "state", "response", "concepts")
    return batch._replace(**{name: F.pad(getattr(batch, name), (0, more)) for name in names})


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    """Some rows, without the columns that only the others fill."""
    part = Batch(*(x[rows] for x in batch))
    words = int(part.lengths.max())
    return part._replace(
        context=part.context[:, :words],
        state=part.state[:, :words],
        response=part.response[:, : int((part.response != 0).sum(1).max())],
        concepts=part.concepts[:, : int((part.concepts != 0).sum(1).max())],
    )


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    """Eight emotions and sixty words."""
    return vocabulary_of(60)


@pytest.fixture
def make(vocabulary) -> SimpleNamespace:
    """``model(**settings)``: a tiny model in eval mode, the same each time; ``batch(...)``; and helpers."""

    def model(seed: int = 0, embeddings=None, **settings) -> ECore:
        torch.manual_seed(seed)
        return ECore(
            dataclasses.replace(TINY, **settings), vocabulary, tables_of(vocabulary), embeddings
        ).eval()

    def batch(**options) -> Batch:
        return random_batch(vocabulary, **options)

    return SimpleNamespace(
        model=model, batch=batch, padded=padded, rows=rows_of, vocabulary=vocabulary_of, tables=tables_of,
        random_batch=random_batch,
    )  # fmt: skip
