"""Commonsense inferences about utterances, which CEM reads: a JSON-lines file, and a split with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecore.data.batches import Batch, Split
from ecore.data.text import tokenize
from ecore.data.vocabulary import CLS, PAD, Vocabulary
from ecore.errors import InputError
from ecore.files import atomic_path, numbered_lines, parse_json

RELATIONS = ("xIntent", "xNeed", "xWant", "xEffect", "xReact")
"""ATOMIC's relations that CEM uses: four of cognition, and the last one of affection."""
MAX_INFERENCE_WORDS = 63
"""Words that are kept of all inferences by one relation."""
_NONE = "none"
"""COMET's word for an empty inference."""


class InferenceBatch(NamedTuple):
    """:class:`ecore.data.batches.Batch` with ``inferences``, int64 [B, 5, L]: of the context's last utterance.

    By each of :data:`RELATIONS`, ``[CLS]`` and the words of all inferences; PAD where there are fewer.
    """

    context: Tensor
    state: Tensor
    lengths: Tensor
    concepts: Tensor
    response: Tensor
    emotion: Tensor
    inferences: Tensor

    def to(self, device: torch.device | str) -> InferenceBatch:
        """The batch on ``device``."""
        return InferenceBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Inferences:
    """Inferences about utterances, found by the utterance's words: case and spaces do not matter.

    Args:
        texts: for each utterance the inferences by each relation.
        source: what they are from, for messages.
    """

    def __init__(self, texts: Mapping[str, Mapping[str, Sequence[str]]], source: str) -> None:
        self.texts, self.source = dict(texts), source

    @classmethod
    def load(cls, path: Path) -> Inferences:
        """Read a JSON-lines file, plain or ``.gz``: ``{"text": "...", "xIntent": ["...", ...], ...}``.

        Of an utterance that comes twice the last line counts.

        Raises:
            InputError: the file is missing or unreadable, a line is malformed, or there is none.
        """
        texts = {}
        for number, line in numbered_lines(path):
            record = parse_json(line, f"{path}:{number}")
            _check(record, f"{path}:{number}")
            texts[utterance_key(record["text"])] = {name: record.get(name, []) for name in RELATIONS}
        if not texts:
            raise InputError(f"{path}: is empty; expected a line of inferences for each utterance")
        return cls(texts, str(path))

    def save(self, path: Path) -> None:
        """Write the file that :meth:`load` reads, atomically."""
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for text, relations in self.texts.items():
                file.write(json.dumps({"text": text, **relations}, ensure_ascii=False) + "\n")

    def ids(self, utterance: str, vocabulary: Vocabulary) -> list[list[int]]:
        """Return for each relation ``[CLS]`` and the words inferred; of an unknown utterance ``[CLS]`` alone."""
        relations = self.texts.get(utterance_key(utterance), {})
        found = []
        for name in RELATIONS:
            inferred = [text for text in relations.get(name, ()) if text.strip() != _NONE]
            words = [word for text in inferred for word in tokenize(text)]
            found.append([CLS, *vocabulary.encode(words)[:MAX_INFERENCE_WORDS]])
        return found


def utterance_key(text: str) -> str:
    """Return what an utterance is found by."""
    return " ".join(tokenize(text))


def _check(record: Any, where: str) -> None:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise InputError(f'{where}: expected an object with "text", an utterance, and {", ".join(RELATIONS)}')
    for name in RELATIONS:
        values = record.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise InputError(f"{where}: {name}: expected a list of texts")


def padded_ids(rows: Sequence[Sequence[Sequence[int]]]) -> npt.NDArray[np.int64]:
    """Return ids of all utterances and relations, [U, 5, L], PAD-padded."""
    width = max(len(ids) for relations in rows for ids in relations)
    table = np.full((len(rows), len(RELATIONS), width), PAD, dtype=np.int64)
    for row, relations in enumerate(rows):
        for column, ids in enumerate(relations):
            table[row, column, : len(ids)] = ids
    return table


class InferenceSplit:
    """A split of the prepared data with inferences; reads like :class:`ecore.data.batches.Split`.

    Args:
        split: the samples.
        inferences: of the utterances that contexts end with.
        vocabulary: of the samples.

    Raises:
        InputError: there are inferences for none of the samples.
    """

    def __init__(self, split: Split, inferences: Inferences, vocabulary: Vocabulary) -> None:
        self.name, self.texts, self._split = split.name, split.texts, split
        self.context_lengths, self.response_lengths = split.context_lengths, split.response_lengths
        numbers: dict[str, int] = {}
        last = [split.texts(i)["context"][-1] for i in range(len(split))]
        self._row = np.array([numbers.setdefault(text, len(numbers)) for text in last])
        self.known = sum(utterance_key(text) in inferences.texts for text in last)
        """Samples that there are inferences for."""
        if not self.known:
            raise InputError(
                f"{inferences.source}: has no inferences for any of the {len(split):,} contexts of {split.name}; "
                "expected the last utterance of each as text"
            )
        self._table = padded_ids([inferences.ids(text, vocabulary) for text in numbers])

    def __len__(self) -> int:
        return len(self._split)

    def batch(self, indices: npt.ArrayLike) -> InferenceBatch:
        """The samples of ``indices``, in that order."""
        return with_inferences(
            self._split.batch(indices), self._table[self._row[np.asarray(indices, dtype=np.int64)]]
        )


def with_inferences(batch: Batch, ids: npt.NDArray[np.int64]) -> InferenceBatch:
    """Return ``batch`` with inferences ids [B, 5, L], columns that no row fills left out."""
    return InferenceBatch(*batch, torch.from_numpy(ids[..., : int((ids != PAD).sum(-1).max())]))
