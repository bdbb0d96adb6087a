"""Attention on the emotion graph, over edges that are recomputed from what earlier layers did to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecore_kernels import backends, reference
from ecore_kernels.dtypes import common_type, kernel_type, node_type, weight_type
from ecore_kernels.graph import EmotionGraph
from ecore_kernels.layout import empty_rows, empty_saved
from ecore_kernels.operators import batching, registration
from ecore_kernels.operators.checks import (
    check_floats,
    check_graph,
    check_history,
    check_one_device,
    check_shape,
)
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
from ecore_kernels.refusals import shown

# In plain PyTorch ------------------------------------------------------------------------------------------


registration.library.define(
    "graph_attention(Tensor query, Tensor key, Tensor value, Tensor word_weight, Tensor word_mask, "
    "Tensor emotion_weight, Tensor correlation, Tensor? emotion_mask, Tensor[] history_query, Tensor[] history_key, "
    "Tensor? row_factor, float scale, bool words_only) -> Tensor"
)


def _composite(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    word_weight: Tensor,
    word_mask: Tensor,
    emotion_weight: Tensor,
    correlation: Tensor,
    emotion_mask: Tensor | None,
    history_query: list[Tensor],
    history_key: list[Tensor],
    row_factor: Tensor | None,
    scale: float,
    words_only: bool,
) -> Tensor:
    graph = EmotionGraph(word_weight, word_mask, emotion_weight, correlation, emotion_mask)
    return reference.graph_attention(
        query, key, value, graph, history_query, history_key, row_factor, scale, words_only
    )


registration.library.impl("graph_attention", _composite, "CompositeImplicitAutograd")
registration.library.impl("graph_attention", _composite, "FuncTorchBatchedDecomposition")


# On fused kernels -------------------------------------------------------------------------------------------


registration.library.define(
    "fused_graph_attention(Tensor query, Tensor key, Tensor value, Tensor word_weight, Tensor word_mask, "
    "Tensor emotion_weight, Tensor correlation, Tensor? emotion_mask, Tensor[] history_query, Tensor[] history_key, "
    "Tensor? row_factor, float scale, bool words_only, str precision, str backend) -> (Tensor output, Tensor saved)"
)
registration.library.define(
    "fused_graph_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor word_mask, "
    "Tensor correlation, Tensor? emotion_mask, Tensor[] history_query, Tensor[] history_key, Tensor? row_factor, "
    "Tensor output, Tensor saved, float scale, bool words_only, bool[] needs, str precision, str backend) -> Tensor[]"
)


def _results(
    query, key, value, word_weight, word_mask, emotion_weight, correlation, emotion_mask, history_query, history_key,
    row_factor, scale, words_only, precision,
):  # fmt: skip
    """Allocate the results of the forward.

    Args:
        query, key, history: [B, K, N, d], value [B, K, N, dv], of one type.
        word_weight ... emotion_mask: as in :class:`ecore_kernels.EmotionGraph`.
        row_factor: [B, K, N]; None for 1.
        words_only: only words receive.
        precision: "ieee" or "tf32", for float32 on a GPU.

    Returns:
        output: [B, K, N or M, dv], in the type of value.
        saved: [5, B, K, N], for the backward: for every place in the order, its receiver's largest exponent to base 2,
            one over the sum of its softmax, and E0 of the edges that its node sends to words; then the order, int32 [B,
            K, N]: the nodes that take part ([CLS], emotions, words); and counts, int32 [B, K, 2]: of emotions and of
            nodes that take part.
    """
    rows = word_mask.shape[2] if words_only else query.shape[2]
    return empty_rows(value, rows, value.shape[3], value.dtype), empty_saved(query, 5)


def _gradients(
    grad_output, query, key, value, word_mask, correlation, emotion_mask, history_query, history_key, row_factor,
    output, saved, scale, words_only, needs, precision,
):  # fmt: skip
    """Allocate the results of the backward.

    Args:
        grad_output: the gradient of output, in its shape.
        output, saved: from the forward; the other arguments are the forward's.
        needs: which of the gradients below are wanted, in their order; for the others nothing is computed.

    Returns:
        gradients of query, key, value, the history's queries, its keys, row_factor, emotion_weight [B, P] and
        correlation (in its shape); None for those that are not needed.
    """
    batch, resolutions, nodes, _ = query.shape
    rows = (query, key, value, *history_query, *history_key)
    gradients = [
        empty_rows(query, nodes, x.shape[3], x.dtype) if needed else None
        for x, needed in zip(rows, needs[:-3], strict=True)
    ]
    shapes = ((batch, resolutions, nodes), (batch, correlation.shape[-1]), correlation.shape)
    return gradients + [
        saved.new_empty(shape) if needed else None for shape, needed in zip(shapes, needs[-3:], strict=True)
    ]


registration.register("graph_attention", "forward", _results)
registration.register("graph_attention", "backward", _gradients)
batching.register("graph_attention", {"correlation": -1}, saved_as_a_whole=True)


class _Tensors(NamedTuple):
    """The flat tensors of graph_attention: queries, keys and values, then the rest."""

    query: Tensor
    key: Tensor
    value: Tensor
    history_query: list[Tensor]
    history_key: list[Tensor]
    row_factor: Tensor | None
    emotion_weight: Tensor
    correlation: Tensor
    word_weight: Tensor
    word_mask: Tensor
    emotion_mask: Tensor | None

    @classmethod
    def of(cls, layers: int, tensors: Sequence[Any]) -> _Tensors:
        (query, key, value), rest = tensors[:3], tensors[3 + 2 * layers :]
        past = list(tensors[3 : 3 + 2 * layers])
        return cls(query, key, value, past[:layers], past[layers:], *rest)


def _forward(setting, tensors):
    layers, scale, words_only, precision, backend = setting
    of = _Tensors.of(layers, tensors)
    arguments = (
        of.query, of.key, of.value, of.word_weight, of.word_mask, of.emotion_weight, of.correlation, of.emotion_mask,
        of.history_query, of.history_key, of.row_factor, scale, words_only, precision, backend,
    )  # fmt: skip
    return registration.run("graph_attention", "forward", tensors, arguments)


def _backward(setting, needs, gradients, tensors, kept):
    layers, scale, words_only, precision, backend = setting
    of = _Tensors.of(layers, tensors)
    arguments = (
        gradients[0], of.query, of.key, of.value, of.word_mask, of.correlation, of.emotion_mask, of.history_query,
        of.history_key, of.row_factor, *kept, scale, words_only, list(needs[: 6 + 2 * layers]), precision, backend,
    )  # fmt: skip
    return registration.run("graph_attention", "backward", (gradients[0], *tensors), arguments)


def _reference(setting, tensors):
    layers, scale, words_only, _, _ = setting
    of = _Tensors.of(layers, tensors)
    graph = EmotionGraph(of.word_weight, of.word_mask, of.emotion_weight, of.correlation, of.emotion_mask)
    output = reference.graph_attention(
        of.query, of.key, of.value, graph, of.history_query, of.history_key, of.row_factor, scale, words_only
    )
    return (output,)


registration.OPERATORS["graph_attention"] = registration.FusedOperator(
    _forward,
    _backward,
    _reference,
    1,
    (0, 1),
    lambda layers: ["query", "key", "value", *registration.past_names(layers), *_Tensors._fields[5:]],
)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    graph: EmotionGraph,
    history_query: list[Tensor],
    history_key: list[Tensor],
    row_factor: Tensor | None,
    scale: float,
    words_only: bool,
    backend: str,
) -> Tensor:
    """:func:`ecore_kernels.graph_attention` on a backend's fused kernels; arguments as for the reference.

    Returns:
        [B, K, N or M, dv], in the type that values are multiplied in.
    """
    nodes = [query, key, value, *history_query, *history_key]
    kind = node_type(nodes, graph.word_weight, graph.emotion_weight, graph.correlation, row_factor)
    kind = kernel_type(kind, backend)
    number = weight_type(kind)
    word_weight = graph.word_weight.detach() if graph.word_weight.requires_grad else graph.word_weight
    output, _ = registration.apply(
        "graph_attention",
        (len(history_query), scale, words_only, registration.precision(backend), backend),
        *registration.apart(nodes, kind),
        None if row_factor is None else registration.as_type(row_factor, number),
        registration.as_type(graph.emotion_weight, number),
        registration.as_type(graph.correlation, number),
        registration.as_type(word_weight, number),
        graph.word_mask,
        graph.emotion_mask,
    )
    return output


# The public function -----------------------------------------------------------------------------------------


def graph_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    graph: EmotionGraph,
    history: Sequence[EdgeUpdate] = (),
    *,
    scale: Tensor | float | None = 1.0,
    receivers: str = "all",
    backend: str | None = None,
) -> Tensor:
    """Attention on the emotion graph, over edges recomputed from what earlier layers did to them.

    After the layers of ``history`` the weight of an edge is ``E_ij = E0_ij * r_i * prod_m (1 + scale * q^m_i .
    k^m_j)``, with r
    the product of the layers' gates and edge scales (Eqs. 5 and 7 unrolled). The output is
    ``softmax over neighbours of (scale * q_i . k_j * E_ij) @ value`` (Eqs. 4, 6, 7). A row without neighbours, or one
    that does not take part in a resolution, gives 0, and no value of such a node is read.

    Args:
        query, key: [B, K, N, d], N = M words and then P emotions.
        value: [B, K, N, dv].
        graph: the neighbours of each node, and E0.
        history: one :class:`EdgeUpdate` per earlier layer, first layer first; all share ``scale`` and one d.
        scale: factor on the scores, a number or a tensor of one; None means 1 / sqrt(d). A new number does not
            recompile a kernel.
        receivers: "all", or "words" to compute the words' rows only.
        backend: "reference", "native", "triton"; None takes the fastest that can run the call.

    Returns:
        [B, K, N, dv], or [B, K, M, dv] with ``receivers="words"``, in the common type of query, key and value.

    Gradients reach query, key, value, the history's queries, keys, gates and edge scales, the graph's emotion_weight
    and correlation, and a scale in a tensor; they can be differentiated again.

    Raises:
        ValueError: a shape or a type that does not fit, or unknown ``receivers``.
        RuntimeError: the named backend cannot run the call.
    """
    tensors = flat("graph_attention", (query, key, value), graph, history)
    plan = settled(
        _plans,
        tensors,
        (receivers, backend, graph.word_weight.requires_grad),
        lambda: _plan(query, key, value, graph, history, receivers, backend),
    )
    if scale.__class__ is float and runs_at_once(plan):
        if plan.bound is not None:
            nodes_and_graph = (*tensors[:8], *tensors[8::4], *tensors[9::4])
            return plan.bound(nodes_and_graph, tensors[10::4], tensors[11::4], scale)[0]
        arguments = (
            *tensors[:8], tensors[8::4], tensors[9::4], row_factor(history), scale, receivers == "words",
            registration.precision(plan.backend), plan.backend,
        )  # fmt: skip
        return registration.compute("graph_attention", "forward", arguments)[0]
    kind, chosen = plan.autocast, plan.backend
    history_query, history_key = [u.query for u in history], [u.key for u in history]
    if kind is not None:
        query, key, value = (backends.autocast(x, kind) for x in (query, key, value))
        history_query = [backends.autocast(x, kind) for x in history_query]
        history_key = [backends.autocast(x, kind) for x in history_key]
    if scale.__class__ is not float:
        scale, (query, *history_query) = score_scale(
            "graph_attention", scale, query.shape[3], (query, *history_query)
        )
    words_only = receivers == "words"
    with without_autocast(query.device, kind):
        factor = row_factor(history)
        if chosen != "reference":
            output = _fused(
                query, key, value, graph, history_query, history_key, factor, scale, words_only, chosen
            )
        else:
            output = torch.ops.ecore_kernels.graph_attention(
                query,
                key,
                value,
                graph.word_weight,
                graph.word_mask,
                graph.emotion_weight,
                graph.correlation,
                graph.emotion_mask,
                history_query,
                history_key,
                factor,
                scale,
                words_only,
            )
    return output if output.dtype is plan.result else output.to(plan.result)


_plans: dict[Any, Plan] = {}


def _check(
    query: Any, key: Any, value: Any, graph: Any, history: Any = (), receivers: Any = "all", **_: Any
) -> None:
    """Raise ValueError unless the arguments fit each other."""
    check_floats("graph_attention", query=query, key=key, value=value)
    if query.dim() != 4 or value.dim() != 4:
        raise ValueError(
            f"graph_attention: expected query [B, K, N, d] and value [B, K, N, dv], got {list(query.shape)} and "
            f"{list(value.shape)}"
        )
    if not isinstance(receivers, str) or receivers not in ("all", "words"):
        raise ValueError(f"graph_attention: receivers: expected 'all' or 'words', got {shown(receivers)}")
    check_graph("graph_attention", graph)
    batch, resolutions, words, emotions = graph.shape
    leading = (batch, resolutions, words + emotions)
    check_shape("graph_attention", "query", query, (*leading, query.shape[3]))
    check_shape("graph_attention", "key", key, query.shape)
    check_shape("graph_attention", "value", value, (*leading, value.shape[3]))
    check_history("graph_attention", history, leading, query.shape[3])


def _plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    graph: EmotionGraph,
    history: Sequence[EdgeUpdate],
    receivers: str,
    backend: str | None,
) -> Plan:
    _check(query, key, value, graph, history, receivers)
    kind = backends.autocast_type(query.device)
    nodes = [backends.autocast(x, kind) for x in (query, key, value)]
    past = autocast_history(history, kind)
    chosen = backends.choose("graph_attention", backend, *nodes, graph, past)
    if chosen != "reference":
        check_one_device(
            "graph_attention",
            query,
            key,
            value,
            *graph.tensors(),
            *(x for u in past for x in (u.query, u.key, u.gate)),
        )
    as_they_are, bound = False, None
    if kind is None:
        gates, scales = [u.gate for u in past], [u.edge_scale for u in past]
        weights = (graph.word_weight, graph.emotion_weight, graph.correlation, *gates)
        masks = (graph.word_mask, graph.emotion_mask)
        history_query, history_key = [u.query for u in past], [u.key for u in past]
        rows = [*nodes, *history_query, *history_key]
        as_they_are = takes_as_they_are(chosen, rows, weights, masks, scales)
    if as_they_are:
        arguments = (
            *nodes,
            *graph.tensors(),
            history_query,
            history_key,
            None,
            1.0,
            receivers == "words",
            "ieee",
        )
        bound = bound_forward("graph_attention", chosen, arguments, gates, scales)
    return Plan(chosen, kind, common_type(*nodes), as_they_are, bound)


backends.register("graph_attention", graph_attention, _check)
