"""A gradient that is not asked for is not computed: each alone is the same bits, from the programs it needs."""

from __future__ import annotations

import pytest
import torch

from ecore_kernels.triton_kernels import launch
from tests.kernels.triton.fused import Fused

graph_attention, edge_readout, edge_attention = map(
    Fused, ("graph_attention", "edge_readout", "edge_attention")
)

B, K, M, P, D = 1, 2, 18, 5, 3
N = M + P


def nodes(*last: int, device: torch.device) -> torch.Tensor:
    return torch.randn(B, K, N, *last, device=device)


@pytest.fixture
def launched(monkeypatch):
    """Programs of every launch."""
    programs = []
    original = launch.launch

    def counted(kernel, grid, *rest):
        programs.append(grid[0])
        original(kernel, grid, *rest)

    monkeypatch.setattr(launch, "launch", counted)
    return programs


def alone_as_together(backward, count: int) -> None:
    together = backward([True] * count)
    assert len(together) == count
    for i in range(count):
        (alone,) = backward([j == i for j in range(count)])
        assert torch.equal(alone, together[i]), i
    assert backward([False] * count) == []


@pytest.fixture
def graph(device):
    mask = torch.rand(B, K, M, device=device) > 0.3
    return (
        torch.rand(B, M, device=device),
        mask,
        torch.rand(B, P, device=device),
        torch.rand(P, P, device=device),
    )


@pytest.mark.parametrize("words_only", [False, True])
def test_graph_attention(device, graph, words_only, launched):
    query, key, value, *past = (nodes(D, device=device) for _ in range(7))
    history = past[:2], past[2:], nodes(device=device)
    word_weight, mask, weight, correlation = graph
    setting = (0.5, words_only)
    output, saved = graph_attention.forward(
        query, key, value, word_weight, mask, weight, correlation, None, *history, *setting, "ieee"
    )
    grad = torch.randn_like(output)

    def backward(needs):
        return graph_attention.backward(
            grad, query, key, value, mask, correlation, None, *history, output, saved, *setting, needs, "ieee"
        )

    alone_as_together(backward, 10)
    launched.clear()
    backward([True] * 10)
    backward([False, False, True] + [False] * 7)
    _, every, values = launched  # the first sums deltas, which values do without
    assert values <= every / 2 + B * K  # no receivers
    launched.clear()
    backward([False] * 10)
    assert launched == []


def test_edge_readout(device, graph):
    past = [nodes(D, device=device) for _ in range(4)]
    inputs = *graph[1:], None, past[:2], past[2:], nodes(device=device), 0.5, False
    grads = [torch.randn_like(x) for x in edge_readout.forward(*inputs, "ieee")]
    alone_as_together(lambda needs: edge_readout.backward(*grads, *inputs, needs, "ieee"), 7)


@pytest.mark.parametrize("edge_lead", [(B, K), (1, 1)], ids=["own edges", "shared edge"])
def test_edge_attention(device, edge_lead, launched):
    query, key, value = (nodes(D, device=device) for _ in range(3))
    edge = torch.rand(*edge_lead, N, N, device=device)
    neighbors = torch.rand(B, K, N, N, device=device) > 0.4
    bias, factor, sender_gate = torch.randn_like(edge), nodes(device=device), nodes(device=device)
    inputs = query, key, value, edge, neighbors, bias, factor, sender_gate, edge.new_tensor(0.3), None
    numbers = 0.5, None, 0.0, False  # no clamp, no dropout, updates on neighbours
    output, new_edge, lse, saved = edge_attention.forward(*inputs, *numbers, True, "ieee")
    grads = [torch.randn_like(x) for x in (output, new_edge, lse)]

    def backward(needs):
        return edge_attention.backward(*grads, *inputs, output, saved, *numbers, needs, "ieee")

    alone_as_together(backward, 8)
    launched.clear()
    for needs in ([True] * 8, [False, False, True] + [False] * 5):
        backward(needs)
    _, every, values = launched
    assert values <= every / 2
