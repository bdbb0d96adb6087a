"""Gradients of the whole model: by finite differences, and which parameters get one at all."""

from __future__ import annotations

import pytest
import torch

both_strategies = pytest.mark.parametrize("strategy", ["soft", "hard"])

# Otsu's split has no gradient: under the hard strategy the gate (Eq. 12) chooses without learning to.
WITHOUT_GRADIENT = {
    "soft": set(),
    "hard": {"perceiver.perceptron.gate.weight", "perceiver.perceptron.gate.bias"},
}


@both_strategies
def test_every_parameter_gets_a_gradient(make, strategy):
    model = make.model(strategy=strategy).train()
    model.loss(make.batch()).total.backward()
    missing = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert missing == WITHOUT_GRADIENT[strategy]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@both_strategies
def test_by_finite_differences(make, strategy, monkeypatch):
    """Along each parameter's own gradient; the casts to float32 in the losses are taken out for it."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)
    model, batch = make.model(strategy=strategy, commonsense=False).double(), make.batch()
    model.loss(batch).total.backward()
    step, checked = 1e-6, 0
    for name, parameter in model.named_parameters():
        if name in WITHOUT_GRADIENT[strategy]:
            continue
        slope = parameter.grad.norm()
        direction = parameter.grad / slope
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                values.append(model.loss(batch).total)
                parameter.add_(direction, alpha=-sign * step)
        assert ((values[0] - values[1]) / (2 * step)).item() == pytest.approx(
            slope.item(), rel=1e-4, abs=1e-7
        ), name
        checked += 1
    assert checked > 60


def test_padding_words_get_no_gradient(make):
    model = make.model()
    model.loss(make.padded(make.batch(), 4)).total.backward()
    assert not model.embedding.word.weight.grad[0].any()
    assert not model.embedding.state.weight.grad[0].any()
    assert model.embedding.state.weight.grad[1:].any(1).all()
