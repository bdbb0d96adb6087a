"""What the model reads out of the last edges: their emotion columns (Eq. 8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ecore_kernels import backends, fused, reference
from ecore_kernels.attention import (
    EdgeUpdate,
    check_history,
    past_nodes,
    row_factor,
    without_autocast,
)
from ecore_kernels.graph import EmotionGraph

_library = torch.library.Library("ecore_kernels", "FRAGMENT")
_library.define(
    "edge_readout(Tensor word_weight, Tensor word_mask, Tensor emotion_weight, Tensor correlation, "
    "Tensor? emotion_mask, Tensor[] history_query, Tensor[] history_key, Tensor? row_factor, float scale, "
    "bool per_word) -> (Tensor, Tensor)"
)


def _edge_readout(
    word_weight: Tensor,
    word_mask: Tensor,
    emotion_weight: Tensor,
    correlation: Tensor,
    emotion_mask: Tensor | None,
    history_query: list[Tensor],
    history_key: list[Tensor],
    row_factor: Tensor | None,
    scale: float,
    per_word: bool,
) -> tuple[Tensor, Tensor]:
    graph = EmotionGraph(word_weight, word_mask, emotion_weight, correlation, emotion_mask)
    return reference.edge_readout(graph, history_query, history_key, row_factor, scale, per_word)


_library.impl("edge_readout", _edge_readout, "CompositeImplicitAutograd")


def edge_readout(
    graph: EmotionGraph,
    history: Sequence[EdgeUpdate],
    *,
    scale: float = 1.0,
    per_word: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The weights of the edges that emotions send, after the layers of ``history``, summed over resolutions (Eq. 8).

    Args:
        graph: who hears whom, and E0.
        history: one :class:`EdgeUpdate` per layer, first layer first.
        scale: factor on the scores, as in the layers' attention.
        per_word: keep the words apart instead of adding them up.
        backend: "reference", "native", "triton"; None takes the fastest that can run the call.

    Returns:
        word_to_emotion: [B, P], sum over resolutions k and words i of E_ij for every emotion j; [B, M, P], the sum
            over resolutions alone, with ``per_word``.
        emotion_to_emotion: [B, P, P], sum over k of E_ij: row i is what emotion i receives from emotion j; the diagonal
            is 0, for no emotion hears itself.
        Both are float32 at least.

    Gradients reach the history's queries, keys, gates and edge scales, and the graph's emotion_weight and correlation.

    Raises:
        ValueError: a shape or a type that does not fit.
        RuntimeError: the named backend cannot run the call.
    """
    batch, resolutions, words, emotions = graph.shape
    check_history("edge_readout", history, (batch, resolutions, words + emotions))
    device = graph.word_weight.device
    kind = backends.autocast_type(device)
    history_query, history_key = past_nodes(history, kind)
    past = [EdgeUpdate(q, k, u.gate) for q, k, u in zip(history_query, history_key, history, strict=True)]
    chosen = backends.choose("edge_readout", backend, graph, past)
    with without_autocast(device, kind):
        factor = row_factor(history)
        if chosen != "reference":
            return fused.edge_readout(graph, history_query, history_key, factor, scale, per_word, chosen)
        return torch.ops.ecore_kernels.edge_readout(
            graph.word_weight,
            graph.word_mask,
            graph.emotion_weight,
            graph.correlation,
            graph.emotion_mask,
            history_query,
            history_key,
            factor,
            scale,
            per_word,
        )
