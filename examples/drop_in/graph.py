"""A network of layers with edges; it knows them by one import."""

from __future__ import annotations

from torch import Tensor, nn

from examples.drop_in.layers import EdgeLayer


class GraphNetwork(nn.Module):
    """Nodes through layers whose edges each layer hands to the next; the loss reads both."""

    def __init__(self, width: int = 300, heads: int = 3, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EdgeLayer(width, heads) for _ in range(layers))

    def forward(self, nodes: Tensor, edge: Tensor, adjacency: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the edges that are left."""
        for layer in self.layers:
            output, edge = layer(nodes, edge, adjacency)
            nodes = nodes + output
        return nodes.square().mean() + edge.square().mean(), edge.detach()
