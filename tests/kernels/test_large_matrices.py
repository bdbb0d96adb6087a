"""``edge_attention`` in C++ where edges are larger than the caches: they are written past those, to the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ecore_kernels import edge_attention, native

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled extension is missing")

HEADS, NODES = 4, 1049  # 17.6 MB of edges; no row but the first begins on a cache line


def results(nodes: list[Tensor], edge: Tensor, bias: Tensor, sent: Tensor) -> tuple[Tensor, ...]:
    """The new edges, and the gradients of edges and biases."""
    leaves = [x.detach().requires_grad_() for x in (edge, bias)]
    output, new_edge = edge_attention(*nodes, leaves[0], bias=leaves[1], edge_scale=0.5, backend="native")
    loss = output.square().sum() + (new_edge * sent).sum()
    return new_edge.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("threads", [1, 2])
def test_heads_together_are_those_apart(threads):
    nodes = [torch.randn(1, HEADS, NODES, 4) for _ in range(3)]
    edge, bias, sent = (torch.randn(1, HEADS, NODES, NODES) for _ in range(3))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = results(nodes, edge, bias, sent)
    finally:
        torch.set_num_threads(before)
    for k in range(HEADS):
        apart = results([x[:, k : k + 1] for x in nodes], *(x[:, k : k + 1] for x in (edge, bias, sent)))
        for one, other in zip(apart, together, strict=True):
            assert torch.equal(one, other[:, k : k + 1])


def test_shared_edges_add_up_their_gradient():
    """An edge of all heads: its gradient is read again by the next head."""
    nodes = [torch.randn(1, HEADS, NODES, 4, dtype=torch.float64) for _ in range(3)]
    edge, bias = (torch.randn(1, 1, NODES, NODES, dtype=torch.float64) for _ in range(2))
    sent = torch.randn(1, HEADS, NODES, NODES, dtype=torch.float64)
    _, grad_edge, grad_bias = results(nodes, edge, bias, sent)
    apart = [results([x[:, k : k + 1] for x in nodes], edge, bias, sent[:, k : k + 1]) for k in range(HEADS)]
    torch.testing.assert_close(grad_edge, sum(x[1] for x in apart), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_bias, sum(x[2] for x in apart), rtol=1e-12, atol=1e-12)
