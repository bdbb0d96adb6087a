"""The multi-resolution attention layer as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecore_kernels.graph import EmotionGraph
from ecore_kernels.operators.graph_attention import graph_attention
from ecore_kernels.operators.history import EdgeUpdate

ALIGNED_COLUMNS = 8
"""Columns of a projection are padded to a multiple of this: 16 bytes in low precision, one load of a GPU's thread."""


class MultiResolutionEdgeAttention(nn.Module):
    """One layer of attention on the emotion graph, a head for each resolution (Eqs. 4 to 7, without the MLP).

    Args:
        dim: width D of the nodes; each of the K heads is d = D / K wide.
        resolutions: K.
        scale: factor on the scores; None means 1 / sqrt(d).
        bias: whether the projections to queries, keys, values and gates have biases (the paper's have none).

    Raises:
        ValueError: ``dim`` is not a multiple of ``resolutions``.
    """

    def __init__(self, dim: int, resolutions: int, *, scale: float | None = None, bias: bool = True) -> None:
        super().__init__()
        if resolutions < 1:
            raise ValueError(
                f"MultiResolutionEdgeAttention: resolutions: expected at least 1, got {resolutions}"
            )
        if dim < 1 or dim % resolutions:
            raise ValueError(
                f"MultiResolutionEdgeAttention: dim: expected a positive multiple of the {resolutions} resolutions, "
                f"got {dim}"
            )
        self.resolutions = resolutions
        self.head_dim = dim // resolutions
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(dim, dim, bias=bias)
        self.value = nn.Linear(dim, dim, bias=bias)
        self.gate = nn.Linear(dim, resolutions, bias=bias)
        self.edge_scale = nn.Parameter(torch.ones(()))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.resolutions, self.head_dim)).transpose(1, 2)

    def edge_update(self, nodes: Tensor) -> EdgeUpdate:
        """The update of the edges by this layer: queries, keys [B, K, N, d] and gates [B, K, N] of nodes [B, N, D]."""
        query, key, gate = self._projected(nodes, self.query, self.key, self.gate)
        return EdgeUpdate(self._heads(query), self._heads(key), gate.mT, self.edge_scale)

    def project(self, nodes: Tensor) -> tuple[EdgeUpdate, Tensor]:
        """Both :meth:`edge_update` and :meth:`values` of nodes [B, N, D], by one product."""
        query, key, value, gate = self._projected(nodes, self.query, self.key, self.value, self.gate)
        update = EdgeUpdate(self._heads(query), self._heads(key), gate.mT, self.edge_scale)
        return update, self._heads(value)

    def _projected(self, nodes: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
        """Return each layer's output for nodes [B, N, D]."""
        # One product of all weights, because each alone is too small for a GPU; the same holds for its two gradients.
        width = sum(layer.out_features for layer in layers)
        idle = -width % ALIGNED_COLUMNS  # zeros, so that every row begins where full vectors can be loaded
        zeros = self.query.weight.new_zeros(idle, self.query.in_features)
        weight = torch.cat([*(layer.weight for layer in layers), zeros])  # [sum of the widths + idle, D]
        bias: Tensor | None = self.query.bias
        if bias is not None:
            bias = torch.cat([*(layer.bias for layer in layers), bias.new_zeros(idle)])
        together = F.linear(nodes, weight, bias)  # [B, N, sum of the widths + idle]
        return together.split([*(layer.out_features for layer in layers), idle], dim=-1)[:-1]

    def values(self, nodes: Tensor) -> Tensor:
        """Values [B, K, N, d] of nodes [B, N, D]."""
        return self._heads(self.value(nodes))

    def attend(
        self,
        update: EdgeUpdate,
        values: Tensor,
        graph: EmotionGraph,
        history: Sequence[EdgeUpdate] = (),
        receivers: str = "all",
    ) -> Tensor:
        """Attend over the edges after ``history``. Returns the heads side by side: [B, N, D], or [B, M, D] for "words".

        It is separate from :meth:`forward` so that a model that runs the same nodes over two graphs computes queries,
        keys and values only once.
        """
        output = graph_attention(
            update.query, update.key, values, graph, history, scale=self.scale, receivers=receivers
        )
        return output.transpose(1, 2).flatten(2)

    def forward(
        self, nodes: Tensor, graph: EmotionGraph, history: Sequence[EdgeUpdate] = ()
    ) -> tuple[Tensor, EdgeUpdate]:
        """Attend and update.

        Args:
            nodes: [B, N, D], M words and then P emotions.
            graph: the neighbours of each node, and the initial edges.
            history: the updates by earlier layers, first layer first.

        Returns:
            output: [B, N, D], the heads' results side by side, before any MLP.
            update: this layer's update of the edges, to be appended to ``history``.
        """
        update, values = self.project(nodes)
        return self.attend(update, values, graph, history), update
