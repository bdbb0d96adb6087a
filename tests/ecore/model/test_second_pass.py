"""The model's encoding against the paper's two passes in full: dense edges, every layer, nothing shared."""

from __future__ import annotations

import pytest
import torch

from ecore.config import ModelConfig
from ecore.model import ECore
from ecore_kernels import EmotionGraph, edge_attention, otsu


def mlp(fuse, x):
    """Two-layer ReLU MLP, dropout left out."""
    return fuse[2](torch.relu(fuse[0](x)))


def graph_pass(model, nodes, edge, neighbors):
    """All layers on dense edges (Eqs. 4 to 7): last node features and edges."""
    resolutions = len(model.config.thresholds)
    size = model.config.dim // resolutions
    scale = size**-0.5 if model.config.score_scale is None else model.config.score_scale
    for layer in model.perceiver.graph_network.layers:
        attention = layer.attention
        query, key, value = (
            torch.stack(linear(nodes).split(size, dim=2), 1)
            for linear in (attention.query, attention.key, attention.value)
        )
        gate = attention.gate(nodes).permute(0, 2, 1)
        output, edge = edge_attention(
            query, key, value, edge, neighbors, gate=gate, edge_scale=attention.edge_scale, scale=scale
        )
        fused = mlp(layer.fuse, torch.cat(output.unbind(1), 2))
        nodes = layer.norm(nodes + fused) if model.config.graph_norm else fused
    return nodes, edge


def encode_in_full(model, batch):
    """h^g, h^m, h_emo, relevant emotions and node sum."""
    config, words = model.config, batch.context.shape[1]
    inside = (batch.context != 0).double()[..., None]
    x = model.embedding.word(batch.context) * config.dim**0.5
    x = x + model.embedding.position[:words] + model.embedding.state(batch.state)
    e = model.embedding.word(model.emotion_words) * config.dim**0.5
    related = model.embedding.word(batch.concepts) * config.dim**0.5 + model.embedding.state.weight[4]
    memory = model.encoder(torch.cat([x, related], 1), torch.cat([batch.context, batch.concepts], 1) != 0)[0]
    mean = (memory[:, :words] * inside).sum(1) / inside.sum(1)

    s = model.perceiver.correlation.factor
    r = s.T @ s
    r = r - torch.diag(r.diagonal()) + torch.eye(len(r))
    graph = EmotionGraph.from_intensity(
        model.intensity[batch.context], batch.lengths, config.thresholds, torch.softmax(r, 1)
    )
    edge, neighbors = graph.dense()
    if config.graph_norm:
        x, e = model.perceiver.graph_network.word_norm(x), model.perceiver.graph_network.emotion_norm(e)
    nodes = torch.cat([x, e.expand(len(x), -1, -1)], 1)

    _, last = graph_pass(model, nodes, edge, neighbors)
    to_emotion = last[:, :, config.graph_norm : words, words:].sum((1, 2))  # without [CLS]
    between = last[:, :, words:, words:].sum(1)
    others = between - torch.diag_embed(between.diagonal(dim1=1, dim2=2))
    if config.graph_norm and config.own_weight:
        others = others / others.abs().sum(2, keepdim=True).clamp(min=1.0)
    between = others + torch.eye(others.shape[-1])
    if config.graph_norm and not config.own_weight:
        between = between / between.abs().sum(2, keepdim=True)
    perception = torch.einsum("bij,bj->bi", between, to_emotion)  # Eq. 8
    perceptron = model.perceiver.perceptron
    normed = perceptron.norm(perception)
    main = perceptron.main(torch.cat([normed, perceptron.context(mean)], 1))  # Eq. 9
    attention = torch.sigmoid(perceptron.gate(normed)) * main + main  # Eq. 12

    if config.strategy == "soft":  # Eq. 13
        relevant = torch.zeros_like(attention, dtype=torch.bool)
        for b, row in enumerate(attention):
            relevant[b, row.sort(descending=True).indices[:3]] = True
        weight = attention.softmax(1)
        edge = edge.clone()
        edge[..., words:] = neighbors[..., words:] * weight[:, None, None]
    else:  # Eq. 14
        relevant = otsu(attention.float(), config.max_relevant).mask
        keep = torch.cat([torch.ones_like(batch.context, dtype=torch.bool), relevant], 1)
        neighbors = neighbors & keep[:, None, None, :] & keep[:, None, :, None]
        edge = edge * neighbors
    features, _ = graph_pass(model, nodes, edge, neighbors)
    guidance = (features[:, :words] * inside).sum(1)  # Eq. 24
    return {
        "global_signal": perception,
        "main_logits": main,
        "emotion_attention": attention,
        "relevant": relevant,
        "guidance": guidance,
    }


