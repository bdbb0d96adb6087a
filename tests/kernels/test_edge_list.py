"""EdgeList: made of an index or of a mask, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from ecore_kernels import EdgeList


def test_edge_lists_go_both_ways():
    index = torch.tensor([[3, 0, 3, 1], [1, 1, 0, 1]], dtype=torch.int32)
    edges = EdgeList.from_edge_index(index)
    assert (edges.senders, edges.receivers, len(edges)) == (4, 4, 4)
    assert torch.equal(edges.to_edge_index(), index.long())
    assert edges.receiver_begin.tolist() == [0, 1, 4, 4, 4]
    assert edges.by_receiver.tolist() == [2, 0, 1, 3]
    assert edges.by_sender.tolist() == [1, 3, 0, 2]
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert EdgeList.from_dense(mask).to_edge_index().tolist() == [[0, 2, 2], [0, 0, 1]]
    assert len(edges.to("cpu")) == 4


@pytest.mark.parametrize(
    ("index", "nodes", "said"),
    [
        ([[0, 1]], None, r"edge_index: expected a tensor \[2, E\], got \[1, 2\]"),
        ([[0.0], [1.0]], None, "edge_index: expected an integer type, got torch.float32"),
        ([[0], [3]], 3, "edge_index: receivers: expected 0 to 2, got 3"),
        ([[-1], [0]], 3, "edge_index: senders: expected 0 to 2, got -1"),
        ([[0], [0]], (1, 1, 1), r"nodes: expected a number or \(senders, receivers\), got \(1, 1, 1\)"),
    ],
)
def test_bad_edge_lists(index, nodes, said):
    with pytest.raises(ValueError, match=f"^EdgeList: {said}$"):
        EdgeList.from_edge_index(torch.tensor(index), nodes)


def test_an_edge_list_does_not_change_with_its_index():
    """Kernels read memory by its numbers."""
    index = torch.tensor([[0, 1, 2], [1, 0, 0]])
    edges = EdgeList.from_edge_index(index)
    index += 1_000_000
    assert edges.to_edge_index().tolist() == [[0, 1, 2], [1, 0, 0]]
