"""Settings that change nothing: `ecore train` names them, so they must be exactly those."""

import dataclasses

import pytest
import torch

from ecore.baselines import BASELINES
from ecore.config import for_model, without_effect
from ecore.model import ECore
from tests.ecore.model.conftest import TINY

CHANGES = {
    "graph_layers": 3,
    "thresholds": (0.0, 0.02, 0.2),
    "max_relevant": 1,
    "eco_form": "inner",
    "gamma_emotion": 2.0,
    "gamma_correlation": 2.0,
    "correlation_prior": 1.0,
    "graph_form": "released",
    "emotion_table": True,
    "graph_norm": False,
    "own_weight": False,
    "graph_bias": True,
    "score_scale": 1.0,
    "graph_dropout": 0.5,
}
SYSTEMS = {
    "soft": {},
    "hard": {"strategy": "hard"},
    "none": {"strategy": "none"},
    "emotions": {"strategy": "none", "emotions": True},
    "no graph": {"ablations": ("graph",)},
    "no co-loss": {"strategy": "hard", "ablations": ("co-loss",)},
    "no co-p": {"strategy": "hard", "ablations": ("co-p",)},
    "no co-g": {"ablations": ("co-g",)},
}


def loss_and_perception(config, vocabulary, make):
    torch.manual_seed(0)
    model = BASELINES.get(config.model, ECore)(config, vocabulary, make.tables(vocabulary))
    model.cooccurrence.copy_(torch.rand(8, 8, generator=torch.Generator().manual_seed(3)))
    torch.manual_seed(1)
    model.train()
    losses = model.loss(make.batch())
    perceived = model.encode(make.batch()).perceived
    seen = [] if perceived is None else [perceived.main_logits, perceived.emotion_attention]
    return [losses.total, *seen]


@pytest.mark.parametrize("system", [*SYSTEMS, "mime"])
def test_they_change_neither_loss_nor_perception_and_all_others_do(system, vocabulary, make):
    tiny = dataclasses.replace(TINY, label_smoothing=0.0, dropout=0.0)
    if system == "mime":
        config = for_model(tiny, "mime")
    else:
        config = dataclasses.replace(tiny, **SYSTEMS[system])
    idle = without_effect(config)
    before = loss_and_perception(config, vocabulary, make)
    for name, value in CHANGES.items():
        after = loss_and_perception(dataclasses.replace(config, **{name: value}), vocabulary, make)
        equal = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert equal == (name in idle), name
