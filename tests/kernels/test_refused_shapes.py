"""Arguments whose shape or type fits no operator: each is refused by its name."""

from __future__ import annotations

import pytest
import torch

from ecore_kernels import EdgeUpdate, edge_attention, edge_readout, graph_attention

pytestmark = pytest.mark.usefixtures("backend")


def nodes(*shape):
    return torch.zeros(shape)


def dense_arguments():
    """Of edge_attention; on the backend's device."""
    return {name: nodes(2, 3, 4, 5) for name in ("query", "key", "value")} | {"edge": nodes(4, 4)}


def graph_arguments(graph):
    """Of graph_attention; on the backend's device."""
    return {name: nodes(2, 3, 9, 5) for name in ("query", "key", "value")} | {"graph": graph}


def test_unchanged_arguments_are_taken(make):
    """So that it is the changes below that are refused."""
    edge_attention(**dense_arguments())
    graph_attention(**graph_arguments(make.graph()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": nodes(2, 3, 4)}, r"expected query \[B, H, Nq, d\]"),
        ({"value": nodes(2, 3, 4)}, r"value \[B, Hk, Nk, dv\]"),
        ({"key": nodes(2, 3, 4, 6)}, r"key: expected \[2, 3, 4, 5\], got \[2, 3, 4, 6\]"),
        ({"value": nodes(2, 3, 5, 5)}, r"value: expected \[2, 3, 4, 5\]"),
        ({"edge": nodes(2, 4, 4, 4)}, r"edge: expected a shape that broadcasts to \[2, 3, 4, 4\]"),
        ({"neighbors": nodes(4, 4)}, "neighbors: expected torch.bool"),
        ({"neighbors": nodes(5, 4).bool()}, "neighbors: expected a shape that broadcasts"),
        ({"gate": nodes(2, 3, 5), "edge_scale": 1.0}, r"gate: expected \[2, 3, 4\]"),
        ({"query": nodes(2, 3, 4, 5).long()}, "query: expected a float type, got torch.int64"),
        ({"value": nodes(2, 3, 4, 5).bool()}, "value: expected a float type, got torch.bool"),
        ({"edge": nodes(4, 4) * 1j}, "edge: expected real numbers, got torch.complex64"),
    ],
)
def test_edge_attention_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        edge_attention(**(dense_arguments() | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": nodes(2, 3, 8, 5)}, r"query: expected \[2, 3, 9, 5\]"),
        ({"query": nodes(2, 3, 9)}, r"expected query \[B, K, N, d\]"),
        ({"key": nodes(2, 3, 9, 4)}, r"key: expected \[2, 3, 9, 5\]"),
        ({"value": nodes(2, 1, 9, 5)}, r"value: expected \[2, 3, 9, 5\]"),
        ({"key": nodes(2, 3, 9, 5).int()}, "key: expected a float type, got torch.int32"),
        ({"receivers": "emotions"}, "receivers: expected 'all' or 'words', got 'emotions'"),
        ({"history": [EdgeUpdate(nodes(9, 5), nodes(9, 5))]}, r"history\[0\].query: expected \[B, K, N, d\]"),
        (
            {"history": [EdgeUpdate(nodes(2, 3, 9, 5), nodes(2, 3, 9, 4))]},
            r"history\[0\].key: expected \[2, 3, 9, 5\]",
        ),
        (
            {"history": [EdgeUpdate(nodes(2, 3, 9, d), nodes(2, 3, 9, d)) for d in (5, 6)]},
            r"history\[1\].query: expected \[2, 3, 9, 5\], got \[2, 3, 9, 6\]",
        ),
        (
            {"history": [EdgeUpdate(nodes(2, 3, 9, 5), nodes(2, 3, 9, 5), nodes(2, 3, 9))]},
            r"history\[0\]: expected gate and edge_scale both",
        ),
        (
            {"history": [EdgeUpdate(nodes(2, 3, 9, 5), nodes(2, 3, 9, 5), nodes(2, 9, 3), 1.0)]},
            r"history\[0\].gate: expected \[2, 3, 9\]",
        ),
        (
            {"history": [EdgeUpdate(nodes(2, 3, 9, 5), nodes(2, 3, 9, 5), nodes(2, 3, 9), nodes(9))]},
            r"history\[0\].edge_scale: expected",
        ),
        (
            {"history": [EdgeUpdate(nodes(2, 3, 9, 5), nodes(2, 3, 9, 5).long())]},
            r"history\[0\].key: expected a float type",
        ),
    ],
)
def test_graph_attention_and_readout_refuse(make, change, message):
    graph = make.graph()
    with pytest.raises(ValueError, match=message):
        graph_attention(**(graph_arguments(graph) | change))
    if "history" in change:
        with pytest.raises(ValueError, match=message):
            edge_readout(graph, change["history"])


@pytest.mark.parametrize("dim", [4, 64])
def test_a_history_of_another_width_is_refused(make, dim):
    graph, update = make.graph(), EdgeUpdate(nodes(2, 3, 9, dim), nodes(2, 3, 9, dim))
    edge_readout(graph, [update])  # nothing else has a width there
    with pytest.raises(
        ValueError, match=rf"history\[0\].query: expected \[2, 3, 9, 8\], got \[2, 3, 9, {dim}\]"
    ):
        graph_attention(*[nodes(2, 3, 9, 8)] * 3, graph, [update])


def test_edge_scale_may_be_a_tensor_of_one_number():
    query, key, value = torch.randn(3, 1, 1, 3, 2, dtype=torch.float64)
    edge, gate = torch.rand(3, 3, dtype=torch.float64), torch.ones(1, 1, 3, dtype=torch.float64)
    expected = edge_attention(query, key, value, edge, gate=gate, edge_scale=0.5)
    for shape in ((), (1,), (1, 1)):
        scale = torch.full(shape, 0.5, dtype=torch.float64)
        for one, other in zip(
            expected, edge_attention(query, key, value, edge, gate=gate, edge_scale=scale), strict=True
        ):
            assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"edge_scale: expected a scalar, got \[2\]"):
        edge_attention(query, key, value, edge, gate=gate, edge_scale=torch.ones(2))
