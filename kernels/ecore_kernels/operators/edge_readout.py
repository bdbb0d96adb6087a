"""Readout of the last edges: their emotion columns (Eq. 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecore_kernels import backends, reference
from ecore_kernels.dtypes import kernel_type, node_type, weight_type
from ecore_kernels.graph import EmotionGraph
from ecore_kernels.layout import empty_rows
from ecore_kernels.operators import batching, registration
from ecore_kernels.operators.checks import check_graph, check_history, check_one_device
from ecore_kernels.operators.history import EdgeUpdate, autocast_history, row_factor
from ecore_kernels.operators.plans import (
    Plan,
    bound_forward,
    flat,
    runs_at_once,
    score_scale,
    settled,
    takes_as_they_are,
    without_autocast,
)

# In plain PyTorch ------------------------------------------------------------------------------------------


registration.library.define(
    "edge_readout(Tensor word_weight, Tensor word_mask, Tensor emotion_weight, Tensor correlation, "
    "Tensor? emotion_mask, Tensor[] history_query, Tensor[] history_key, Tensor? row_factor, float scale, "
    "bool per_word) -> (Tensor, Tensor)"
)


def _composite(
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


registration.library.impl("edge_readout", _composite, "CompositeImplicitAutograd")
registration.library.impl("edge_readout", _composite, "FuncTorchBatchedDecomposition")


# On fused kernels -------------------------------------------------------------------------------------------


registration.library.define(
    "fused_edge_readout(Tensor word_mask, Tensor emotion_weight, Tensor correlation, Tensor? emotion_mask, "
    "Tensor[] history_query, Tensor[] history_key, Tensor? row_factor, float scale, bool per_word, str precision, "
    "str backend) -> (Tensor word_to_emotion, Tensor emotion_to_emotion)"
)
registration.library.define(
    "fused_edge_readout_backward(Tensor grad_word_to_emotion, Tensor grad_emotion_to_emotion, Tensor word_mask, "
    "Tensor emotion_weight, Tensor correlation, Tensor? emotion_mask, Tensor[] history_query, Tensor[] history_key, "
    "Tensor? row_factor, float scale, bool per_word, bool[] needs, str precision, str backend) -> Tensor[]"
)


def _results(
    word_mask, emotion_weight, correlation, emotion_mask, history_query, history_key, row_factor, scale, per_word,
    precision,
):  # fmt: skip
    """Allocate the results of the forward.

    Args:
        word_mask ... emotion_mask: as in :class:`ecore_kernels.EmotionGraph`.
        history: [B, K, N, d] of one type; may be empty.
        row_factor: [B, K, N]; None for 1.
        per_word: keep the words apart.
        precision: "ieee" or "tf32", for float32 on a GPU.

    Returns:
        word_to_emotion: [B, P], or [B, M, P] with per_word; emotion_to_emotion: [B, P, P]. Both in the type of
        emotion_weight: float32, or float64 where the history is.
    """
    batch, _, words = word_mask.shape
    emotions = emotion_weight.shape[1]
    shape = (batch, words, emotions) if per_word else (batch, emotions)
    return emotion_weight.new_empty(shape), emotion_weight.new_empty((batch, emotions, emotions))


def _gradients(
    grad_word_to_emotion, grad_emotion_to_emotion, word_mask, emotion_weight, correlation, emotion_mask,
    history_query, history_key, row_factor, scale, per_word, needs, precision,
):  # fmt: skip
    """Allocate the results of the backward.

    Args:
        grad_word_to_emotion, grad_emotion_to_emotion: gradients of the forward's results; the other arguments are the
            forward's.
        needs: which of the gradients below are wanted, in their order; for the others nothing is computed.

    Returns:
        gradients of the history's queries, its keys, row_factor, emotion_weight [B, P] and correlation (in its shape);
        None for those that are not needed.
    """
    past = (*history_query, *history_key)
    gradients = [
        empty_rows(past[0], x.shape[2], x.shape[3], x.dtype) if needed else None
        for x, needed in zip(past, needs[:-3], strict=True)
    ]
    rest = (row_factor, emotion_weight, correlation)
    return gradients + [
        x.new_empty(x.shape) if needed else None for x, needed in zip(rest, needs[-3:], strict=True)
    ]


registration.register("edge_readout", "forward", _results)
registration.register("edge_readout", "backward", _gradients)
batching.register("edge_readout", {"correlation": -1})


class _Tensors(NamedTuple):
    """The flat tensors of edge_readout."""

    history_query: list[Tensor]
    history_key: list[Tensor]
    row_factor: Tensor | None
    emotion_weight: Tensor
    correlation: Tensor
    word_mask: Tensor
    emotion_mask: Tensor | None

    @classmethod
    def of(cls, layers: int, tensors: Sequence[Any]) -> _Tensors:
        past = list(tensors[: 2 * layers])
        return cls(past[:layers], past[layers:], *tensors[2 * layers :])

    def arguments(self) -> tuple[Any, ...]:
        """The registered operators' arguments from word_mask to row_factor."""
        graph = (self.word_mask, self.emotion_weight, self.correlation, self.emotion_mask)
        return (*graph, self.history_query, self.history_key, self.row_factor)


def _forward(setting, tensors):
    layers, *rest = setting
    of = _Tensors.of(layers, tensors)
    return registration.run("edge_readout", "forward", tensors, (*of.arguments(), *rest))


