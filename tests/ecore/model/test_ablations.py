"""Every ablation leaves out what the paper's tables say, and nothing else."""

from __future__ import annotations

import pytest
import torch

from ecore import pipeline

both_strategies = pytest.mark.parametrize("strategy", ["soft", "hard"])
GRAPH = ("perceiver.graph_network.", "perceiver.perceptron.")


def gradients(model, loss):
    """Gradient norm of every parameter, 0 where there is none."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: 0.0 if p.grad is None else float(p.grad.norm()) for n, p in model.named_parameters()}


@both_strategies
def test_graph(make, strategy):
    """Attention from h_X to the emotions stands for E^{w-e}, Softmax(R) for E^{e-e}; no node sum."""
    model, batch = make.model(strategy=strategy, ablations=("graph",)).double(), make.batch()
    names = [name for name, _ in model.named_parameters()]
    assert {name.split(".")[2] for name in names if name.startswith("perceiver.graph_network.")} == {
        "query",
        "key",
    }
    assert not any("guidance" in name for name in names)
    encoding = model.encode(batch)
    assert encoding.guidance is None
    emotions = model.embedding.word(model.emotion_words) * 24**0.5
    edges = model.perceiver.correlation().softmax(1).fill_diagonal_(1.0)
    for b, length in enumerate(batch.lengths):
        words = encoding.memory[b, :length]
        attention = model.perceiver.graph_network
        score = attention.query(words) @ attention.key(emotions).T / 24**0.5
        torch.testing.assert_close(encoding.perceived.global_signal[b], edges @ score.softmax(1).sum(0))
    assert model.loss(batch).total.isfinite()


@both_strategies
def test_co_p(make, strategy):
    """h^g is the sum of E^{w-e}: the emotions' own edges are not read."""
    model, batch = make.model(strategy=strategy, ablations=("co-p",)), make.batch()
    seen = []
    model.perceiver.perceptron.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert torch.equal(model.encode(batch).perceived.global_signal, seen[0])
    whole = make.model(strategy=strategy).encode(batch).perceived.global_signal
    assert not torch.allclose(whole, seen[0], atol=1e-4)


@both_strategies
def test_co_g(make, strategy):
    """The main emotion's embedding goes where the node sum went."""
    model, batch = make.model(strategy=strategy, ablations=("co-g",)), make.batch()
    encoding = model.encode(batch)
    main = encoding.perceived.main_logits.argmax(1)
    expected = model.embedding.word.weight[model.emotion_words[main]] * 24**0.5
    torch.testing.assert_close(encoding.guidance, expected)


@both_strategies
def test_co_loss(make, strategy):
    """gamma 2 = 0; the loss is still reported."""
    model, batch = make.model(strategy=strategy, ablations=("co-loss",)), make.batch()
    losses = model.loss(batch)
    torch.testing.assert_close(losses.total, losses.generation + losses.emotion)
    whole = make.model(strategy=strategy).loss(batch)
    torch.testing.assert_close(losses.correlation, whole.correlation)
    torch.testing.assert_close(whole.total, whole.generation + whole.emotion + whole.correlation)
    assert losses.correlation != 0


@both_strategies
def test_gate_g(make, strategy):
    """h_emo = h^m."""
    model, batch = make.model(strategy=strategy, ablations=("gate-g",)), make.batch()
    encoding = model.encode(batch)
    assert torch.equal(encoding.perceived.emotion_attention, encoding.perceived.main_logits)
    whole = make.model(strategy=strategy).encode(batch)
    torch.testing.assert_close(whole.perceived.main_logits, encoding.perceived.main_logits)
    torch.testing.assert_close(
        whole.perceived.emotion_attention, whole.perceived.main_logits * (1 + whole.perceived.gate)
    )


