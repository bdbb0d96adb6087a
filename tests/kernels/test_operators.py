"""The operators against the paper's recurrence, spelled out a row at a time in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ecore_kernels import EdgeUpdate, EmotionGraph, edge_attention, edge_readout, graph_attention

pytestmark = pytest.mark.usefixtures("backend")


def flat(updates):
    """All tensors of ``updates``."""
    return [tensor for update in updates for tensor in update if tensor is not None]


# Any dense graph --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("nodes, dim, value_dim", [(1, 1, 1), (5, 3, 3), (6, 7, 2), (4, 100, 128)])
def test_edge_attention(oracle, assert_same, nodes, dim, value_dim, gated):
    lead = (2, 3, nodes)
    query, key, value, edge = (
        torch.randn(*lead, last, dtype=torch.float64, requires_grad=True)
        for last in (dim, dim, value_dim, nodes)
    )
    gate = torch.randn(lead, dtype=torch.float64, requires_grad=True) if gated else None
    edge_scale = torch.randn((), dtype=torch.float64, requires_grad=True) if gated else None
    neighbors = torch.rand(*lead, nodes) > 0.5
    neighbors[0, 0, 0] = False
    update = EdgeUpdate(query, key, gate, edge_scale)
    output, new_edge = edge_attention(
        query, key, value, edge, neighbors, gate=gate, edge_scale=edge_scale, scale=dim**-0.5
    )
    expected, expected_edge = oracle.one_layer(update, value, edge, neighbors, dim**-0.5)
    leaves = [query, key, value, edge, *([gate, edge_scale] if gated else [])]
    if gated:
        assert_same([output, new_edge], [expected, expected_edge], leaves)
        assert not new_edge[~neighbors].any()
    else:
        assert new_edge is None
        assert_same([output], [expected], leaves)
    assert not output[0, 0, 0].any()


@pytest.mark.parametrize("edge_shape", [(2, 3, 4, 4), (3, 4, 4), (2, 1, 4, 4), (1, 1, 4, 4), (4,), ()])
@pytest.mark.parametrize("neighbor_shape", [(2, 1, 4, 4), (4, 4), (1, 3, 1, 4), None])
def test_edge_attention_broadcasts(assert_same, edge_shape, neighbor_shape):
    query, key, value = (torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    gate = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    edge = torch.randn(edge_shape, dtype=torch.float64, requires_grad=True)
    neighbors = None if neighbor_shape is None else torch.rand(neighbor_shape) > 0.3
    actual = edge_attention(query, key, value, edge, neighbors, gate=gate, edge_scale=0.7)
    spelled = torch.ones((), dtype=torch.bool) if neighbors is None else neighbors
    expected = edge_attention(
        query,
        key,
        value,
        edge.expand(2, 3, 4, 4).clone(),
        spelled.expand(2, 3, 4, 4).clone(),
        gate=gate,
        edge_scale=torch.tensor(0.7, dtype=torch.float64),
    )
    assert_same(actual, expected, [query, key, value, edge, gate])


def test_edge_attention_without_edges_is_attention():
    query, key, value = (torch.randn(2, 3, 9, 8) for _ in range(3))
    output, _ = edge_attention(query, key, value, torch.ones(()), scale=8**-0.5)
    torch.testing.assert_close(output, torch.nn.functional.scaled_dot_product_attention(query, key, value))


# The emotion graph: closed form against recurrence ----------------------------------------------------------


@pytest.mark.parametrize("correlation", ["shared", "batched"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gates", [(True, True, True), (False, True, False), (False, False, False)])
def test_closed_form_is_the_recurrence(make, oracle, assert_same, correlation, masked, gates):
    """Three layers: every layer's output, the readout after the last, and the gradients of everything."""
    graph = make.graph(correlation=correlation, masked=masked)
    updates = [make.update(graph, 3, gated=gated) for gated in gates]
    values = [make.value(graph, dim) for dim in (3, 5, 1)]
    scale, words = 0.6, graph.shape[2]

    expected, edge = oracle.layers(graph, updates, values, scale)
    expected.append(edge[:, :, :words, words:].sum((1, 2)))
    expected.append(edge[:, :, words:, words:].sum(1))
    actual = [
        graph_attention(update.query, update.key, value, graph, updates[:layer], scale=scale)
        for layer, (update, value) in enumerate(zip(updates, values, strict=True))
    ]
    actual.extend(edge_readout(graph, updates, scale=scale))
    leaves = [*flat(updates), *values, graph.emotion_weight, graph.correlation]
    assert_same(actual, expected, leaves)