def _backward(setting, needs, gradients, tensors, kept):
    layers, scale, per_word, precision, backend = setting
    of = _Tensors.of(layers, tensors)
    to_word, to_emotion = gradients
    batch, _, words = of.word_mask.shape
    emotions = of.emotion_weight.shape[1]
    if to_word is None:
        to_word = to_emotion.new_zeros((batch, words, emotions) if per_word else (batch, emotions))
    if to_emotion is None:
        to_emotion = to_word.new_zeros((batch, emotions, emotions))
    arguments = (
        to_word, to_emotion, *of.arguments(), scale, per_word, list(needs[: 3 + 2 * layers]), precision, backend,
    )  # fmt: skip
    return registration.run("edge_readout", "backward", (*gradients, *tensors), arguments)


def _reference(setting, tensors):
    layers, scale, per_word, _, _ = setting
    of = _Tensors.of(layers, tensors)
    words = of.emotion_weight.new_zeros((of.word_mask.shape[0], of.word_mask.shape[2]))  # not read
    graph = EmotionGraph(words, of.word_mask, of.emotion_weight, of.correlation, of.emotion_mask)
    return reference.edge_readout(graph, of.history_query, of.history_key, of.row_factor, scale, per_word)


registration.OPERATORS["edge_readout"] = registration.FusedOperator(
    _forward,
    _backward,
    _reference,
    2,
    (),
    lambda layers: [*registration.past_names(layers), *_Tensors._fields[2:]],
)


def _fused(
    graph: EmotionGraph,
    history_query: list[Tensor],
    history_key: list[Tensor],
    row_factor: Tensor | None,
    scale: float,
    per_word: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """:func:`ecore_kernels.edge_readout` on a backend's fused kernels; arguments as for the reference."""
    past = [*history_query, *history_key]
    kind = node_type(past or [graph.emotion_weight], graph.emotion_weight, graph.correlation, row_factor)
    kind = kernel_type(kind, backend)
    number = weight_type(kind)
    to_word, to_emotion = registration.apply(
        "edge_readout",
        (len(history_query), scale, per_word, registration.precision(backend), backend),
        *registration.apart(past, kind),
        None if row_factor is None else registration.as_type(row_factor, number),
        registration.as_type(graph.emotion_weight, number),
        registration.as_type(graph.correlation, number),
        graph.word_mask,
        graph.emotion_mask,
    )
    return to_word, to_emotion


# The public function -----------------------------------------------------------------------------------------


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
        graph: the neighbours of each node, and E0.
        history: one :class:`EdgeUpdate` per layer, first layer first.
        scale: factor on the scores, as in the layers' attention: a number, a tensor of one, or None for 1 / sqrt(d).
        per_word: one result for each word instead of their sum.
        backend: "reference", "native", "triton"; None takes the fastest that can run the call.

    Returns:
        word_to_emotion: [B, P], sum over resolutions k and words i of E_ij for every emotion j; [B, M, P], the sum
            over resolutions alone, with ``per_word``.
        emotion_to_emotion: [B, P, P], sum over k of E_ij: row i is what emotion i receives from emotion j; the diagonal
            is 0, since an emotion does not attend to itself.
        Both are float32 at least.

    Gradients reach the history's queries, keys, gates and edge scales, and the graph's emotion_weight and correlation.
    They also reach a scale in a tensor, and all can be differentiated twice.

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
        arguments = (
            *tensors[1:5], tensors[5::4], tensors[6::4], row_factor(history), scale, per_word,
            registration.precision(plan.backend), plan.backend,
        )  # fmt: skip
        return registration.compute("edge_readout", "forward", arguments)
    kind = plan.autocast
    past = history if kind is None else autocast_history(history, kind)
    history_query, history_key = [u.query for u in past], [u.key for u in past]
    if scale.__class__ is not float:
        dim = history_query[0].shape[3] if history_query else 1
        scale, queries = score_scale("edge_readout", scale, dim, history_query)
        history_query = list(queries)
    with without_autocast(graph.word_weight.device, kind):
        factor = row_factor(history)
        if plan.backend != "reference":
            return _fused(graph, history_query, history_key, factor, scale, per_word, plan.backend)
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


_plans: dict[Any, Plan] = {}


def _check(graph: Any, history: Any, **_: Any) -> None:
    """Raise ValueError unless the arguments fit each other."""
    check_graph("edge_readout", graph)
    batch, resolutions, words, emotions = graph.shape
    check_history("edge_readout", history, (batch, resolutions, words + emotions))


def _plan(graph: EmotionGraph, history: Sequence[EdgeUpdate], per_word: bool, backend: str | None) -> Plan:
    _check(graph, history)
    kind = backends.autocast_type(graph.word_weight.device)
    past = autocast_history(history, kind)
    chosen = backends.choose("edge_readout", backend, graph, past)
    if chosen != "reference":
        # The readout does not use the words' weights.
        check_one_device(
            "edge_readout", *graph.tensors()[1:], *(x for u in past for x in (u.query, u.key, u.gate))
        )
    as_they_are, bound = False, None
    if kind is None:
        gates, scales = [u.gate for u in past], [u.edge_scale for u in past]
        history_query, history_key = [u.query for u in past], [u.key for u in past]
        as_they_are = takes_as_they_are(
            chosen,
            [*history_query, *history_key] or [graph.emotion_weight],
            (graph.emotion_weight, graph.correlation, *gates),
            (graph.word_mask, graph.emotion_mask),
            scales,
        )
    if as_they_are:
        arguments = (*graph.tensors()[1:], history_query, history_key, None, 1.0, per_word, "ieee")
        bound = bound_forward("edge_readout", chosen, arguments, gates, scales)
    return Plan(chosen, kind, torch.float32, as_they_are, bound)


backends.register("edge_readout", edge_readout, _check)
