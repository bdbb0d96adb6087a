"""The emotion graph of the authors' released code (``graph_form`` released), which differs from the paper's.

It replaces :class:`ecore.model.graph_network.GraphNetwork`. docs/model.md lists the differences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ecore.config import ModelConfig
from ecore.model.dropout import Dropout
from ecore_kernels import EmotionGraph, edge_attention

MLPS = 2
"""Two-layer perceptrons after a layer's attention, one after the other."""


class ReleasedPass(NamedTuple):
    """Parts of the first pass that the second takes over, and the readout.

    Attributes:
        nodes: [B, N, D], h0: words, then emotions.
        projections: of them by the first layer.
        word_to_emotion: [B, P], sum over words of E^{w-e}; or [B, M, P], each word's.
        emotion_to_emotion: [B, P, P], E^{e-e} with its diagonal.
    """

    nodes: Tensor
    projections: Projections
    word_to_emotion: Tensor
    emotion_to_emotion: Tensor


class Projections(NamedTuple):
    """Queries, keys and values of nodes, each [B, K, N, d], and the senders' gates, [B, K, N]."""

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor


def xavier(module: nn.Module) -> None:
    """Start every matrix of ``module`` as Xavier's uniform distribution has it."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def all_edges(graph: EmotionGraph) -> Tensor:
    """Return the initial weight of the edge between each pair of nodes, on the graph or off it, [B, 1, N, N].

    [CLS] sends 1 to every node; another word sends its weight to words and 0 to emotions; emotions send their weight to
    words and their correlation to emotions, themselves included.
    """
    batch, _, words, emotions = graph.shape
    first = graph.word_weight.new_ones(batch, 1)
    to_word = torch.cat([first, graph.word_weight[:, 1:], graph.emotion_weight], dim=1)  # [B, N]
    of_words = torch.cat([first, torch.zeros_like(graph.word_weight[:, 1:])], dim=1)  # [B, M]
    to_emotion = torch.cat(
        [of_words[:, None].expand(-1, emotions, -1), graph.correlation.expand(batch, -1, -1)], dim=2
    )  # [B, P, N]
    return torch.cat([to_word[:, None].expand(-1, words, -1), to_emotion], dim=1)[:, None]


class ReleasedLayer(nn.Module):
    """Attention with gated edges and two MLPs without biases: no norm, no residual, no score scale.

    x_ij = (q_i·k_j) u_j E_ij;  out_i = sum over neighbours of Softmax_j(x_ij) v_j;  E'_ij = w (E_ij + x_ij) + b.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, self.resolutions, self.dropout = config.dim, len(config.thresholds), config.graph_dropout
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.gate = nn.Linear(dim // self.resolutions, 1)  # of a sender's value, one for all resolutions
        # Xavier's for a matrix of one row and one column, and nn.Linear's for its bias.
        self.edge_scale = nn.Parameter(torch.empty(()).uniform_(-(3.0**0.5), 3.0**0.5))
        self.edge_bias = nn.Parameter(torch.empty(()).uniform_(-1.0, 1.0))
        self.mlps = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Linear(dim, 2 * dim, bias=False),
                    nn.ReLU(),
                    Dropout(config.graph_dropout),
                    nn.Linear(2 * dim, dim, bias=False),
                )
                for _ in range(MLPS)
            )
        )

    def project(self, nodes: Tensor) -> Projections:
        """Return the projections of nodes [B, N, D]."""
        query, key, value = (
            layer(nodes).unflatten(-1, (self.resolutions, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return Projections(query, key, value, self.gate(value).squeeze(-1))

    def forward(
        self, projections: Projections, edge: Tensor, neighbors: Tensor, update: bool
    ) -> tuple[Tensor, Tensor]:
        """Attend, and update the edges of all pairs.

        Args:
            edge: [B, 1 or K, N, N].
            neighbors: [B, K, N, N] bool; a node without any attends to nothing.
            update: make new edges; without it they stay as they are.

        Returns:
            The layer's output features [B, N, D], and the new edges [B, K, N, N].
        """
        query, key, value, gate = projections
        attended, new_edge = edge_attention(
            query,
            key,
            value,
            edge,
            neighbors,
            sender_gate=gate,
            edge_scale=self.edge_scale if update else None,
            edge_bias=self.edge_bias if update else None,
            update="all",
            scale=1.0,
            dropout=self.dropout if self.training else 0.0,
        )[:2]
        return self.mlps(attended.transpose(1, 2).flatten(2)), edge if new_edge is None else new_edge


class ReleasedGraphNetwork(nn.Module):
    """L layers on edges in memory, run twice on shared weights as the paper's are."""

    layers: list[ReleasedLayer]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        layers = nn.ModuleList(ReleasedLayer(config) for _ in range(config.graph_layers))
        self.layers = layers  # type: ignore[assignment]  # indexed and iterated like one
        xavier(self)

    def _run(
        self, projections: Projections, edge: Tensor, neighbors: Tensor, edges: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the last layer's features [B, N, D] and, where ``edges`` asks for them, edges [B, K, N, N]."""
        updates = [True] * (len(self.layers) - 1) + [edges]
        nodes, edge = self.layers[0](projections, edge, neighbors, updates[0])
        for layer, update in zip(self.layers[1:], updates[1:], strict=True):
            nodes, edge = layer(layer.project(nodes), edge, neighbors, update)
        return nodes, edge

    def perceive(
        self, words: Tensor, emotions: Tensor, graph: EmotionGraph, per_word: bool = False
    ) -> ReleasedPass:
        """Run the first pass.

        The sum over words takes every word of the context, in every resolution, [CLS] too: edges are updated on all
        pairs.

        Args:
            words: [B, M, D], the words' embeddings alone.
            emotions: [P, D], the emotions' own table.
            graph: with the initial edges.
            per_word: return ``word_to_emotion`` for each word, [B, M, P], and not their sum.
        """
        nodes = torch.cat([words, emotions.expand(len(words), -1, -1)], dim=1)  # [B, N, D]
        projections = self.layers[0].project(nodes)
        _, edge = self._run(projections, all_edges(graph), graph.dense()[1], edges=True)
        edge = edge.sum(1)  # [B, N, N]
        count = words.shape[1]
        inside = graph.participants()[:, 0, :count, None]  # [B, M, 1]: the first threshold is 0
        to_emotion = edge[:, :count, count:].masked_fill(~inside, 0.0)  # [B, M, P]
        return ReleasedPass(
            nodes, projections, to_emotion if per_word else to_emotion.sum(1), edge[:, count:, count:]
        )

    def guide(self, first: ReleasedPass, graph: EmotionGraph) -> Tensor:
        """Run the second pass, over the improved graph.

        Returns:
            Word node features [B, M, D], the input of Eq. 24.
        """
        nodes, _ = self._run(first.projections, all_edges(graph), graph.dense()[1], edges=False)
        return nodes[:, : graph.shape[2]]
