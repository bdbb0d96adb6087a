"""The multi-resolution emotion graph network (Sec. 3.2) and its replacement without a graph."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecore.config import ModelConfig
from ecore.model.dropout import Dropout
from ecore.model.transformer import FeedForward, SublayerEnds
from ecore.precision import for_products
from ecore_kernels import EdgeUpdate, EmotionGraph, MultiResolutionEdgeAttention, edge_readout
from ecore_kernels.tracing import replaced


class Correlation(nn.Module):
    """The global emotion correlation R = S^T S with its diagonal set to 1.

    Args:
        emotions: P.
        own_diagonal: the diagonal stays that of S^T S, as in the released code.
    """

    own: Tensor

    def __init__(self, emotions: int, own_diagonal: bool = False) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(emotions, emotions) * emotions**-0.5)
        self.own_diagonal = own_diagonal
        self.register_buffer("own", torch.eye(emotions, dtype=torch.bool), persistent=False)

    def forward(self) -> Tensor:
        """Return R, [P, P]; float32 under autocast too, like every edge weight."""
        with torch.autocast(self.factor.device.type, enabled=False):
            inner = self.factor.mT @ self.factor
        if self.own_diagonal:
            return inner
        return inner.masked_fill(self.own, 1.0)

    def pair_weight(self, form: str) -> Tensor:
        """Return the weight of each pair of co-occurring emotions in Eq. 18, [P, P].

        ``inner`` is R, the paper's letter, which the loss can push up without bound; ``softmax`` is Softmax_j(R) and
        ``cosine`` the cosine between columns of S, both bounded.
        """
        if form == "inner":
            return self()
        if form == "softmax":
            return self().softmax(-1)
        columns = F.normalize(self.factor, dim=0)
        with torch.autocast(self.factor.device.type, enabled=False):
            return columns.mT @ columns


class GraphLayer(nn.Module):
    """Attention on the graph and the MLP that fuses the resolutions (Eqs. 4 to 7)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.attention = MultiResolutionEdgeAttention(
            dim, len(config.thresholds), scale=config.score_scale, bias=config.graph_bias
        )
        self.fuse = FeedForward(dim, 2 * dim)
        self.norm = nn.LayerNorm(dim) if config.graph_norm else None
        self.dropout = Dropout(config.graph_dropout)

    def finish(self, nodes: Tensor, attended: Tensor, end: SublayerEnds) -> Tensor:
        """Return the layer's output features from its input nodes and what they attended to."""
        fused = self.fuse(attended)
        if self.norm is None:
            return self.dropout(fused)
        return end(fused, nodes, self.norm)[0]


class FirstPass(NamedTuple):
    """Parts of the first pass that the second takes over, and the readout (Eq. 8).

    Attributes:
        nodes: [B, N, D], h0: words, then emotions.
        update: the first layer's queries, keys and gates.
        values: [B, K, N, d], the first layer's values.
        word_to_emotion: [B, P], sum over words of E^{w-e}; or [B, M, P], each word's.
        emotion_to_emotion: [B, P, P], E^{e-e} with a diagonal of 0.
    """

    nodes: Tensor
    update: EdgeUpdate
    values: Tensor
    word_to_emotion: Tensor
    emotion_to_emotion: Tensor


class GraphNetwork(nn.Module):
    """L graph layers, run twice on shared weights: to perceive emotions, and to guide the response by them."""

    layers: list[GraphLayer]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        layers = nn.ModuleList(GraphLayer(config) for _ in range(config.graph_layers))
        self.layers = layers  # type: ignore[assignment]  # indexed and iterated like one
        self.normed = config.graph_norm
        self.word_norm = nn.LayerNorm(config.dim) if config.graph_norm else nn.Identity()
        self.emotion_norm = nn.LayerNorm(config.dim) if config.graph_norm else nn.Identity()

    def _ends(self, nodes: Tensor) -> SublayerEnds:
        return SublayerEnds(len(self.layers), self.layers[0].dropout, nodes)

    def _layers(
        self,
        nodes: Tensor,
        update: EdgeUpdate,
        values: Tensor,
        graph: EmotionGraph,
        end: SublayerEnds,
        attends: bool,
    ) -> tuple[Tensor, Tensor, list[EdgeUpdate]]:
        """Run all layers but the last one's attention.

        Args:
            update, values: of the first layer.
            end: of the layers.
            attends: the last layer's attention is to follow, which reads its values.

        Returns:
            The last layer's input nodes, its values (without ``attends`` an earlier one's), every layer's update.
        """
        history, last = [update], self.layers[-1]
        for layer, following in zip(self.layers[:-1], self.layers[1:], strict=True):
            attended = layer.attention.attend(history[-1], values, graph, history[:-1])
            nodes = layer.finish(nodes, attended, end)
            inputs = for_products(nodes)
            if following is last and not attends:
                history.append(following.attention.edge_update(inputs))
            else:
                update, values = following.attention.project(inputs)
                history.append(update)
        return nodes, values, history

    def perceive(
        self, words: Tensor, emotions: Tensor, graph: EmotionGraph, per_word: bool = False
    ) -> FirstPass:
        """Run the first pass. The last layer's attention is never read, so it is not computed.

        With ``graph_norm`` Eq. 8 sums over words without [CLS]. Its edges hardly differ from context to context, and
        nothing bounds them: training has made them eighty times those of the words, whose sum then says nothing.

        Args:
            words: [B, M, D], Eq. 1's embeddings.
            emotions: [P, D], embeddings of the emotions' own words.
            graph: with the initial edges of Eq. 3.
            per_word: return ``word_to_emotion`` for each word, [B, M, P], and not their sum.
        """
        emotions = self.emotion_norm(emotions).expand(len(words), -1, -1)
        nodes = torch.cat([self.word_norm(words), emotions], dim=1)  # [B, N, D]
        first = self.layers[0].attention
        update, values = first.project(for_products(nodes))
        *_, history = self._layers(nodes, update, values, graph, self._ends(nodes), attends=False)
        gate = history[-1].gate  # [B, K, N]
        if self.normed and gate is not None:
            history[-1] = replaced(history[-1], gate=F.pad(gate[..., 1:], (1, 0)))
        to_emotion, among_emotions = edge_readout(graph, history, scale=first.scale, per_word=per_word)
        return FirstPass(nodes, update, values, to_emotion, among_emotions)

    def guide(self, first: FirstPass, graph: EmotionGraph) -> Tensor:
        """Run the second pass, over the improved graph.

        Returns:
            Word node features [B, M, D], the input of Eq. 24.
        """
        end = self._ends(first.nodes)
        nodes, values, history = self._layers(
            first.nodes, first.update, first.values, graph, end, attends=True
        )
        last, words = self.layers[-1], graph.shape[2]
        attended = last.attention.attend(
            history[-1], values, graph, history[:-1], receivers="words"
        )  # [B, M, D]
        return last.finish(nodes[:, :words], attended, end)


class EmotionAttention(nn.Module):
    """One attention from h_X to the emotions' embeddings, in place of E^{w-e} where there is no graph."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.query = nn.Linear(config.dim, config.dim)
        self.key = nn.Linear(config.dim, config.dim)

    def forward(self, context: Tensor, mask: Tensor, emotions: Tensor) -> Tensor:
        """Return the sum over words of E^{w-e}, [B, P], of context [B, M, D], mask [B, M] bool, emotions [P, D]."""
        score = self.query(context) @ self.key(emotions).mT * context.shape[-1] ** -0.5  # [B, M, P]
        return (score.softmax(-1) * mask[..., None]).sum(1)
