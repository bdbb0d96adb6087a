"""Tiny baselines on a made-up vocabulary, and a corpus small enough to train on in a blink."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ecore.baselines import BASELINES
from ecore.baselines.inferences import RELATIONS, InferenceBatch, Inferences, with_inferences
from ecore.config import for_model
from ecore.data.batches import Batch
from ecore.data.concepts import select_related
from ecore.data.prepare import prepare
from ecore.data.prepared import PreparedData
from ecore.data.vocabulary import CLS, Vocabulary
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
from tests.ecore.training.conftest import one_thread, write_corpus  # noqa: F401, a fixture

RELATED = 3
INFERENCES = Inferences(
    {
        "joyful": {"xReact": ["joyful", "word3 word4"], "xWant": ["word5"], "xIntent": ["none"]},
        "word10 word3 word30": {"xNeed": ["word1", "word2 word9"], "xEffect": ["sad"]},
    },
    "made up",
)
"""Of the last turns of two of the dialogues that the suite answers."""


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


def inferred(batch: Batch, vocabulary: Vocabulary) -> InferenceBatch:
    """The batch with random inferences of 0 to 5 words behind each ``[CLS]``."""
    generator = torch.Generator().manual_seed(3)
    shape = (len(batch.context), len(RELATIONS), 6)
    ids = torch.randint(FIRST_WORD, len(vocabulary), shape, generator=generator)
    ids[..., 0] = CLS
    ends = torch.randint(1, 7, shape[:2], generator=generator)
    return with_inferences(batch, (ids * (torch.arange(6) < ends[..., None])).numpy())


@pytest.fixture
def make() -> SimpleNamespace:
    """``model(name, **settings)``: a tiny baseline in eval mode, the same each time; ``batch(...)``; and helpers."""
    vocabulary = vocabulary_of(60)
    tables = related_tables(vocabulary)

    def model(name: str, **settings):
        torch.manual_seed(0)
        config = dataclasses.replace(for_model(TINY, name), **settings)
        given = {"inferences": INFERENCES} if name == "cem" else {}
        return BASELINES[name](config, vocabulary, tables, **given).eval()

    def batch(name: str = "", **options):
        batch = batch_of(vocabulary, tables, **options)
        return inferred(batch, vocabulary) if name == "cem" else batch

    def wider(batch, more: int):
        added = padded(batch, more)
        if isinstance(batch, InferenceBatch):
            added = added._replace(inferences=F.pad(batch.inferences, (0, more)))
        return added

    def rows(batch, rows: list[int]):
        if not isinstance(batch, InferenceBatch):
            return rows_of(batch, rows)
        part = rows_of(Batch(*batch[:-1]), rows)
        return with_inferences(part, batch.inferences[rows].numpy())

    return SimpleNamespace(model=model, batch=batch, padded=wider, rows=rows, vocabulary=vocabulary)


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    relations = folder / "relations.tsv"
    relations.write_text("dog\tIsA\tfriend\t2.0\ndog\tCapableOf\tcried\t1.0\nparty\tCauses\twonderful\t2.0\n")
    prepare(write_corpus(folder / "corpus"), folder / "prepared", relations=relations, progress=False)
    return folder / "prepared"


@pytest.fixture(scope="session")
def inferences_file(tmp_path_factory):
    """Of most last utterances of the corpus's contexts."""
    path = tmp_path_factory.mktemp("inferences") / "inferences.jsonl"
    utterances = (
        "a terrible noise scared me .",
        "someone broke my awful car .",
        "it was bad.",
        "It was  today bad.",
    )
    lines = [
        {"text": text, "xReact": ["scared", "sad"], "xIntent": ["none"], "xWant": ["to call someone", "help"]}
        for text in utterances
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def data(prepared_folder):
    return PreparedData.load(prepared_folder)