def test_closed_form_is_edge_attention_iterated(make, assert_same):
    graph = make.graph(3, 9, 6)
    updates = [make.update(graph, 4) for _ in range(3)]
    values = [make.value(graph, 4) for _ in range(3)]
    edge, neighbors = graph.dense()
    expected, actual = [], []
    for layer, ((query, key, gate, edge_scale), value) in enumerate(zip(updates, values, strict=True)):
        actual.append(graph_attention(query, key, value, graph, updates[:layer], scale=0.5))
        output, edge = edge_attention(
            query, key, value, edge, neighbors, gate=gate, edge_scale=edge_scale, scale=0.5
        )
        expected.append(output)
    actual.append(edge_readout(graph, updates, scale=0.5, per_word=True)[0])
    expected.append(edge[:, :, :9, 9:].sum(1))
    assert_same(actual, expected, [*flat(updates), *values, graph.emotion_weight, graph.correlation])


SIZES = [
    # words, emotions, d: lengths around powers of two, one of a kind, and the paper's head size
    (1, 1, 1),
    (1, 3, 7),
    (17, 1, 1),
    (12, 5, 100),
    (13, 4, 128),
    (59, 4, 7),
    (60, 4, 3),
    (61, 4, 3),
    (79, 32, 2),
]


@pytest.mark.parametrize("words, emotions, dim", SIZES)
def test_sizes_that_hurt(make, oracle, assert_same, words, emotions, dim):
    graph = make.graph(1, words, emotions, 2, masked=False)
    updates, values = (
        [make.update(graph, dim), make.update(graph, dim)],
        [make.value(graph, dim) for _ in range(2)],
    )
    scale = dim**-0.5
    outputs, edge = oracle.layers(graph, updates, values, scale)
    expected = [outputs[1], edge[:, :, :words, words:].sum((1, 2)), edge[:, :, words:, words:].sum(1)]
    last = updates[1]
    actual = [
        graph_attention(last.query, last.key, values[1], graph, updates[:1], scale=scale),
        *edge_readout(graph, updates, scale=scale),
    ]
    leaves = [*flat(updates), values[1], graph.emotion_weight, graph.correlation]
    assert_same(actual, expected, leaves, 1e-11)  # sums of 111 terms


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_receivers_words_is_the_slice(make, assert_same, layers):
    graph, history = make.graph(), []
    history = [make.update(graph, 3) for _ in range(layers)]
    update, value = make.update(graph, 3), make.value(graph, 2)
    actual = graph_attention(update.query, update.key, value, graph, history, receivers="words")
    expected = graph_attention(update.query, update.key, value, graph, history)[:, :, :5]
    assert actual.shape == (2, 3, 5, 2)
    leaves = [update.query, update.key, value, *flat(history), graph.emotion_weight, graph.correlation]
    assert_same([actual], [expected], leaves)


def test_readout_without_history_is_the_initial_edges(make):
    graph = make.graph()
    edge, _ = graph.dense()
    to_emotion, between = edge_readout(graph, ())
    torch.testing.assert_close(to_emotion, edge[:, :, :5, 5:].sum((1, 2)))
    torch.testing.assert_close(between, edge[:, :, 5:, 5:].sum(1))
    assert not between.diagonal(dim1=1, dim2=2).any()


def test_readout_per_word_adds_up(make):
    graph = make.graph()
    history = [make.update(graph, 3), make.update(graph, 3)]
    per_word, between = edge_readout(graph, history, per_word=True)
    summed, same = edge_readout(graph, history)
    assert per_word.shape == (2, 5, 4)
    torch.testing.assert_close(per_word.sum(1), summed)
    assert torch.equal(between, same)


# Rows without neighbours ------------------------------------------------------------------------------------