@pytest.mark.parametrize("strategy", ["soft", "hard"])
@pytest.mark.parametrize(
    "settings",
    [
        {"graph_layers": 1},
        {"graph_layers": 2},
        {"graph_layers": 3},
        {"graph_norm": False, "score_scale": 1.0},
        {"own_weight": False, "graph_bias": True},
        {"thresholds": (0.0, 0.1), "max_relevant": 2},
    ],
    ids=["one layer", "two", "three", "the letter", "older runs", "two resolutions"],
)
def test_shortcuts_change_nothing(make, strategy, settings):
    """Values, and the gradients of all graph and perceptron parameters and of the embeddings, in float64."""
    model, batch = make.model(strategy=strategy, **settings).double(), make.batch()
    with torch.no_grad():
        for layer in model.perceiver.graph_network.layers:
            layer.attention.edge_scale.fill_(1.2)
        # Trained models have larger embeddings than new ones.
        model.embedding.word.weight.mul_(20.0)
    encoding = model.encode(batch)
    expected = encode_in_full(model, batch)
    names = ("global_signal", "main_logits", "emotion_attention", "guidance")
    for name in names:
        # The soft weights are rounded to float32 on their way, whatever the model's type.
        tolerance = 1e-6 if name == "guidance" else 1e-10
        torch.testing.assert_close(
            getattr(encoding.perceived, name), expected[name], rtol=tolerance, atol=tolerance
        )
    assert torch.equal(encoding.perceived.relevant, expected["relevant"])

    parameters = dict(model.named_parameters())
    totals = []
    for results in (encoding.perceived._asdict(), expected):
        torch.manual_seed(1)
        total = sum(
            (torch.randn_like(results[n]) * results[n] / expected[n].detach().std()).sum() for n in names
        )
        totals.append(torch.autograd.grad(total, list(parameters.values()), allow_unused=True))
    compared = 0
    for name, actual, wanted in zip(parameters, *totals, strict=True):
        if wanted is not None and name.startswith(("perceiver.", "embedding.")):
            compared += 1
            largest = float(wanted.abs().max())
            torch.testing.assert_close(
                actual, wanted, rtol=1e-5, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert compared > 20


def test_the_soft_strategy_ranks_by_the_gated_signal(make):
    encoding = make.model().encode(make.batch())
    assert torch.equal(encoding.perceived.relevant.sum(1), torch.full((4,), 3))
    for attention, relevant in zip(
        encoding.perceived.emotion_attention, encoding.perceived.relevant, strict=True
    ):
        assert attention[relevant].min() > attention[~relevant].max()


def test_the_hard_strategy_is_otsu(make):
    encoding = make.model(strategy="hard", max_relevant=2).encode(make.batch())
    assert torch.equal(encoding.perceived.relevant, otsu(encoding.perceived.emotion_attention, 2).mask)
    assert encoding.perceived.relevant.sum(1).max() <= 2


def test_fewer_emotions_than_the_top_three(make):
    vocabulary = make.vocabulary(20, ("angry", "sad"))
    config = ModelConfig(dim=12, encoder_blocks=1, decoder_blocks=1, heads=2)
    model = ECore(config, vocabulary, make.tables(vocabulary)).eval()
    losses = model.loss(make.random_batch(vocabulary))
    assert losses.total.isfinite()
    assert model.encode(make.random_batch(vocabulary)).perceived.relevant.all()


@pytest.mark.parametrize("layers, varies", [(1, False), (2, False), (3, True)])
def test_emotions_hear_of_the_context_in_the_third_layer(make, monkeypatch, layers, varies):
    """[CLS] hears the words in the first layer, emotions hear that [CLS] in the second, their edges show it next."""
    model, seen = make.model(graph_layers=layers).double(), []
    perceive = model.perceiver.graph_network.perceive
    monkeypatch.setattr(
        model.perceiver.graph_network, "perceive", lambda *a: seen.append(perceive(*a)) or seen[0]
    )
    with torch.no_grad():
        model.encode(make.batch())
    among = seen[0].emotion_to_emotion
    assert among.abs().max() > 0
    assert torch.allclose(among, among[:1].expand_as(among), rtol=1e-9) != varies
