"""Training batches for whole-step benchmarks: of real data where there is some, else made up in the same sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ecore.config import PRESETS
from ecore.data.batches import CLS_STATE, LISTENER, SPEAKER, Batch, ResidentSplit, Widths, length_buckets
from ecore.data.prepared import PreparedData
from ecore.data.vocabulary import CLS, EOS, PAD, SPECIAL_WORDS, Vocabulary
from ecore.data.word_tables import WordTables
from ecore.model import ECore
from ecore.training.cuda_graphs import LEAST_CONTEXT, LEAST_RESPONSE, widened

WORDS, EMOTIONS = 23_714, 32
"""Of EmpatheticDialogues under the `literature` vocabulary."""
CONTEXT_WORDS, RESPONSE_WORDS = 36, 14
"""Their means there; both are about log-normal."""


def wait(device: str) -> None:
    """Return when ``device`` has done what it was given: before each look at the clock."""
    if device == "cuda":
        torch.cuda.synchronize()


@dataclasses.dataclass
class Workload:
    """A model and its batches: ``model()`` makes the same model each time; ``batches`` come with their words.

    ``samples(device)`` is the split that ``rows``, an array of indices for each batch, point into.
    """

    model: Callable[..., ECore]
    batches: list[tuple[Batch, int]]
    name: str
    samples: Callable[[str], Any]
    rows: list[np.ndarray]


def workload(data: Path | None, preset: str, batch_size: int = 16, number: int = 24) -> Workload:
    """``number`` batches in the order of a first epoch; of ``data``, a prepared folder, or made up where it is None."""
    # The paper's graph at the preset's sizes: that of the released code runs on none of the backends that are compared.
    config = dataclasses.replace(PRESETS[preset][0], graph_form="paper")
    made: Any
    if data is not None:
        prepared = PreparedData.load(data)
        config = dataclasses.replace(config, thresholds=prepared.thresholds(config.thresholds))
        made = (prepared.vocabulary, prepared.tables, prepared.embeddings)
        chosen = length_buckets(prepared.train, batch_size, seed=0, epoch=0)[:number]
        batches = [
            (prepared.train.batch(rows), int(prepared.train.response_lengths[rows].sum())) for rows in chosen
        ]
        name = f"{len(prepared.vocabulary):,} words, {prepared.meta['intensity']}"
        samples: Callable[[str], Any] = partial(ResidentSplit, prepared.train)
    else:
        made = (*_made_up_words(), None)
        batches = [made_up_batch(batch_size, seed=i) for i in range(number)]
        name = f"made up, {WORDS:,} words"
        chosen = list(np.arange(number * batch_size).reshape(number, batch_size))
        samples = partial(MadeUpSplit, [batch for batch, _ in batches])

    def model(**settings: Any) -> ECore:
        torch.manual_seed(0)
        vocabulary, tables, embeddings = made
        return ECore(dataclasses.replace(config, **settings), vocabulary, tables, embeddings).train()

    return Workload(model, batches, name, samples, chosen)


class MadeUpSplit:
    """The samples of made-up batches in a row, as :class:`ResidentSplit` has a corpus's."""

    def __init__(self, batches: Sequence[Batch], device: str) -> None:
        def joined(name: str, room: int = 0) -> torch.Tensor:
            parts = [getattr(batch, name) for batch in batches]
            width = max([room, *(part.shape[1] for part in parts)])
            return torch.cat([F.pad(part, (0, width - part.shape[1]), value=PAD) for part in parts])

        self.concepts = joined("concepts").shape[1]
        self._lengths = np.concatenate([batch.lengths.numpy() for batch in batches])
        self._words = np.concatenate([(batch.response != PAD).sum(1).numpy() for batch in batches])
        context = widened(int(self._lengths.max()), LEAST_CONTEXT)
        response = widened(int(self._words.max()), LEAST_RESPONSE)
        self._all = Batch(
            joined("context", context),
            joined("state", context),
            torch.from_numpy(self._lengths),
            joined("concepts"),
            joined("response", response),
            torch.cat([batch.emotion for batch in batches]),
        ).to(device)

    def widths(self, indices: np.ndarray) -> Widths:
        return Widths(int(self._lengths[indices].max()), int(self._words[indices].max()), self.concepts)

    def tokens(self, indices: np.ndarray) -> int:
        return int(self._words[indices].sum())

    def send(self, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(indices).to(self._all.context.device)

    def gather(self, rows: torch.Tensor, widths: Widths) -> Batch:
        context, state, lengths, concepts, response, emotion = (part[rows] for part in self._all)
        context, state = context[:, : widths.context], state[:, : widths.context]
        return Batch(context, state, lengths, concepts, response[:, : widths.response], emotion)


def made_up_batch(
    rows: int, seed: int, context: int | None = None, words: int | None = None
) -> tuple[Batch, int]:
    """Samples of similar length, as length buckets have them; each context of ``context`` words where that is given.

    ``words``: size of the vocabulary (default :data:`WORDS`).
    """
    random = np.random.default_rng(seed)
    middle = CONTEXT_WORDS * float(np.exp(random.normal(-0.15, 0.5)))
    spread = np.clip(middle * np.exp(random.normal(0.0, 0.03, rows)), 2, 500).astype(np.int64)
    lengths = 1 + (spread if context is None else np.full(rows, context))
    answers = 1 + np.clip(RESPONSE_WORDS * np.exp(random.normal(-0.2, 0.6, rows)), 1, 120).astype(np.int64)

    def ids(counts: np.ndarray) -> torch.Tensor:
        drawn = random.integers(len(SPECIAL_WORDS), words or WORDS, (rows, int(counts.max())))
        return torch.from_numpy(np.where(np.arange(drawn.shape[1]) < counts[:, None], drawn, PAD))

    said, response, related = ids(lengths), ids(answers), ids(random.integers(0, 11, rows))
    said[:, 0] = CLS
    response[torch.arange(rows), torch.from_numpy(answers) - 1] = EOS
    state = torch.where(torch.arange(said.shape[1]) < said.shape[1] // 2, SPEAKER, LISTENER) * (said != PAD)
    state[:, 0] = CLS_STATE
    emotion = torch.from_numpy(random.integers(0, EMOTIONS, rows))
    return Batch(said, state, torch.from_numpy(lengths), related, response, emotion), int(answers.sum())


def _made_up_words() -> tuple[Vocabulary, WordTables]:
    """A vocabulary of the real size, of which a few per cent are over the finer thresholds, as in real text."""
    emotions = tuple(f"emotion{i}" for i in range(EMOTIONS))
    others = tuple(f"word{i}" for i in range(WORDS - EMOTIONS - len(SPECIAL_WORDS)))
    vocabulary = Vocabulary(SPECIAL_WORDS + emotions + others, emotions)
    intensity = torch.full((WORDS,), 0.01)
    intensity[::20] = 0.1
    intensity[::60] = 0.2
    return vocabulary, WordTables(intensity, torch.zeros(WORDS, 0, dtype=torch.int32), torch.zeros(WORDS, 0))
