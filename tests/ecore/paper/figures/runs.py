"""Models and runs for the figures, and where their texts stand."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ecore import pretrained
from ecore.config import ModelConfig
from ecore.data.prepared import PreparedData
from ecore.model import ECore
from ecore.model.perceiver import Perceiver
from ecore.paper.annotation.lexicon import TABLE_12

EMOTIONS = tuple(TABLE_12)

FEW = EMOTIONS[:8]

CONFIG = ModelConfig(dim=24, encoder_blocks=1, decoder_blocks=1, heads=2, feed_forward=16)

TURNS = ["I was terrified, a car hit me for $5 !", "Are you sad?", "I am glad to be alive."]


def new_model(prepared: Path, **settings: object) -> ECore:
    torch.manual_seed(0)
    data = PreparedData.load(prepared)
    model = ECore(ModelConfig(**{**vars(CONFIG), **settings}), data.vocabulary, data.tables).eval()
    with torch.no_grad():  # gates and correlations as large as a trained model's
        if isinstance(model.perceiver, Perceiver):
            for layer in getattr(model.perceiver.graph_network, "layers", ()):
                layer.attention.gate.weight.mul_(20)
            model.perceiver.correlation.factor.mul_(2)
    return model


def save_run(model: ECore, folder: Path, prepared: Path) -> Path:
    pretrained.save(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["data"]["folder"] = str(prepared)
    (folder / "config.json").write_text(json.dumps(config))
    log = [
        {"step": s, "loss": 90.0 - s, "nll_per_token": 5.0 - s / 10, "emotion_accuracy": 3.0 * s}
        for s in (1, 5, 9)
    ]
    log[2] |= {"valid_ppl": 60.0, "valid_ppl_per_sample": 50.0, "valid_emotion_accuracy": 30.0}
    log[1]["loss"] = None  # not finite
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in log) + '{"step": 13, "lo'
    )
    return folder


def extents(texts):
    """Boxes in pixels; the figure has been drawn, for only then do ticks stand where they belong."""
    return [text.get_window_extent() for text in texts]
