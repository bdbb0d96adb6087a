"""Sparse graphs as lists of edges."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ecore_kernels.refusals import shown


@dataclass(frozen=True, eq=False)
class EdgeList:
    """A directed graph of E edges, sorted once by receiver and once by sender; make it by :meth:`from_edge_index`.

    Edges keep their numbers: tensors of edges [E, ...] have the order of the list that was given. Two edges between the
    same nodes count separately.

    Attributes:
        sender, receiver: [E] int64, the nodes that an edge leads from and to.
        senders, receivers: how many there are; equal for a graph on one set of nodes.
        receiver_begin: [receivers + 1] int64; ``by_receiver[begin[i] : begin[i + 1]]`` are the edges to receiver i.
        by_receiver: [E] int64, the edges' numbers, sorted by receiver, then by number.
        sender_begin, by_sender: the same by sender.
    """

    sender: Tensor
    receiver: Tensor
    senders: int
    receivers: int
    receiver_begin: Tensor
    by_receiver: Tensor
    sender_begin: Tensor
    by_sender: Tensor

    @classmethod
    def from_edge_index(cls, edge_index: Tensor, nodes: int | tuple[int, int] | None = None) -> EdgeList:
        """Make a graph from PyTorch Geometric's ``edge_index`` (DGL: ``torch.stack(graph.edges())``).

        Args:
            edge_index: [2, E] of any integer type: senders (PyG's sources), then receivers (targets).
            nodes: their number, or the numbers of (senders, receivers); None takes the largest index + 1 for both.

        Raises:
            ValueError: another shape or type, or an index out of range. On a GPU this check waits for the device once.
        """
        if not isinstance(edge_index, Tensor) or edge_index.dim() != 2 or edge_index.shape[0] != 2:
            got = list(edge_index.shape) if isinstance(edge_index, Tensor) else type(edge_index).__name__
            raise ValueError(f"EdgeList: edge_index: expected a tensor [2, E], got {got}")
        kind = edge_index.dtype
        if kind.is_floating_point or kind.is_complex or kind is torch.bool:
            raise ValueError(f"EdgeList: edge_index: expected an integer type, got {kind}")
        # A copy: kernels read memory by these numbers, so they must not change when the index does.
        sender, receiver = edge_index.to(torch.int64, copy=True).contiguous().unbind()
        if sender.shape[0]:
            low = int(edge_index.min())
            highest = [int(x) for x in edge_index.amax(1)]
        else:
            low, highest = 0, [-1, -1]
        if nodes is None:
            nodes = max(highest) + 1
        counts = _counts(nodes)
        if len(counts) != 2 or min(counts) < 0:
            raise ValueError(
                f"EdgeList: nodes: expected a number or (senders, receivers), got {shown(nodes)}"
            )
        for name, count, high in zip(("senders", "receivers"), counts, highest, strict=True):
            if low < 0 or high >= count:
                bad = low if low < 0 else high
                raise ValueError(f"EdgeList: edge_index: {name}: expected 0 to {count - 1}, got {bad}")
        return cls(sender, receiver, *counts, *_sorted(receiver, counts[1]), *_sorted(sender, counts[0]))

    @classmethod
    def from_dense(cls, neighbors: Tensor) -> EdgeList:
        """Make a graph from a mask [receivers, senders], bool: row i attends to the columns that are True."""
        if not isinstance(neighbors, Tensor) or neighbors.dim() != 2 or neighbors.dtype != torch.bool:
            got = (
                f"{neighbors.dtype} {list(neighbors.shape)}"
                if isinstance(neighbors, Tensor)
                else type(neighbors)
            )
            raise ValueError(f"EdgeList: neighbors: expected torch.bool [receivers, senders], got {got}")
        receiver, sender = neighbors.nonzero().unbind(1)
        return cls.from_edge_index(torch.stack([sender, receiver]), (neighbors.shape[1], neighbors.shape[0]))

    def to_edge_index(self) -> Tensor:
        """Return ``edge_index`` [2, E], int64, in the edges' order."""
        return torch.stack([self.sender, self.receiver])

    def to(self, device: torch.device | str) -> EdgeList:
        """Return the graph on a device."""
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return type(self)(**moved)

    def __len__(self) -> int:
        return self.sender.shape[0]


def _counts(nodes: Any) -> tuple[int, ...]:
    """Return numbers of nodes, given as one for both or as two; none if they are no integers."""
    try:
        return (operator.index(nodes),) * 2
    except TypeError:
        pass
    try:
        return tuple(map(operator.index, nodes))
    except TypeError:
        return ()


def _sorted(node: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The begins [count + 1] and the order [E] of edges sorted by node."""
    ordered, order = torch.sort(node, stable=True)
    begin = torch.searchsorted(ordered, torch.arange(count + 1, device=node.device))
    return begin, order
