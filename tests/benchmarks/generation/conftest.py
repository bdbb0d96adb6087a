"""A small model, and few and small measurements."""

from __future__ import annotations

import pytest
import torch

from benchmarks.generation import runner
from benchmarks.workload import workload
from ecore.model import ECore


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        "WORDS_EACH": 4,
        "BATCHES": (1, 3),
        "CONTEXTS": (8,),
        "BEAMS": (1, 2),
        "SAID": (1, 6),
        "COMPARED": (1, 3),
    }
    for name, value in sizes.items():
        monkeypatch.setattr(runner, name, value)


@pytest.fixture(scope="module")
def model() -> ECore:
    """It answers differently; in float64, so that rounding decides nothing."""
    model = workload(None, "tiny", number=1).model().double().eval()
    with torch.no_grad():
        for weight in model.decoder.parameters():
            if weight.dim() > 1:
                weight.mul_(4.0)
    return model
