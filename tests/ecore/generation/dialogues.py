"""Contexts for the real model, and a small one that answers them differently."""

from __future__ import annotations

from collections import Counter

import torch

from ecore.config import ModelConfig
from ecore.data.batches import Batch, context_batch
from ecore.data.text import tokenize
from ecore.data.vocabulary import EOS, Vocabulary
from ecore.data.word_tables import WordTables
from ecore.model import ECore

CONTEXTS = [
    ["I lost my keys this morning and I was late for work."],
    ["My dog died.", "I am so sorry.", "Thank you. He was fifteen, and he had been with me since school."],
    ["I passed my exam!"],
    ["Someone broke into my car last night.", "That is awful! Was anything taken?", "Everything."],
]


def real_batch(model: ECore, contexts: list[list[str]]) -> Batch:
    return context_batch(contexts, model.vocabulary, model.tables)


def differing_model(strategy: str) -> ECore:
    """A small model in float64 (so that rounding decides nothing) that answers differently."""
    emotions = ("sad", "joyful", "afraid", "angry", "proud", "hopeful")
    counts = Counter(word for context in CONTEXTS for turn in context for word in tokenize(turn))
    vocabulary = Vocabulary.from_counts(counts, emotions)
    torch.manual_seed(1)
    size = len(vocabulary)
    tables = WordTables(
        torch.rand(size) * 0.25, torch.zeros(size, 0, dtype=torch.int32), torch.zeros(size, 0)
    )
    config = ModelConfig(dim=24, encoder_blocks=2, decoder_blocks=2, strategy=strategy)
    model = ECore(config, vocabulary, tables).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # large weights: at its usual start the model says one word over and over
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 4 / weight.shape[1] ** 0.5)
        model.output.bias[EOS] += 7.0
    return model
