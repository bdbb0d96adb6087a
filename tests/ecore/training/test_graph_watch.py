"""The warning where the graph says the same of every context."""

from dataclasses import replace

import pytest
import torch

from ecore.model import base
from ecore.training.checkpoint import Progress
from ecore.training.graph_watch import SHARE, GraphWatch
from ecore.training.trainer import train


def warnings(shares, warmup=100, contexts=16, progress=None):
    """Steps at which there is a warning, given the share at each logged step."""
    watch = GraphWatch(warmup, progress or Progress())
    looks = {step: watch.look({"step": step, SHARE: share}, contexts) for step, share in shares.items()}
    return [step for step, text in looks.items() if text is not None]


def every(first, last, share):
    return dict.fromkeys(range(first, last + 1, 25), share)


def test_after_two_hundred_blind_steps_once():
    assert warnings(every(25, 300, 0.01)) == []
    assert warnings(every(25, 1000, 0.01)) == [325]  # from step 125 on, the first one after the warm-up
    assert warnings(every(25, 1000, 0.05)) == []
    assert warnings({200: 0.0, 700: 0.0}) == [700]  # a log with longer intervals


def test_a_graph_that_sees_again_begins_anew():
    assert warnings(every(125, 300, 0.01) | {325: 0.4} | every(350, 525, 0.01)) == []
    assert warnings(every(125, 325, 0.01) | {350: 0.4} | every(375, 1000, 0.01)) == [325, 575]


def test_small_batches_say_nothing():
    assert warnings(every(25, 1000, 0.0), contexts=7) == []
    assert warnings(every(25, 1000, 0.0), contexts=8) == [325]
    watch = GraphWatch(0, Progress())
    assert [watch.look({"step": s, SHARE: 0.0}, n) is None for s, n in ((1, 8), (100, 2), (201, 8))] == [
        *(True, True, False)
    ]


def test_a_model_without_a_signal_has_no_warning():
    assert GraphWatch(0, Progress()).look({"step": 900, "loss": 1.0}, 16) is None


def test_a_resumed_run_goes_on_counting():
    progress = Progress()
    assert warnings(every(125, 300, 0.01), progress=progress) == []
    assert warnings(every(325, 500, 0.01), progress=progress) == [325]


@pytest.mark.parametrize("batch_size, warns", [(10, True), (4, False)])
def test_training_warns_in_words(data, tiny, settings, monkeypatch, tmp_path, capsys, batch_size, warns):
    def blind(perceived, intensity, lengths):
        return {"perception_context": torch.tensor(0.01)}

    monkeypatch.setattr(base, "health", blind)
    settings = replace(settings, batch_size=batch_size, max_steps=206, log_every=2, validate_every=500)
    train(tmp_path / "run", data, tiny, settings, progress=False)
    said = capsys.readouterr().err
    assert (said.count("the emotion graph is blind") == 1) == warns
    assert ("less than 5 % of h^g's variance lay between contexts (0.0100 now" in said) == warns
