"""What the model reads out of the last edges: their emotion columns (Eq. 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ecore_kernels import backends, fused, reference
from ecore_kernels.attention import (
    EdgeUpdate,
    Plan,
    autocast_history,
    check_graph,
    check_history,
    direct_forward,
    flat,
    row_factor,
    runs_at_once,
    score_scale,
    settled,
    without_autocast,
)
from ecore_kernels.checks import check_one_device
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
_library.impl("edge_readout", _edge_readout, "FuncTorchBatchedDecomposition")


def edge_readout(
    graph: EmotionGraph,
    history: Sequence[EdgeUpdate],
    *,
    scale: Tensor | float | None = 1.0,
    per_word: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The weights of the edges that emotions send, after the layers of ``history``, summed over resolutions (Eq. 8).

    Args:
        graph: who hears whom, and E0.
        history: one :class:`EdgeUpdate` per layer, first layer first.
        scale: factor on the scores, as in the layers' attention: a number, a tensor of one, or None for 1 / sqrt(d).
        per_word: keep the words apart instead of adding them up.
        backend: "reference", "native", "triton"; None takes the fastest that can run the call.

    Returns:
        word_to_emotion: [B, P], sum over resolutions k and words i of E_ij for every emotion j; [B, M, P], the sum
            over resolutions alone, with ``per_word``.
        emotion_to_emotion: [B, P, P], sum over k of E_ij: row i is what emotion i receives from emotion j; the diagonal
            is 0, for no emotion hears itself.
        Both are float32 at least.

    Gradients reach the history's queries, keys, gates and edge scales, and the graph's emotion_weight and correlation.
    They reach a scale in a tensor, too, and all of them twice if asked.

    Raises:
        ValueError: a shape or a type that does not fit.
        RuntimeError: the named backend cannot run the call.
    """
    tensors = flat("edge_readout", (), graph, history)
    plan = settled(_plans, tensors, (per_word, backend), lambda: _plan(graph, history, per_word, backend))
    if scale.__class__ is float and runs_at_once(plan):
        if plan.bound is not None:
            graph_and_past = (*tensors[1:5], *tensors[5::4], *tensors[6::4])
            return plan.bound(graph_and_past, tensors[7::4], tensors[8::4], scale)
        factor = row_factor(history)
        return plan.kernels.forward(
            *tensors[1:5], tensors[5::4], tensors[6::4], factor, scale, per_word, fused.precision(plan.backend),
        )  # fmt: skip
    kind = plan.autocast
    past = history if kind is None else autocast_history(history, kind)
    history_query, history_key = [u.query for u in past], [u.key for u in past]
    if scale.__class__ is not float:
        dim = history_query[0].shape[3] if history_query else 1
        scale, history_query = score_scale("edge_readout", scale, dim, history_query)
    with without_autocast(graph.word_weight.device, kind):
        factor = row_factor(history)
        if plan.backend != "reference":
            return fused.edge_readout(
                graph, history_query, history_key, factor, scale, per_word, plan.backend
            )
        return torch.ops.ecore_kernels.edge_readout(
            graph.word_weight,
            graph.word_mask,
            graph.emotion_weight,
            graph.correlation,
            graph.emotion_mask,
            list(history_query),
            history_key,
            factor,
            scale,
            per_word,
        )


_plans: dict[Any, Plan] = {}


def check_edge_readout(graph: Any, history: Any, **_: Any) -> None:
    """Raise ValueError unless the arguments fit each other."""
    check_graph("edge_readout", graph)
    batch, resolutions, words, emotions = graph.shape
    check_history("edge_readout", history, (batch, resolutions, words + emotions))


def _plan(graph: EmotionGraph, history: Sequence[EdgeUpdate], per_word: bool, backend: str | None) -> Plan:
    check_edge_readout(graph, history)
    kind = backends.autocast_type(graph.word_weight.device)
    past = autocast_history(history, kind)
    chosen = backends.choose("edge_readout", backend, graph, past)
    if chosen != "reference":
        # The readout does not read the words' weights.
        check_one_device("edge_readout", *graph.tensors()[1:], *(x for u in past for x in u[:3]))
    module = bound = None
    if kind is None:
        gates, scales = [u.gate for u in past], [u.edge_scale for u in past]
        history_query, history_key = [u.query for u in past], [u.key for u in past]
        module = direct_forward(
            "edge_readout",
            chosen,
            [*history_query, *history_key] or [graph.emotion_weight],
            (graph.emotion_weight, graph.correlation, *gates),
            (graph.word_mask, graph.emotion_mask),
            scales,
        )
    if module is not None and hasattr(module, "bind"):
        bound = module.bind(*graph.tensors()[1:], history_query, history_key, gates, scales, per_word)
    return Plan(chosen, kind, torch.float32, module, bound)


backends.CHECKS["edge_readout"] = check_edge_readout
