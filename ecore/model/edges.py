"""The graph's edges after the first pass over contexts, and the emotion signal before and after Eq. 8 aggregates it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ecore.model.base import EmpatheticModel
from ecore.model.graph_network import EmotionAttention
from ecore.model.perceiver import Context, Perceived, Perceiver


class GraphEdges(NamedTuple):
    """Results of the graph for B contexts of M words, ``[CLS]`` first, and P emotions.

    Attributes:
        word_edges: [B, M, P], E^{w-e} as Eq. 8 sums it: what each word receives from each emotion, summed over
            resolutions; 0 for ``[CLS]`` with ``graph_norm``, and where padded.
        emotion_edges: [B, P, P], E^{e-e} as Eq. 8 aggregates by it (``Perceptron.aggregation``): row i receives from
            column j.
        before: [B, P], the sum of ``word_edges`` over words.
        after: [B, P], h^g = ``emotion_edges`` ``before`` (Eq. 8).
        perceived_before: [B, P], Softmax(h^m) were ``before`` in h^g's place in Eq. 9.
    """

    word_edges: Tensor
    emotion_edges: Tensor
    before: Tensor
    after: Tensor
    perceived_before: Tensor


def has_graph(model: EmpatheticModel) -> bool:
    """Return True if the model has an emotion graph, whose edges can be read."""
    perceiver = model.perceiver
    return isinstance(perceiver, Perceiver) and not isinstance(perceiver.graph_network, EmotionAttention)


@torch.no_grad()
def graph_edges(perceiver: Perceiver, context: Context, perceived: Perceived) -> GraphEdges:
    """Read the edges of contexts.

    Args:
        perceiver: with a graph (:func:`has_graph`).
        context: what it reads.
        perceived: ``perceiver(context)``.
    """
    assert not isinstance(perceiver.graph_network, EmotionAttention)
    assert perceived.global_signal is not None
    graph = perceiver.emotion_graph(context)
    first = perceiver.graph_network.perceive(context.words, context.emotions, graph, per_word=True)
    word_edges = first.word_to_emotion * context.mask[..., None]  # [B, M, P]
    before = word_edges.sum(1)  # [B, P]
    # Emotions that hear nobody else: their aggregate is what they were before.
    alone = torch.zeros_like(first.emotion_to_emotion)  # [B, P, P]
    unaided = perceiver.perceptron(before, alone, context.mean).main_logits  # [B, P]
    return GraphEdges(
        word_edges,
        perceiver.perceptron.aggregation(first.emotion_to_emotion),
        before,
        perceived.global_signal,
        unaided.softmax(-1),
    )
