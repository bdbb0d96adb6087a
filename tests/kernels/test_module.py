"""MultiResolutionEdgeAttention against its equations, written out."""

from __future__ import annotations

import pytest
import torch

from ecore_kernels import EdgeUpdate, EmotionGraph, MultiResolutionEdgeAttention

DIM, RESOLUTIONS, WORDS, EMOTIONS = 12, 3, 5, 4


@pytest.fixture
def graph(make):
    return make.graph(2, WORDS, EMOTIONS, RESOLUTIONS)


@pytest.fixture
def nodes():
    return torch.randn(2, WORDS + EMOTIONS, DIM, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_two_layers_by_hand(oracle, graph, nodes, scale, bias):
    """Head k has the k-th slices of queries, keys and values, and the k-th gate."""
    first, second = (
        MultiResolutionEdgeAttention(DIM, RESOLUTIONS, scale=scale, bias=bias).double() for _ in range(2)
    )
    with torch.no_grad():
        first.edge_scale.fill_(0.8)
    output, update = first(nodes, graph)
    features, last = second(output, graph, [update])

    def project(linear, x):
        return x @ linear.weight.mT + (linear.bias if bias else 0.0)

    size = DIM // RESOLUTIONS
    updates, values = [], []
    for layer, x in ((first, nodes), (second, output)):
        query, key, value = (
            torch.stack(project(linear, x).split(size, dim=2), 1)
            for linear in (layer.query, layer.key, layer.value)
        )
        gate = project(layer.gate, x).permute(0, 2, 1)
        updates.append(EdgeUpdate(query, key, gate, layer.edge_scale))
        values.append(value)
    expected, _ = oracle.layers(graph, updates, values, size**-0.5 if scale is None else scale)
    for actual, heads in zip((output, features), expected, strict=True):
        torch.testing.assert_close(actual, torch.cat([heads[:, k] for k in range(RESOLUTIONS)], 2))
    for actual, by_hand in zip((update, last), updates, strict=True):
        torch.testing.assert_close(list(actual), list(by_hand))


def test_gradients_reach_every_parameter(graph, nodes):
    first, second = (MultiResolutionEdgeAttention(DIM, RESOLUTIONS).double() for _ in range(2))
    output, update = first(nodes, graph)
    output, _ = second(output, graph, [update])
    output.square().sum().backward()
    assert nodes.grad.abs().sum() > 0
    for name, parameter in first.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    # Its own edges are the next layer's: this one's gate is read by nobody.
    unread = {
        name for name, p in second.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)
    }
    assert unread == {"gate.weight", "gate.bias", "edge_scale"}


def test_attend_words_is_the_slice(graph, nodes):
    layer = MultiResolutionEdgeAttention(DIM, RESOLUTIONS).double()
    update, values = layer.edge_update(nodes), layer.values(nodes)
    words = layer.attend(update, values, graph, receivers="words")
    torch.testing.assert_close(words, layer.attend(update, values, graph)[:, :WORDS])


def test_starts_with_an_edge_scale_of_one():
    layer = MultiResolutionEdgeAttention(DIM, RESOLUTIONS)
    assert layer.edge_scale.shape == ()
    assert layer.edge_scale.item() == 1.0
    assert layer.scale == (DIM // RESOLUTIONS) ** -0.5


@pytest.mark.parametrize("dim, resolutions", [(10, 3), (12, 0), (2, 3)])
def test_refuses_a_width_that_cannot_be_split(dim, resolutions):
    with pytest.raises(
        ValueError, match=r"dim: expected a positive multiple|resolutions: expected at least 1"
    ):
        MultiResolutionEdgeAttention(dim, resolutions)


def test_refuses_a_graph_of_other_resolutions(nodes):
    graph = EmotionGraph.from_intensity(
        torch.rand(2, WORDS), torch.tensor([WORDS, WORDS]), (0.0, 0.1), torch.eye(EMOTIONS)
    )
    with pytest.raises(ValueError, match=r"expected \[2, 2, 9, 4\], got \[2, 3, 9, 4\]"):
        MultiResolutionEdgeAttention(DIM, RESOLUTIONS).double()(nodes, graph)


def test_state_dict_round_trip(graph, nodes):
    one, other = (MultiResolutionEdgeAttention(DIM, RESOLUTIONS).double() for _ in range(2))
    assert not torch.equal(one(nodes, graph)[0], other(nodes, graph)[0])
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(nodes, graph)[0], other(nodes, graph)[0])


@pytest.mark.usefixtures("fresh_compile")
def test_compile(graph, nodes):
    layer = MultiResolutionEdgeAttention(DIM, RESOLUTIONS).double()

    def run(nodes):
        output, update = layer(nodes, graph)
        return layer(output, graph, [update])[0]

    expected = run(nodes)
    actual = torch.compile(run, fullgraph=True, backend="aot_eager")(nodes)
    torch.testing.assert_close(actual, expected)
    weight = layer.query.weight
    torch.testing.assert_close(
        torch.autograd.grad(actual.square().sum(), [nodes, weight]),
        torch.autograd.grad(expected.square().sum(), [nodes, weight]),
    )
