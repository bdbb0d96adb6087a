"""Properties that hold for every graph."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from ecore_kernels import EdgeUpdate, EmotionGraph, edge_attention, edge_readout, graph_attention

sizes = st.tuples(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 6), st.integers(1, 5)
)


def random_inputs(size, seed):
    """A graph, a layer of history and a layer's queries, keys and values, all float64."""
    batch, resolutions, words, emotions, dim = size
    torch.manual_seed(seed)
    graph = EmotionGraph(
        torch.rand(batch, words, dtype=torch.float64),
        torch.rand(batch, resolutions, words) > 0.4,
        torch.rand(batch, emotions, dtype=torch.float64),
        torch.rand(batch, emotions, emotions, dtype=torch.float64),
        torch.rand(batch, emotions) > 0.3,
    )
    lead = (batch, resolutions, words + emotions)
    query, key, value, past_query, past_key = torch.randn(5, *lead, dim, dtype=torch.float64)
    gate = torch.randn(lead, dtype=torch.float64)
    return graph, EdgeUpdate(past_query, past_key, gate, 0.8), (query, key, value)


def run(graph, update, nodes):
    """Everything that the model reads: [B, K, N, d], [B, P], [B, P, P]."""
    return [graph_attention(*nodes, graph, [update], scale=0.5), *edge_readout(graph, [update], scale=0.5)]


def take(graph, update, nodes, rows):
    graph = EmotionGraph(
        graph.word_weight[rows],
        graph.word_mask[rows],
        graph.emotion_weight[rows],
        graph.correlation[rows],
        graph.emotion_mask[rows],
    )
    update = EdgeUpdate(update.query[rows], update.key[rows], update.gate[rows], update.edge_scale)
    return graph, update, [x[rows] for x in nodes]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@given(sizes, st.integers(0, 2**31), st.randoms())
def test_permuting_the_batch_permutes_the_result(size, seed, random):
    inputs = random_inputs(size, seed)
    rows = list(range(size[0]))
    random.shuffle(rows)
    assert_close(run(*take(*inputs, rows)), [x[rows] for x in run(*inputs)])


@given(sizes, st.integers(0, 2**31), st.randoms())
def test_renaming_the_emotions_renames_the_result(size, seed, random):
    graph, update, nodes = random_inputs(size, seed)
    words, emotions = size[2:4]
    order = list(range(emotions))
    random.shuffle(order)
    at = [*range(words), *(words + e for e in order)]
    renamed = EmotionGraph(
        graph.word_weight,
        graph.word_mask,
        graph.emotion_weight[:, order],
        graph.correlation[:, order][:, :, order],
        graph.emotion_mask[:, order],
    )
    moved = EdgeUpdate(update.query[:, :, at], update.key[:, :, at], update.gate[:, :, at], update.edge_scale)
    output, to_emotion, between = run(graph, update, nodes)
    expected = [output[:, :, at], to_emotion[:, order], between[:, order][:, :, order]]
    assert_close(run(renamed, moved, [x[:, :, at] for x in nodes]), expected)


@given(sizes, st.integers(0, 2**31), st.integers(1, 4))
def test_padding_changes_nothing(size, seed, more):
    graph, update, nodes = random_inputs(size, seed)
    words = size[2]

    def pad(x, dim):
        filler = torch.randn(*x.shape[:dim], more, *x.shape[dim + 1 :], dtype=torch.float64).to(x.dtype)
        return torch.cat([x.narrow(dim, 0, words), filler, x.narrow(dim, words, x.shape[dim] - words)], dim)

    padded = replace(
        graph,
        word_weight=pad(graph.word_weight, 1),
        word_mask=torch.nn.functional.pad(graph.word_mask, (0, more)),
    )
    longer = EdgeUpdate(pad(update.query, 2), pad(update.key, 2), pad(update.gate, 2), update.edge_scale)
    output, to_emotion, between = run(padded, longer, [pad(x, 2) for x in nodes])
    assert not output[:, :, words : words + more].any()
    output = torch.cat([output[:, :, :words], output[:, :, words + more :]], 2)
    assert_close([output, to_emotion, between], run(graph, update, nodes))


@given(sizes, st.integers(0, 2**31))
def test_attention_sums_to_one_where_there_are_neighbors(size, seed):
    graph, update, (query, key, value) = random_inputs(size, seed)
    ones = torch.ones_like(value)
    expected = (
        graph.participants()[..., None].double().expand_as(value)
    )  # every participant hears [CLS] at least
    assert_close(graph_attention(query, key, ones, graph, [update]), expected)

    neighbors = torch.rand(*query.shape[:3], query.shape[2]) > 0.6
    output, _ = edge_attention(query, key, ones, torch.randn(query.shape[2], dtype=torch.float64), neighbors)
    assert_close(output, neighbors.any(-1, keepdim=True).double().expand_as(value))
