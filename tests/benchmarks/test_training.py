"""The whole-step benchmark: what it switches on and off never changes the mathematics."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import training, workload
from benchmarks.training import WITHOUT, Steps
from ecore.config import PRESETS
from ecore.data.vocabulary import CLS, EOS, PAD


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small():
    """Made-up batches of a small model and vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload, "WORDS", 300)
        patch.setattr(workload, "CONTEXT_WORDS", 12)
        patch.setattr(workload, "RESPONSE_WORDS", 6)
        patch.setitem(PRESETS, "released", PRESETS["tiny"])
        yield workload.workload(None, "released", batch_size=8, number=6)


def losses(work, parts, steps=50):
    settings = {"dropout": 0.0, "graph_dropout": 0.0, "dim": 24, "feed_forward": 32}
    one = Steps(work, parts, **settings)
    return np.array([float(one.take(*work.batches[i % len(work.batches)])) for i in range(steps)])


@pytest.fixture(scope="module")
def plain(small):
    return losses(small, [])


@pytest.mark.parametrize("parts", [[part] for part in WITHOUT] + [list(WITHOUT)], ids=lambda p: ", ".join(p))
def test_fifty_steps_have_the_plain_losses(small, plain, parts):
    assert plain[48] < 0.98 * plain[0]  # the same batch
    np.testing.assert_allclose(losses(small, parts), plain, rtol=2e-4)


def test_bfloat16_stays_near(small, plain):
    low = losses(small, [*WITHOUT, "bfloat16"])
    assert not np.array_equal(low, plain)
    np.testing.assert_allclose(low, plain, rtol=0.02)


def test_each_improvement_is_taken_out(small, monkeypatch):
    """Not merely renamed: what stands in its place runs, and nothing of it when it is in."""
    ran = []
    stand_in = training._plain_losses
    monkeypatch.setattr(training, "_plain_losses", lambda *a: ran.append("loss") or stand_in(*a))
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: ran.append("dropout") or x)
    Steps(small, []).take(*small.batches[0])
    assert {"loss", "dropout"} <= set(ran)
    ran.clear()
    Steps(small, list(WITHOUT)).take(*small.batches[0])
    assert not ran


def test_made_up_batches_are_like_real_ones():
    batches = [workload.made_up_batch(16, seed) for seed in range(60)]
    contexts = np.concatenate([batch.lengths.numpy() - 1 for batch, _ in batches])
    answers = [int((batch.response != PAD).sum()) for batch, _ in batches]
    assert contexts.mean() == pytest.approx(workload.CONTEXT_WORDS, rel=0.15)
    assert np.mean(answers) / 16 == pytest.approx(workload.RESPONSE_WORDS, rel=0.15)
    for (batch, tokens), counted in zip(batches, answers, strict=True):
        assert tokens == counted
        assert (batch.context[:, 0] == CLS).all()
        assert ((batch.context != PAD).sum(1) == batch.lengths).all()
        assert ((batch.response == EOS).sum(1) == 1).all()
    assert workload.made_up_batch(2, 0, context=100)[0].context.shape == (2, 101)


def test_report(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "workload", lambda *_: small)
    monkeypatch.setattr(training, "peak_memory", lambda *_: 123.0)
    monkeypatch.setattr(training, "unit", lambda: 0.01)
    monkeypatch.setattr(
        training, "growth", lambda *_: [{"batch": 1, "context_words": None, "seconds_a_sample": 0.1}]
    )
    out, image = tmp_path / "training.json", tmp_path / "training.svg"
    training.main(["--rounds", "2", "--out", str(out), "--plot", str(image)])
    told = capsys.readouterr().out
    for name in training.configurations(False):
        assert name in told
    kept = json.loads(out.read_text())["results"][0]
    assert [row["configuration"] for row in kept["configurations"]] == list(training.configurations(False))
    assert all(row["u"] == pytest.approx(row["mean_seconds"] / 0.01) for row in kept["configurations"])
    assert kept["parts"]["all"]["graph operators"] > 0.0
    before = image.read_bytes()
    image.unlink()
    training.main(["--from", str(out), "--plot", str(image)])
    assert image.read_bytes() == before
