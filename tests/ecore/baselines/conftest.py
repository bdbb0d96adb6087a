"""Tiny baselines on a made-up vocabulary, and a corpus small enough to train on in a blink."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from ecore.baselines import BASELINES
from ecore.config import for_model
from ecore.data.batches import Batch
from ecore.data.concepts import select_related
from ecore.data.prepare import prepare
from ecore.data.prepared import PreparedData
from ecore.data.vocabulary import Vocabulary
from ecore.data.word_tables import WordTables
from tests.ecore.model.conftest import (
    FIRST_WORD,
    TINY,
    padded,
    random_batch,
    rows_of,
    tables_of,
    vocabulary_of,
)
from tests.ecore.training.conftest import write_corpus

RELATED = 3


def related_tables(vocabulary: Vocabulary) -> WordTables:
    """Each second word has three related ones."""
    tables, size = tables_of(vocabulary), len(vocabulary)
    generator = torch.Generator().manual_seed(2)
    related = torch.randint(FIRST_WORD, size, (size, RELATED), generator=generator, dtype=torch.int32)
    score = torch.rand(size, RELATED, generator=generator) + 0.1
    without = torch.arange(size) % 2 == 1
    related[without], score[without] = 0, 0.0
    intensity = tables.intensity.clone()
    intensity[:FIRST_WORD] = 0.0  # as special words have it
    return WordTables(intensity, related, score)


def batch_of(vocabulary: Vocabulary, tables: WordTables, **options) -> Batch:
    """A random batch whose related words are those of its contexts; the last row has none."""
    batch = random_batch(vocabulary, **options)
    rows = [select_related(row[row >= FIRST_WORD].tolist(), tables) for row in batch.context]
    rows[-1] = []
    concepts = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, ids in enumerate(rows):
        concepts[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return batch._replace(concepts=concepts)


@pytest.fixture
def make() -> SimpleNamespace:
    """``model(name, **settings)``: a tiny baseline in eval mode, the same each time; ``batch(...)``; and helpers."""
    vocabulary = vocabulary_of(60)
    tables = related_tables(vocabulary)

    def model(name: str, **settings):
        torch.manual_seed(0)
        config = dataclasses.replace(for_model(TINY, name), **settings)
        return BASELINES[name](config, vocabulary, tables).eval()

    def batch(**options) -> Batch:
        return batch_of(vocabulary, tables, **options)

    return SimpleNamespace(model=model, batch=batch, padded=padded, rows=rows_of, vocabulary=vocabulary)


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    relations = folder / "relations.tsv"
    relations.write_text("dog\tIsA\tfriend\t2.0\ndog\tCapableOf\tcried\t1.0\nparty\tCauses\twonderful\t2.0\n")
    prepare(write_corpus(folder / "corpus"), folder / "prepared", relations=relations, progress=False)
    return folder / "prepared"


@pytest.fixture(scope="session")
def data(prepared_folder):
    return PreparedData.load(prepared_folder)


@pytest.fixture(autouse=True)
def one_thread():
    """Tests run side by side, and bit-for-bit claims are for one number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
