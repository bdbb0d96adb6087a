"""A real model, small, that answers differently."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from ecore.config import ModelConfig
from ecore.data.text import tokenize
from ecore.data.vocabulary import EOS, Vocabulary
from ecore.data.word_tables import WordTables
from ecore.model import ECore
from tests.ecore.generation.dialogues import CONTEXTS


@pytest.fixture(scope="module", params=["soft", "hard"])
def real(request: pytest.FixtureRequest) -> ECore:
    """A small model in float64 (so that rounding decides nothing) that answers differently."""
    emotions = ("sad", "joyful", "afraid", "angry", "proud", "hopeful")
    counts = Counter(word for context in CONTEXTS for turn in context for word in tokenize(turn))
    vocabulary = Vocabulary.from_counts(counts, emotions)
    torch.manual_seed(1)
    size = len(vocabulary)
    tables = WordTables(
        torch.rand(size) * 0.25, torch.zeros(size, 0, dtype=torch.int32), torch.zeros(size, 0)
    )
    config = ModelConfig(dim=24, encoder_blocks=2, decoder_blocks=2, strategy=request.param)
    model = ECore(config, vocabulary, tables).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # large weights: at its usual start the model says one word over and over
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 4 / weight.shape[1] ** 0.5)
        model.output.bias[EOS] += 7.0
    return model
