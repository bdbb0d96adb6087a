"""MIME's equations, written out in plain torch."""

from __future__ import annotations

import math

import pytest
import torch

from ecore import cli
from ecore.baselines.base import encode
from ecore.baselines.mime import MIME, POSITIVE_EMOTIONS, Gaussian
from ecore.config import for_model
from ecore.errors import InputError
from tests.ecore.baselines.conftest import related_tables
from tests.ecore.model.conftest import EMOTIONS, TINY, vocabulary_of


def linear(x, layer):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def written_out(model, batch, noise, labels):
    """The fused memory, the emotion logits and the divergence of each row alone, without padding."""
    table, rows = model.perceiver.main.weight, []
    positive = torch.tensor([name in POSITIVE_EMOTIONS for name in EMOTIONS])
    for row, length in enumerate(batch.lengths.tolist()):
        embedded = model.embedding(batch.context[row : row + 1, :length], batch.state[row : row + 1, :length])
        h = encode(model.encoder, embedded, torch.ones(1, length, dtype=torch.bool))[0]  # [M, D]
        context = h[0]
        logits = table @ (model.query.weight @ context)
        hidden = linear(context, model.hidden).clamp(min=0)
        sides, priors = (model.positive_side, model.negative_side), []
        mixed = []
        for side, own, drawn in zip(sides, (positive, ~positive), noise, strict=True):
            mean, log_variance = linear(hidden, side.prior.mean), linear(hidden, side.prior.log_variance)
            priors.append((mean, log_variance))
            z = mean + drawn[row] * log_variance.exp().sqrt()
            share = torch.softmax(linear(z, side.weights), 0)
            mixed.append((share[:, None] * table[own]).sum(0))
        mimics = bool(positive[labels[row] if labels is not None else logits.argmax()])
        ordered = mixed if mimics else mixed[::-1]
        refined = []
        for encoder, emotion in zip((model.mimicking, model.other), ordered, strict=True):
            joined = torch.cat([h, emotion.expand(length, -1)], 1) @ encoder.projection.weight.T
            joined = joined + model.embedding.position[:length]
            refined.append(encode(encoder.encoder, joined[None], torch.ones(1, length, dtype=torch.bool))[0])
        both = torch.cat(refined, 1)
        fused = linear(torch.sigmoid(linear(both, model.fusion.gate)) * both, model.fusion.output)
        divergence = 0.0
        of_side = refined if mimics else refined[::-1]
        for side, (mean, log_variance), words in zip(sides, priors, of_side, strict=True):
            inner = linear(torch.cat([context, words.mean(0)]), side.hidden).clamp(min=0)
            normal = torch.distributions.Normal
            posterior = normal(
                linear(inner, side.posterior.mean), linear(inner, side.posterior.log_variance).exp().sqrt()
            )
            prior = normal(mean, log_variance.exp().sqrt())
            divergence += torch.distributions.kl_divergence(posterior, prior).sum()
        rows.append((fused, logits, divergence))
    return rows


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_equations(make, training):
    model, batch = make.model("mime", dropout=0.0).double().train(training), make.batch()
    torch.manual_seed(3)
    encoding = model.encode(batch)
    torch.manual_seed(3)
    noise = [torch.randn(4, 24, dtype=torch.float64) if training else torch.zeros(4, 24) for _ in range(2)]
    rows = written_out(model, batch, noise, batch.emotion if training else None)
    for row, (fused, logits, _) in enumerate(rows):
        torch.testing.assert_close(encoding.memory[row, : len(fused)], fused)
        torch.testing.assert_close(encoding.perceived.main_logits[row], logits)
    if training:
        expected = torch.stack([divergence for *_, divergence in rows]).mean()
        torch.testing.assert_close(encoding.losses["divergence"], expected)
        torch.manual_seed(3)
        losses = model.loss(batch, health=True)
        torch.testing.assert_close(losses.total, losses.generation + losses.emotion + expected)
        torch.testing.assert_close(losses.health["divergence"], expected)


def test_divergence_by_hand():
    """KL(N(1, 1) || N(0, 4)) = ln 2 + (1 + 1) / 8 - 1 / 2."""
    one = Gaussian(torch.tensor([[1.0]]), torch.tensor([[0.0]]))
    other = Gaussian(torch.tensor([[0.0]]), torch.tensor([[math.log(4.0)]]))
    assert one.divergence(other).item() == pytest.approx(math.log(2.0) + 2 / 8 - 0.5)


@torch.no_grad()
def test_no_label_is_read_in_evaluation(make):
    """Their code takes the polarity of test dialogues from their labels."""
    model, batch = make.model("mime"), make.batch()
    other = batch._replace(emotion=(batch.emotion + 2) % len(EMOTIONS))
    assert torch.equal(model(batch).logits, model(other).logits)
    assert torch.equal(model.score(batch).nll, model.score(other).nll)


def test_one_polarity_is_refused():
    vocabulary = vocabulary_of(20, ("angry", "sad"))
    with pytest.raises(InputError, match=r"mime parts emotions by polarity.*got angry, sad"):
        MIME(for_model(TINY, "mime"), vocabulary, related_tables(vocabulary))


def test_figures_say_what_cannot_be_drawn(prepared_folder, tmp_path, capsys):
    run = tmp_path / "run"
    small = ["--preset", "tiny", "--dim", "12", "--max-steps", "2", "--warmup", "5", "--threads", "1"]
    train = ["train", "--data", str(prepared_folder), "--out", str(run), "--model", "mime", *small]
    assert cli.main(train) == 0
    assert cli.main(["figures", str(run), "--out", str(tmp_path / "figures"), "--only", "4"]) == 2
    assert "learned no emotion correlation" in "".join(capsys.readouterr())