@both_strategies
def test_gen_loss(make, strategy):
    """L_gen moves neither graph nor perceptron nor R; L_emo does; the values are those of the whole model."""
    batch = make.batch()
    model, whole = make.model(strategy=strategy, ablations=("gen-loss",)), make.model(strategy=strategy)
    losses = model.loss(batch)
    for name in ("generation", "emotion", "correlation", "total"):
        torch.testing.assert_close(getattr(losses, name), getattr(whole.loss(batch), name))
    norms = gradients(model, model.loss(batch).generation)
    for name, norm in norms.items():
        if name.startswith((*GRAPH, "perceiver.correlation.")):
            assert norm == 0, name
    assert norms["decoder.blocks.0.join_guidance.weight"] > 0
    assert norms["encoder.norm.weight"] > 0

    by_emotion = gradients(model, model.loss(batch).emotion)
    of_whole = gradients(whole, whole.loss(batch).generation)
    for name in (
        "perceiver.graph_network.layers.0.attention.query.weight",
        "perceiver.graph_network.layers.0.attention.gate.weight",
        "perceiver.correlation.factor",
    ):
        assert by_emotion[name] > 0, name
        assert of_whole[name] > 0, name
    assert by_emotion["perceiver.perceptron.main.weight"] > 0


def test_several_at_once(make):
    model = make.model(ablations=("co-p", "co-g", "co-loss", "gate-g", "gen-loss"))
    assert model.loss(make.batch()).total.isfinite()


def test_the_plain_transformer_knows_no_emotions(make):
    """Strategy none: no graph, no perceptron, no correlation, and the loss is the generation's alone."""
    model, batch = make.model(strategy="none"), make.batch()
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"embedding", "encoder", "decoder", "output"}
    assert not any("join_guidance" in name or "guidance_norm" in name for name, _ in model.named_parameters())
    encoding, losses = model.encode(batch), model.loss(batch, health=True)
    assert encoding.guidance is encoding.perceived is None
    assert losses.total == losses.generation > 0.0
    assert losses.emotion == losses.correlation == losses.correct == 0.0
    losses.total.backward()
    assert all(p.grad is not None for p in model.parameters())
    other = batch._replace(emotion=(batch.emotion + 1) % 8)
    assert torch.equal(model.loss(other).total, losses.total)
    reply = pipeline.ECore(model).respond(["word1 word2"])
    assert reply.emotions == reply.relevant == []


@pytest.mark.parametrize("start", [False, True])
def test_emotions_without_a_graph(make, start):
    """Strategy none with emotions: Eq. 11 on a linear map of the mean of h_X, and nothing of the graph."""
    model, batch = make.model(strategy="none", emotions=True, emotion_start=start), make.batch()
    names = {name for name, _ in model.named_parameters()}
    assert {name for name in names if name.startswith("perceiver")} == {
        *("perceiver.main.weight", "perceiver.main.bias")
    }
    assert not any("guidance" in name for name in names)
    encoding, losses = model.encode(batch), model.loss(batch, health=True)
    for row, (length, logits) in enumerate(zip(batch.lengths, encoding.perceived.main_logits, strict=True)):
        mean = encoding.memory[row, :length].mean(0)
        torch.testing.assert_close(logits, model.perceiver.main(mean))
    assert torch.equal(encoding.perceived.emotion_attention, encoding.perceived.main_logits)
    assert encoding.guidance is None
    expected = torch.nn.functional.cross_entropy(encoding.perceived.main_logits, batch.emotion)
    torch.testing.assert_close(losses.emotion, expected)
    torch.testing.assert_close(losses.total, losses.generation + losses.emotion)
    assert losses.correlation == 0.0
    assert losses.correct == (encoding.perceived.main_logits.argmax(1) == batch.emotion).sum()
    assert losses.health == {}
    losses.total.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    model.loss(batch).generation.backward()
    assert (
        model.perceiver.main.weight.grad is not None
    ) == start  # the start alone brings it into the answer
    reply = pipeline.ECore(model).respond(["word1 word2"])
    assert reply.emotions
    assert len(reply.relevant) == 3
