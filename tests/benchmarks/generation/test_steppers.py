"""Every way to take a step decodes the same, and a wrong one is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.generation import steppers
from benchmarks.generation.runner import Contexts
from benchmarks.workload import workload
from ecore.data.batches import Batch
from ecore.generation.decoding import Decoding
from ecore.generation.search import generate
from ecore.model import ECore
from ecore.model import decoder as decoder_module


def contexts(rows: int) -> Batch:
    return Contexts(None, 23_000, "cpu")(rows)


def test_configurations_decode_the_same(model: ECore) -> None:
    batch = contexts(3)
    expected = generate(model, batch, Decoding(max_length=4))
    found = steppers.configurations(model, compiled=False)
    assert list(found)[-1].startswith("all")
    for stepper, parts in found.values():
        with steppers.only(parts):
            steppers.check(model, stepper, batch)
            assert generate(stepper, batch, Decoding(max_length=4)) == expected


def test_configurations_of_a_model_that_copies() -> None:
    """Its answers begin with the emotions' start, and a word may be one of the context's."""
    whole = workload(None, "tiny", number=1)
    copying = whole.model(copy=True, emotion_start=True, strategy="soft").double().eval()
    for stepper, parts in steppers.configurations(copying, compiled=False).values():
        with steppers.only(parts):
            steppers.check(copying, stepper, contexts(2))


def test_only_takes_the_others_out(model: ECore) -> None:
    project, attend = decoder_module.project, decoder_module.attend
    with steppers.only(("small attention",)):
        assert decoder_module.project is steppers._linear
        assert decoder_module.attend is attend
    with steppers.only(("split products",)):
        assert decoder_module.project is project
        assert decoder_module.attend is not attend
    assert (decoder_module.project, decoder_module.attend) == (project, attend)


def test_a_wrong_step_is_not_timed(model: ECore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        decoder_module, "project", lambda x, weight, bias: F.linear(x, getattr(weight, "weight", weight))
    )
    with torch.no_grad():
        model.decoder.blocks[0].feed_forward[2].bias.add_(1.0)
    with pytest.raises(SystemExit, match="word 1 has not the logits"):
        steppers.check(model, model, contexts(2))
