"""The model as a thing to train: it learns, the same way each time, and compiles as one graph."""

from __future__ import annotations

import contextlib

import pytest
import torch

from ecore.data.vocabulary import CLS, EOS
from ecore.model.transformer import MultiHeadAttention

both_strategies = pytest.mark.parametrize("strategy", ["soft", "hard"])


def steps(model, batches, rate=3e-3):
    """Train on ``batches`` one after another; the losses."""
    optimiser = torch.optim.Adam(model.parameters(), rate)
    model.train()
    seen = []
    for batch in batches:
        optimiser.zero_grad()
        losses = model.loss(batch)
        losses.total.backward()
        optimiser.step()
        seen.append(losses)
    return seen


def task(make, seed):
    """A word of the context tells the emotion, and the emotion the answer."""
    batch = make.batch(rows=16, words=6, response=4, concepts=0, seed=seed)
    context = batch.context.clone()
    context[:, 1] = 20 + batch.emotion
    response = torch.stack([30 + batch.emotion, 40 + batch.emotion, torch.full((16,), EOS)], 1)
    return batch._replace(context=context, response=response)


@both_strategies
def test_learns(make, strategy):
    model = make.model(strategy=strategy, dropout=0.0, graph_dropout=0.0)
    assert (task(make, 0).context[:, 0] == CLS).all()
    losses = steps(model, [task(make, seed) for seed in range(60)], 1e-2)
    first, last = losses[0], losses[-1]
    assert last.generation < 0.5 * first.generation
    assert last.emotion < 0.5 * first.emotion
    unseen = model.eval().loss(task(make, 1000))
    assert unseen.correct >= 12
    assert unseen.nll / unseen.tokens < 1.5


@both_strategies
def test_same_seed_same_run(make, strategy):
    runs = []
    for _ in range(2):
        model = make.model(strategy=strategy)
        torch.manual_seed(5)
        losses = steps(model, [make.batch(seed=seed) for seed in range(5)])
        runs.append([*(x.total for x in losses), *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_dropout_is_on_in_training_alone(make):
    model, batch = make.model(), make.batch()
    assert torch.equal(model(batch).logits, model(batch).logits)
    model.train()
    assert not torch.equal(model(batch).logits, model(batch).logits)
    still = make.model(dropout=0.0, graph_dropout=0.0).train()
    torch.testing.assert_close(still(batch).logits, make.model()(batch).logits)


@pytest.mark.usefixtures("fresh_compile")
@both_strategies
def test_forward_compiles_as_one_graph(make, strategy):
    model, batch = make.model(strategy=strategy, decoder_blocks=1), make.batch()
    expected = model(batch)
    actual = torch.compile(model.forward, fullgraph=True, backend="aot_eager")(batch)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(actual.encoding.perceived.relevant, expected.encoding.perceived.relevant)
    parameters = [model.output.weight, model.embedding.word.weight, model.perceiver.correlation.factor]
    torch.testing.assert_close(
        torch.autograd.grad(actual.logits.square().sum(), parameters),
        torch.autograd.grad(expected.logits.square().sum(), parameters),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compile")
@torch.no_grad()
def test_forward_compiles_with_inductor(make):
    model, batch = make.model(decoder_blocks=1, dim=12), make.batch(rows=2, words=6, response=3)
    compiled = torch.compile(model.forward, fullgraph=True)(batch)
    torch.testing.assert_close(compiled.logits, model(batch).logits, rtol=1e-4, atol=1e-5)


@both_strategies
def test_bfloat16_autocast(make, strategy):
    """Half precision as far as a CPU can show it: finite, close, losses and gradients in float32."""
    model, batch = make.model(strategy=strategy), make.batch()
    expected = model.loss(batch)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(batch)
    losses.total.backward()
    for name in ("total", "generation", "emotion", "correlation"):
        assert getattr(losses, name).dtype == torch.float32
    assert losses.total.item() == pytest.approx(expected.total.item(), rel=0.02)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_low_precision(causal):
    """It looks where it may and nowhere else, forward and backward."""
    attention, x = MultiHeadAttention(8, heads=2, width=8), torch.randn(3, 40, 8, requires_grad=True)
    mask = None if causal else (torch.arange(40) < torch.tensor([[40], [17], [1]]))[:, None, None]

    def attended():
        return attention(attention.queries(x), *attention.keys_values(x), mask=mask, causal=causal)

    expected = attended()
    with torch.autocast("cpu", torch.bfloat16):
        low = attended()
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.02, atol=0.02)
    ours, wanted = (torch.autograd.grad(y.float().square().sum(), x)[0] for y in (low, expected))
    torch.testing.assert_close(ours, wanted, rtol=0.05, atol=0.05)


def test_the_papers_letter_runs(make):
    model = make.model(graph_norm=False, score_scale=1.0, eco_form="inner")
    assert not any("norm" in name for name, _ in model.perceiver.graph_network.named_parameters())
    losses = steps(model, [make.batch(seed=seed) for seed in range(3)], 1e-4)
    assert all(x.total.isfinite() for x in losses)


@pytest.mark.parametrize("strategy", ["soft", "hard", "none"])
def test_a_step_asks_the_device_nothing(make, strategy, monkeypatch):
    """Tensors without data cannot answer: where a step needs a value on the host, a GPU would be waited for."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no such device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    model, batch = make.model(strategy=strategy).train().to("meta"), make.batch()
    tokens = int((batch.response != 0).sum())
    losses = model.loss(batch.to("meta"), health=True, tokens=tokens)
    losses.total.backward()
    assert model.output.weight.grad.shape == model.output.weight.shape
    with pytest.raises((RuntimeError, NotImplementedError)):
        model.loss(batch.to("meta"))  # counts the words itself
