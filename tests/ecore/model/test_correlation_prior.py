"""R taught by the words of Table 12 that occur together: counts, the loss, and the way into a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ecore.config import ModelConfig, TrainingConfig
from ecore.data.emotion_words import cooccurrence, count_emotions, word_cooccurrence
from ecore.data.prepare import prepare
from ecore.data.prepared import PreparedData
from ecore.demo import sample_corpus
from ecore.errors import InputError
from ecore.model.graph_network import Correlation
from ecore.model.losses import prior_loss
from ecore.training.trainer import train

COUNTS = torch.tensor(
    [[0.0, 6.0, 2.0, 0.0], [6.0, 0.0, 1.0, 0.0], [2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "prepared"
    prepare(sample_corpus(), out, progress=False)
    return out


def test_the_loss_by_its_formula():
    correlation = torch.randn(4, 4, dtype=torch.float64)
    expected = 0.0
    for i, others in ((0, (1, 2, 3)), (1, (0, 2, 3)), (2, (0, 1, 3))):  # the fourth occurs with nobody
        scores = torch.tensor([correlation[i, j].item() for j in others]).log_softmax(0)
        share = [COUNTS[i, j] / COUNTS[i].sum() for j in others]
        expected -= sum(p * s for p, s in zip(share, scores, strict=True)) / 3
    assert prior_loss(correlation, COUNTS).item() == pytest.approx(float(expected), rel=1e-6)


def test_log_counts_make_it_least():
    """There it is the counts' own entropy, and descent on S finds it: neither diagonal nor sign is in the way."""
    counts = COUNTS[:3, :3]
    share = counts / counts.sum(1, keepdim=True)
    entropy = -(share * share.clamp(min=1e-30).log()).sum() / 3
    assert prior_loss(counts.clamp(min=1.0).log(), counts).item() == pytest.approx(entropy.item(), rel=1e-6)
    torch.manual_seed(0)
    module = Correlation(3)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        loss = prior_loss(module(), counts)
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(entropy.item(), abs=1e-3)
    off = module().detach()
    assert (off[0, 1] - off[0, 2]).item() == pytest.approx(np.log(3.0), abs=0.1)


def test_gradients_are_finite_without_any_count():
    module = Correlation(4)
    loss = prior_loss(module(), torch.zeros(4, 4))
    loss.backward()
    assert loss == 0.0
    assert torch.equal(module.factor.grad, torch.zeros(4, 4))


def test_words_of_the_training_dialogues_alone(prepared):
    """The prepared words say what the dialogues' texts say, up to each one's last response."""
    data = PreparedData.load(prepared)
    last = {}
    for sample in range(len(data.train)):
        text = data.train.texts(sample)
        last[text["conv_id"]] = [*text["context"], text["response"]]
    expected = cooccurrence((count_emotions(turns) for turns in last.values()), data.vocabulary.emotions)
    counted = word_cooccurrence(data.train, data.vocabulary)
    assert np.array_equal(counted, expected)
    assert np.array_equal(counted, counted.T)
    assert counted.sum() > 20
    assert not counted.diagonal().any()


def test_a_run_learns_it_and_goes_on_with_it(prepared, tmp_path):
    """The loss falls, the log has it, and a resumed run counts again: without counts it would be 0."""
    data = PreparedData.load(prepared)
    config = ModelConfig(
        dim=12, heads=2, encoder_blocks=1, decoder_blocks=1, feed_forward=16, correlation_prior=5.0
    )
    training = TrainingConfig(
        max_steps=8, warmup=4, factor=0.4, batch_size=4, validate_every=50, log_every=2, validate_limit=8
    )
    options = {"progress": False, "device": "cpu"}
    train(tmp_path / "run", data, config, training, **options)
    train(tmp_path / "run", data, resume=True, max_steps=16, **options)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["health_correlation_prior"] for line in lines}
    assert losses[1] > losses[8] + 0.02
    assert losses[8] > losses[16] > 1.0
    assert set(json.loads((tmp_path / "run" / "config.json").read_text())["model"]) >= {"correlation_prior"}


def test_without_words_of_two_emotions(prepared, tmp_path, monkeypatch):
    data = PreparedData.load(prepared)
    monkeypatch.setattr("ecore.data.emotion_words.TABLE_12", {"sad": "sorry"})
    monkeypatch.setattr("ecore.data.emotion_words._emotions_of", lambda: {("sorri",): ["sad"]})
    with pytest.raises(
        InputError, match=r"correlation_prior: no training dialogue of .* holds words of two emotions"
    ):
        train(tmp_path / "run", data, ModelConfig(dim=12, heads=2, correlation_prior=1.0), progress=False)
    assert not (tmp_path / "run").exists()