def test_whatever_takes_no_part_is_zero_with_finite_gradients(make):
    graph = make.graph(masked=True)
    history, update, value = [make.update(graph, 3)], make.update(graph, 3), make.value(graph, 3)
    output = graph_attention(update.query, update.key, value, graph, history)
    assert not output[~graph.participants()].any()
    assert output[graph.participants()].any(-1).all()
    leaves = [update.query, update.key, value, *flat(history), graph.emotion_weight, graph.correlation]
    for gradient in torch.autograd.grad(output.square().sum(), leaves):
        assert gradient.isfinite().all()


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_no_nan_arises_on_the_way(make):
    """Not even one that is masked out afterwards: it would stop whoever looks for the origin of another."""
    with torch.autograd.detect_anomaly(check_nan=True):
        graph = make.graph(masked=True)
        history, update, value = [make.update(graph, 3)], make.update(graph, 3), make.value(graph, 3)
        output = graph_attention(update.query, update.key, value, graph, history)
        (output.sum() + sum(x.sum() for x in edge_readout(graph, history))).backward()


def test_no_emotion_takes_part(make):
    graph = replace(make.graph(), emotion_mask=torch.zeros(2, 4, dtype=torch.bool))
    update, value = make.update(graph, 3), make.value(graph, 3)
    assert not graph_attention(update.query, update.key, value, graph)[:, :, 5:].any()
    to_emotion, between = edge_readout(graph, [update])
    assert not to_emotion.any()
    assert not between.any()


def test_one_relevant_emotion_hears_cls_alone(make):
    mask = torch.tensor([[False, True, False, False]] * 2)
    graph = replace(make.graph(), emotion_mask=mask)
    update, value = make.update(graph, 3), make.value(graph, 3)
    output = graph_attention(update.query, update.key, value, graph)
    torch.testing.assert_close(output[:, :, 6], value[:, :, 0])
    assert not output[:, :, [5, 7, 8]].any()


def test_edge_attention_row_without_neighbors_in_the_gradient():
    query, key, value, edge = (torch.randn(1, 1, 3, 3, requires_grad=True) for _ in range(4))
    neighbors = torch.tensor([[False, False, False], [True, True, False], [False, False, False]])
    output, new_edge = edge_attention(
        query, key, value, edge, neighbors, gate=torch.ones(1, 1, 3), edge_scale=1.0
    )
    assert not output[0, 0, [0, 2]].any()
    for gradient in torch.autograd.grad(output.sum() + new_edge.sum(), (query, key, value, edge)):
        assert gradient.isfinite().all()
        assert not gradient[0, 0, 2].any()


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy's, under the interpreter
@pytest.mark.parametrize("masked", [False, True])
def test_scores_that_all_overflow_are_not_hidden(masked):
    query = torch.full((1, 1, 5, 2), 1e30, requires_grad=True)
    neighbors = torch.eye(5, dtype=torch.bool).roll(1, 0) if masked else None
    if masked:
        neighbors[3] = False
    output, _ = edge_attention(query, -query.detach(), torch.randn(1, 1, 5, 3), torch.ones(()), neighbors)
    hears = [row for row in range(5) if not (masked and row == 3)]
    assert output[0, 0, hears].isnan().all()
    if masked:
        assert not output[0, 0, 3].any()
    (gradient,) = torch.autograd.grad(output.sum(), query)
    assert gradient[0, 0, hears].isnan().any()


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy's, under the interpreter
def test_what_is_off_the_graph_is_zero_whatever_stands_there():
    query, key, value = torch.randn(3, 1, 1, 4, 2)
    gate = torch.randn(1, 1, 4)
    query[..., 3, :], key[..., 3, :], gate[..., 3] = float("nan"), float("inf"), float("inf")
    neighbors = torch.ones(4, 4, dtype=torch.bool)
    neighbors[3] = neighbors[:, 3] = False
    output, new_edge = edge_attention(
        query, key, value, torch.rand(4, 4), neighbors, gate=gate, edge_scale=1.0
    )
    assert output.isfinite().all()
    assert new_edge.isfinite().all()
    assert not new_edge[0, 0, ~neighbors].any()


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy's, under the interpreter
def test_a_row_whose_first_scores_overflow_is_what_its_others_make_it():
    words, emotions = 40, 3
    query, key, value = torch.randn(3, 1, 1, words + emotions, 4)
    query[..., 0], key[..., 0] = 1e20, 1.0
    key[..., :30, 0] = key[..., words:, 0] = -1e20
    graph = EmotionGraph(
        torch.rand(1, words),
        torch.ones(1, 1, words, dtype=torch.bool),
        torch.rand(1, emotions),
        torch.rand(emotions, emotions),
    )
    output = graph_attention(query, key, value, graph)
    expected = graph_attention(query, key, value, graph, backend="reference")
    assert torch.equal(output.isnan(), expected.isnan())
    finite = ~expected.isnan().any(-1)
    assert finite[0, 0, 31:words].all()
    torch.testing.assert_close(output[finite], expected[finite])


