"""A table of probabilities small enough to enumerate, in place of a model."""

from __future__ import annotations

import itertools
import math

import torch

from ecore.data.batches import Batch
from ecore.data.vocabulary import BOS, EOS
from ecore.generation.search import NEVER

WORDS = (5, 6, 7)

SIZE = 8


class Cache:
    """The contexts, the words so far of ``width`` rows of each, and how many rows were stepped."""

    def __init__(self, context: torch.Tensor) -> None:
        self.context, self.width = context, 1
        self.words = torch.zeros(len(context), 0, dtype=torch.int64)
        self.stepped: list[int] = []

    def select(self, contexts: torch.Tensor) -> None:
        self.words = self.words.unflatten(0, (-1, self.width))[contexts].flatten(0, 1)
        self.context = self.context[contexts]

    def branch(self, parents: torch.Tensor) -> None:
        words = self.words.unflatten(0, (-1, self.width))
        self.words = torch.cat([row[parent] for row, parent in zip(words, parents, strict=True)])
        self.width = parents.shape[1]


class Table:
    """Scores that depend on the context's second word and on every word so far; special words score
    highest."""

    def __init__(self, size: int = SIZE, spread: float = 2.0, length: int = 5, eos: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(3)
        self.scores = spread * torch.randn(length, 97, size, generator=generator, dtype=torch.float64)
        self.scores[:, :, NEVER] += 50.0
        self.scores[:, :, EOS] += eos

    def encode(self, batch: Batch) -> torch.Tensor:
        return batch.context

    def start(self, encoding: torch.Tensor, max_length: int) -> Cache:
        self.cache = Cache(encoding)
        return self.cache

    def step(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        cache.words = torch.cat([cache.words, tokens[:, None]], 1)
        cache.stepped.append(len(tokens))
        return self.logits(cache.context.repeat_interleave(cache.width, 0), cache.words)

    def logits(self, context: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        position = words.shape[1] - 1
        mixed = (words * torch.arange(1, position + 2)).sum(1) * 7 + context[:, 1] * 13
        return self.scores[position, mixed % 97]

    def log_probability(self, context: torch.Tensor, answer: tuple[int, ...]) -> float:
        """Of the answer given the rule that special words never come and EOS not first."""
        total = 0.0
        for position, word in enumerate(answer):
            scores = self.logits(context[None], torch.tensor([[BOS, *answer[:position]]]))[0].clone()
            scores[NEVER + ([EOS] if position == 0 else [])] = -math.inf
            total += float(scores.log_softmax(0)[word])
        return total


def make_batch(rows: int, width: int = 3) -> Batch:
    context = torch.zeros(rows, width, dtype=torch.int64)
    context[:, 0] = 4
    context[:, 1] = torch.arange(rows) + 5
    empty = torch.zeros(rows, 0, dtype=torch.int64)
    return Batch(
        context, (context > 0).long(), torch.full((rows,), 2), empty, empty, torch.zeros(rows).long()
    )


def pick(batch: Batch, rows: list[int]) -> Batch:
    return Batch(*(tensor[rows] for tensor in batch))


def every_answer(length: int) -> list[tuple[int, ...]]:
    """All answers of at most ``length`` words, with EOS where shorter."""
    answers = [(*w, EOS) for n in range(1, length) for w in itertools.product(WORDS, repeat=n)]
    return answers + list(itertools.product(WORDS, repeat=length))
