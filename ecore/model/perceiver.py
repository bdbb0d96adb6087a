"""From a context's words to its emotions, and to what guides the response (Sections 3.2 to 3.4)."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecore.config import ModelConfig
from ecore.model.graph_network import Correlation, EmotionAttention, FirstPass, GraphNetwork
from ecore.model.perceptron import Perception, Perceptron
from ecore.model.released_graph import ReleasedGraphNetwork, ReleasedPass, xavier
from ecore_kernels import EmotionGraph, otsu

SOFT_RELEVANT = 3
"""Number of emotions that count as co-occurring under the soft strategy (Sec. 3.4)."""


class Context(NamedTuple):
    """A batch of contexts as the perceiver reads them; M words, ``[CLS]`` first, of which h_X has the last S.

    Attributes:
        words: [B, M, D], features of the word nodes.
        mask: [B, M] bool, where there are words.
        lengths: [B], words of each context, ``[CLS]`` counted.
        intensity: [B, M], c of every word.
        emotions: [P, D], features of the emotion nodes.
        memory: [B, S, D], h_X.
        memory_mask: [B, S] bool.
        mean: [B, D], of h_X over each context's words; of a baseline what its emotion head reads.
    """

    words: Tensor
    mask: Tensor
    lengths: Tensor
    intensity: Tensor
    emotions: Tensor
    memory: Tensor
    memory_mask: Tensor
    mean: Tensor


class Perceived(NamedTuple):
    """The emotions of a batch of contexts.

    Attributes:
        global_signal: h^g, [B, P]; None without a perceptron (:class:`EmotionHead`).
        main_logits: h^m, [B, P], logits of the emotion categories.
        emotion_attention: h_emo, [B, P].
        gate: sigma(W_e h^g), [B, P]; None likewise.
        relevant: [B, P] bool, V': the co-occurring emotions.
        guidance: [B, D], the node sum of Eq. 24, or what an ablation puts in its place; None without a graph.
        correlation: [B, P, P], Softmax(R), of all contexts the same; None without a perceptron.
    """

    global_signal: Tensor | None
    main_logits: Tensor
    emotion_attention: Tensor
    gate: Tensor | None
    relevant: Tensor
    guidance: Tensor | None
    correlation: Tensor | None = None


class EmotionHead(nn.Module):
    """Emotion categories from one vector of a context: no graph, and nothing that guides the response.

    Args:
        dim: of ``Context.mean``, which is the mean of h_X, or what a baseline puts in its place.
        emotions: P.
    """

    def __init__(self, dim: int, emotions: int, bias: bool = True) -> None:
        super().__init__()
        self.main = nn.Linear(dim, emotions, bias)

    def forward(self, context: Context) -> Perceived:
        """Predict the emotions of ``context``; without a gate h_emo is h^m."""
        logits = self.main(context.mean)  # [B, P]
        return Perceived(None, logits, logits, None, top_emotions(logits), None)


class Perceiver(nn.Module):
    """The emotion graph, the perceptron that reads its edges, and the second pass that guides the response.

    Args:
        config: of the graph; its strategy is soft or hard.
        emotions: P.

    Attributes:
        graph_network: the graph's layers, or without a graph the attention in their place.
    """

    thresholds: Tensor

    def __init__(self, config: ModelConfig, emotions: int) -> None:
        super().__init__()
        self.config = config
        self.correlation = Correlation(emotions, config.released)
        self.register_buffer("thresholds", torch.tensor(config.thresholds), persistent=False)
        self.graph_network: EmotionAttention | GraphNetwork | ReleasedGraphNetwork
        if "graph" in config.ablations:
            self.graph_network = EmotionAttention(config)
        else:
            self.graph_network = ReleasedGraphNetwork(config) if config.released else GraphNetwork(config)
        if config.released:
            xavier(self.correlation)
        self.perceptron = Perceptron(config, emotions)

    def forward(self, context: Context) -> Perceived:
        """Perceive the emotions of ``context``, and prepare what guides the response."""
        graph: EmotionGraph | None = None
        first: FirstPass | ReleasedPass | None = None
        correlation = self.correlation().softmax(-1)  # [P, P]
        if not isinstance(self.graph_network, EmotionAttention):
            graph = self.emotion_graph(context, correlation)
            first = self.graph_network.perceive(context.words, context.emotions, graph)
            perception = self.perceptron(first.word_to_emotion, first.emotion_to_emotion, context.mean)
        else:
            to_emotion = self.graph_network(context.memory, context.memory_mask, context.emotions)  # [B, P]
            edges = correlation.expand(len(to_emotion), -1, -1)  # [B, P, P]
            perception = self.perceptron(to_emotion, edges, context.mean)
        relevant = self._relevant(perception.emotion_attention)  # [B, P]
        guidance: Tensor | None = None
        if graph is not None and first is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and "gen-loss" not in self.config.ablations):
                guidance = self._guidance(context, graph, first, perception, relevant)
        return Perceived(
            perception.global_signal,
            perception.main_logits,
            perception.emotion_attention,
            perception.gate,
            relevant,
            guidance,
            correlation.expand(len(context.words), -1, -1),
        )

    def emotion_graph(self, context: Context, correlation: Tensor | None = None) -> EmotionGraph:
        """Return the graph with the initial edges of Eq. 3; in the released form a word's weight is its c squared.

        ``correlation``: Softmax(R), where it is there already.
        """
        if correlation is None:
            correlation = self.correlation().softmax(-1)  # [P, P]
        graph = EmotionGraph.from_intensity(context.intensity, context.lengths, self.thresholds, correlation)
        if not self.config.released:
            return graph
        # Its code divides by the largest weight with [CLS] among them, whose is 1.
        return replace(graph, word_weight=context.intensity.square() * context.mask)

    def _relevant(self, emotion_attention: Tensor) -> Tensor:
        """Return V' (Sec. 3.4): the top three emotions, or the relevant side of Otsu's split (Eq. 14)."""
        if self.config.strategy == "hard":
            return otsu(emotion_attention.float(), self.config.max_relevant).mask
        return top_emotions(emotion_attention)

    def _guidance(
        self,
        context: Context,
        graph: EmotionGraph,
        first: FirstPass | ReleasedPass,
        perception: Perception,
        relevant: Tensor,
    ) -> Tensor:
        """Return the node sum of the second pass over the improved graph (Eqs. 13, 14, 24), or its ablation; [B, D]."""
        if "co-g" in self.config.ablations:
            return context.emotions[perception.main_logits.argmax(1)]
        if self.config.strategy == "soft":
            attention = perception.emotion_attention.float()
            weight = (attention.relu() if self.config.released else attention).softmax(-1)  # [B, P]
            correlation = weight[:, None].expand(-1, weight.shape[1], -1)  # [B, P, P]
            improved = EmotionGraph(graph.word_weight, graph.word_mask, weight, correlation)
        else:
            improved = EmotionGraph(
                graph.word_weight, graph.word_mask, graph.emotion_weight, graph.correlation, relevant
            )
        assert not isinstance(self.graph_network, EmotionAttention)
        nodes = self.graph_network.guide(first, improved)  # type: ignore[arg-type]  # [B, M, D], each of its own pass
        return (nodes * context.mask[..., None]).sum(1)


def top_emotions(emotion_attention: Tensor) -> Tensor:
    """Return the emotions with the highest h_emo, bool [B, P]: V' of the soft strategy."""
    top = emotion_attention.topk(min(SOFT_RELEVANT, emotion_attention.shape[1]), dim=1).indices
    return torch.zeros_like(emotion_attention, dtype=torch.bool).scatter(1, top, True)


@torch.no_grad()
def health(perceived: Perceived, intensity: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Return figures of the graph's health; ``docs/model.md`` has the list. Empty without h^g.

    Args:
        intensity: [B, M], c of every word.
        lengths: [B], words of each context, ``[CLS]`` counted.
    """
    if perceived.global_signal is None or perceived.gate is None:
        return {}
    position = torch.arange(intensity.shape[1], device=intensity.device)
    words = (position < lengths[:, None]) & (position > 0)  # [B, M], without [CLS]
    dead = words & (intensity == 0)
    signal = perceived.global_signal.float()
    normed = F.layer_norm(signal, signal.shape[1:])
    return {
        "perception_std": signal.std(),
        "perception_context": normed.var(0, correction=0).mean(),
        "dead_edges": dead.sum() / words.sum().clamp(min=1),
        "relevant": perceived.relevant.sum(1).float().mean(),
        "gate_mean": perceived.gate.float().mean(),
        "gate_std": perceived.gate.float().std(),
    }
