"""Prepared data, a model and a run small enough to draw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ecore.data.prepare import prepare
from ecore.model import ECore
from tests.ecore.paper.figures.runs import FEW, new_model, save_run


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations that say each emotion's own word, some of them another's too."""
    folder = tmp_path_factory.mktemp("figures")
    (folder / "corpus").mkdir()
    for split in ("train", "valid", "test"):
        lines = []
        for i, emotion in enumerate(FEW):
            other = FEW[(i + 1) % len(FEW)] if i % 3 else emotion
            said = [f"I feel {emotion} about the car.", "Tell me more.", f"They were {other}.", "I see."]
            turns = [{"speaker": ("speaker", "listener")[t % 2], "text": text} for t, text in enumerate(said)]
            record = {"conv_id": f"{split}{i}", "emotion": emotion, "situation": "x", "utterances": turns}
            lines.append(json.dumps(record) + "\n")
        (folder / "corpus" / f"{split}.jsonl").write_text("".join(lines))
    prepare(folder / "corpus", folder / "prepared", progress=False)
    return folder / "prepared"


@pytest.fixture(scope="session")
def model(prepared: Path) -> ECore:
    return new_model(prepared, graph_layers=3)


@pytest.fixture(scope="session")
def run(prepared: Path, model: ECore) -> Path:
    return save_run(model, prepared.parent / "run", prepared)