@pytest.mark.parametrize("lead", [(1, 1), (1, 2), (0, 1), (0, 2)])
def test_an_empty_batch_has_gradients_of_zero(make, lead):
    query, key, value = (torch.zeros(0, 2, 6, 4, requires_grad=True) for _ in range(3))
    edge = torch.rand(*lead, 6, 6, requires_grad=True)
    gate = torch.zeros(0, 2, 6, requires_grad=True)
    output, new_edge = edge_attention(query, key, value, edge, gate=gate, edge_scale=1.0)
    for gradient, of in zip(
        torch.autograd.grad(output.sum() + new_edge.sum(), (edge, query)), (edge, query), strict=True
    ):
        assert gradient.shape == of.shape
        assert not gradient.any()


def test_large_scores_do_not_overflow(make):
    graph = make.graph(dtype=torch.float32)
    update, value = make.update(graph, 3, dtype=torch.float32), make.value(graph, 3, dtype=torch.float32)
    output = graph_attention(update.query * 1e4, update.key * 1e4, value, graph)
    assert output.isfinite().all()


# Layouts ----------------------------------------------------------------------------------------------------


def test_strided_inputs(make, assert_same):
    """Heads cut out of one projection, as in a model: strided, and broadcast over the batch."""
    graph = make.graph()
    base = torch.randn(2, 9, 6, 3, dtype=torch.float64, requires_grad=True)  # [B, N, 2 K, d]
    shared = torch.randn(3, 9, 3, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)

    def run(shape):
        query, key = (shape(x) for x in base.transpose(1, 2).chunk(2, dim=1))
        value = shape(shared.expand(2, -1, -1, -1))
        history = [EdgeUpdate(query, key, shape(gate.mT), 1.3)]
        dense = EmotionGraph(
            graph.word_weight,
            shape(graph.word_mask.mT.contiguous().mT),
            graph.emotion_weight,
            shape(graph.correlation.mT.expand(2, -1, -1)),
            graph.emotion_mask,
        )
        edge, neighbors = graph.dense()
        return [
            graph_attention(query, key, value, dense, history),
            *edge_readout(dense, history),
            edge_attention(query, key, value, shape(edge.mT), shape(neighbors.mT))[0],
        ]

    leaves = [base, shared, gate, graph.emotion_weight, graph.correlation]
    assert_same(run(lambda x: x), run(lambda x: x.contiguous()), leaves)


def test_the_same_tensor_three_times(make, assert_same):
    graph = make.graph()
    x = torch.randn(2, 3, 9, 4, dtype=torch.float64, requires_grad=True)
    history = [EdgeUpdate(x, x)]
    copies = [EdgeUpdate(x.clone(), x.clone())]
    assert_same(
        [graph_attention(x, x, x, graph, history)],
        [graph_attention(x.clone(), x.clone(), x.clone(), graph, copies)],
        [x, graph.correlation],
    )


def test_same_inputs_same_bits(make):
    graph = make.graph(2, 30, 8, dtype=torch.float32)
    history, update = [make.update(graph, 8, dtype=torch.float32)], make.update(graph, 8, dtype=torch.float32)
    value = make.value(graph, 8, dtype=torch.float32)
    leaves = [update.query, update.key, value, *flat(history), graph.emotion_weight, graph.correlation]

    def run():
        output = graph_attention(update.query, update.key, value, graph, history)
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_shapes_without_data(make):
    graph, update, value = make.graph(), make.update(make.graph(), 5), make.value(make.graph(), 3)
    empty = [x.to("meta") for x in update[:2]]
    names = ("word_weight", "word_mask", "emotion_weight", "correlation")
    shapes = EmotionGraph(*(getattr(graph, name).to("meta") for name in names))
    arguments = (*empty, value.to("meta"), shapes, [EdgeUpdate(*empty)])
    expected = graph_attention(update.query, update.key, value, graph)
    assert graph_attention(*arguments, backend="reference").shape == expected.shape
    for one, other in zip(
        edge_readout(shapes, arguments[-1], backend="reference"), edge_readout(graph, [update]), strict=True
    ):
        assert one.shape == other.shape
