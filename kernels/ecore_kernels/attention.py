"""Attention whose scores are multiplied by learned edge weights: on any dense graph, and on the emotion graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ecore_kernels import backends, fused, reference
from ecore_kernels.checks import (
    MOST_SIGNATURES,
    check_floats,
    check_number,
    check_one_device,
    check_scalar,
    check_shape,
    check_tensors,
    signature,
)
from ecore_kernels.graph import EmotionGraph

try:
    from torch.fx.experimental.symbolic_shapes import has_static_value
except ImportError:  # older than torch 2.8, which compiles anew for every number

    def has_static_value(a: Any) -> bool:
        return True


class EdgeUpdate(NamedTuple):
    """What one earlier layer did to the edges: E' = gate * edge_scale * E * (1 + scale * query . key) (Eqs. 5, 7).

    Attributes:
        query: [B, K, N, d].
        key: [B, K, N, d].
        gate: [B, K, N], one number W_V h_i per receiving node and resolution; None for a factor of 1.
        edge_scale: scalar W_E; given if and only if ``gate`` is.
    """

    query: Tensor
    key: Tensor
    gate: Tensor | None = None
    edge_scale: Tensor | float | None = None


# A named tuple is a pytree already; the name is what exported programs are saved under.
pytree._register_namedtuple(EdgeUpdate, serialized_type_name="ecore_kernels.EdgeUpdate")
torch.serialization.add_safe_globals([EdgeUpdate])

_library = torch.library.Library("ecore_kernels", "FRAGMENT")
_library.define(
    "edge_attention(Tensor query, Tensor key, Tensor value, Tensor edge, Tensor? neighbors, Tensor? gate, "
    "Tensor? edge_scale, float scale) -> (Tensor, Tensor)"
)
_library.define(
    "graph_attention(Tensor query, Tensor key, Tensor value, Tensor word_weight, Tensor word_mask, "
    "Tensor emotion_weight, Tensor correlation, Tensor? emotion_mask, Tensor[] history_query, Tensor[] history_key, "
    "Tensor? row_factor, float scale, bool words_only) -> Tensor"
)


def _edge_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor,
    neighbors: Tensor | None,
    gate: Tensor | None,
    edge_scale: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    output, new_edge = reference.edge_attention(query, key, value, edge, neighbors, gate, edge_scale, scale)
    return output, output.new_empty(0) if new_edge is None else new_edge


def _graph_attention(
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


# Composite: autograd, torch.func and torch.compile see through the operator to the PyTorch that it is made of.
_library.impl("edge_attention", _edge_attention, "CompositeImplicitAutograd")
_library.impl("edge_attention", _edge_attention, "FuncTorchBatchedDecomposition")
_library.impl("graph_attention", _graph_attention, "CompositeImplicitAutograd")
_library.impl("graph_attention", _graph_attention, "FuncTorchBatchedDecomposition")


def without_autocast(
    device: torch.device, kind: torch.dtype | None
) -> contextlib.AbstractContextManager[None]:
    """Keeps autocast out of an operator's arithmetic; ``kind`` is what :func:`backends.autocast_type` said."""
    return contextlib.nullcontext() if kind is None else torch.autocast(device.type, enabled=False)


def check_graph(operator: str, graph: Any) -> None:
    """Raise ValueError unless ``graph`` is an EmotionGraph of dense tensors."""
    if not isinstance(graph, EmotionGraph):
        raise ValueError(f"{operator}: graph: expected an EmotionGraph, got {type(graph).__name__}")


def check_updates(operator: str, history: Any) -> None:
    """Raise ValueError unless ``history`` is a sequence of EdgeUpdate."""
    if isinstance(history, EdgeUpdate):
        raise ValueError(
            f"{operator}: history: expected a sequence of EdgeUpdate, got a single one: [update]"
        )
    if not isinstance(history, (list, tuple)):
        raise ValueError(
            f"{operator}: history: expected a sequence of EdgeUpdate, got {type(history).__name__}"
        )
    for layer, update in enumerate(history):
        if not isinstance(update, EdgeUpdate):
            raise ValueError(
                f"{operator}: history[{layer}]: expected EdgeUpdate(query, key, gate, edge_scale), got "
                f"{type(update).__name__}"
            )


def check_history(operator: str, history: Any, leading: tuple[int, int, int], dim: int | None = None) -> None:
    """Raise ValueError unless every update has queries and keys [B, K, N, d] of one d and a gate [B, K, N] or none.

    Args:
        dim: the d that they must have; default that of the first.
    """
    check_updates(operator, history)
    for layer, update in enumerate(history):
        name = f"history[{layer}]"
        check_floats(operator, **{f"{name}.query": update.query, f"{name}.key": update.key})
        if update.query.dim() != 4:
            raise ValueError(
                f"{operator}: {name}.query: expected [B, K, N, d], got {list(update.query.shape)}"
            )
        shape = (*leading, history[0].query.shape[3] if dim is None else dim)
        for part, tensor in (("query", update.query), ("key", update.key)):
            check_shape(operator, f"{name}.{part}", tensor, shape)
        check_gate(operator, f"{name}.", update.gate, update.edge_scale, leading)


def check_gate(operator: str, where: str, gate: Any, edge_scale: Any, leading: tuple[int, int, int]) -> None:
    """Raise ValueError unless there are a gate [B, K, N] and a scalar edge scale, or neither."""
    if (gate is None) != (edge_scale is None):
        what = f"{where.removesuffix('.')}: " if where else ""
        raise ValueError(f"{operator}: {what}expected gate and edge_scale both given or both left out")
    if gate is not None:
        check_tensors(operator, **{f"{where}gate": gate})
        check_shape(operator, f"{where}gate", gate, leading)
        check_scalar(operator, f"{where}edge_scale", edge_scale)


class _RowFactor(torch.autograd.Function):
    """The product of gates [B, K, N] and scalar edge scales, given in turns.

    A node that takes no part has a gradient of 0 and any gate, NaN included: times that gate it would spoil the other
    gradients. So gates enter gradients as 0 where they are not finite; a node that does take part has a gradient of NaN
    then.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*factors):
        product = factors[0] * factors[1]
        for gate, scale in zip(factors[2::2], factors[3::2], strict=True):
            product = product * (gate * scale)
        return product

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))

    @staticmethod
    def backward(ctx, gradient):
        factors = [x if n is None else n for x, n in zip(ctx.saved_tensors, ctx.numbers, strict=True)]
        gates, scales = [x.nan_to_num(0.0, 0.0, 0.0) for x in factors[::2]], factors[1::2]
        layers = [gate * scale for gate, scale in zip(gates, scales, strict=True)] if len(gates) > 1 else []
        gradients = []
        for layer, (gate, scale) in enumerate(zip(gates, scales, strict=True)):
            rest = gradient
            for other in (*layers[:layer], *layers[layer + 1 :]):
                rest = rest * other
            gradients.append(rest * scale if ctx.needs_input_grad[2 * layer] else None)
            gradients.append((rest * gate).sum() if ctx.needs_input_grad[2 * layer + 1] else None)
        return tuple(gradients)


def _factors(history: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Gates [B, K, N] in float32 at least and their edge scales, in turns."""
    factors: list[Any] = []
    for _, _, gate, scale in history:
        if gate is None:
            continue
        if gate.dtype is not torch.float32 and gate.dtype is not torch.float64:
            gate = gate.to(torch.float32)
        if isinstance(scale, Tensor):
            if scale.dim():
                scale = scale.reshape(())
            if scale.dtype is not gate.dtype:
                scale = scale.to(gate.dtype)
        factors += (gate, scale)
    return factors


def row_factor(history: Iterable[tuple[Any, ...]]) -> Tensor | None:
    """r = prod_m gate^m * edge_scale^m, [B, K, N] in float32 at least; None where no layer has a gate."""
    factors = _factors(history)
    if not factors:
        return None
    # Tensors of torch.func hide what requires a gradient. Forward mode is served by the derivatives of the product.
    if torch.is_grad_enabled() and (
        any(isinstance(x, Tensor) and x.requires_grad for x in factors)
        or (not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active())
    ):
        return (
            _RowFactor.forward(*factors) if backends.differentiates_forward() else _RowFactor.apply(*factors)
        )
    return _RowFactor.forward(*factors)


def score_scale(
    operator: str, scale: Any, dim: int, queries: Sequence[Tensor]
) -> tuple[float, Sequence[Tensor]]:
    """The factor on the scores as a number, and the queries that it leaves.

    A scale in a tensor is multiplied into the queries instead, of which all share it: so autograd gives its gradient,
    and no value is fetched from a GPU. So is a number that torch.compile has found to vary: as an argument of an
    operator it would compile anew for every value.

    Args:
        scale: a number, a tensor of one number, or None for 1 / sqrt(dim).
    """
    if scale is None:
        return max(dim, 1) ** -0.5, queries
    if isinstance(scale, Tensor):
        check_scalar(operator, "scale", scale)
        one = scale.reshape(())
        return 1.0, [(query * one).to(query.dtype) for query in queries]
    check_number(operator, "scale", scale)
    if torch.compiler.is_compiling() and not has_static_value(scale):
        return 1.0, [query * scale for query in queries]
    return scale, queries


class Plan(NamedTuple):
    """Result of a call's checks, shared by all calls of the same signature."""

    backend: str
    autocast: torch.dtype | None
    """Type that autocast asks queries, keys and values to have; None outside of it."""
    result: torch.dtype
    """Type of the output."""
    kernels: Any
    """The module with the backend's forward, where that takes the tensors as they are and no gradient is wanted."""
    bound: Callable[..., Any] | None = None
    """The forward of ``kernels`` for tensors in this layout, where the backend has that."""


def settled(plans: dict[Any, Plan], tensors: Sequence[Any], options: Any, make: Callable[[], Plan]) -> Plan:
    """The plan of a call: of the last one with its signature, or else made anew.

    Raises:
        ValueError, RuntimeError: the call is refused.
    """
    if backends.settles_every_call():
        return make()
    call = (signature(tensors), options, backends.situation())
    plan = plans.get(call)
    if plan is None:
        plan = make()
        if len(plans) >= MOST_SIGNATURES:
            plans.clear()
        plans[call] = plan
    return plan


def runs_at_once(plan: Plan) -> bool:
    """Return True if a call can bypass autograd and torch's dispatcher: no gradients, dispatch modes or profilers."""
    return plan.kernels is not None and not (
        torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled()
    )


def direct_forward(
    operator: str,
    backend: str,
    nodes: Sequence[Tensor],
    weights: Sequence[Any],
    masks: Sequence[Any],
    scales: Sequence[Any],
) -> Any:
    """A backend's module if it takes queries, keys and values, edges and gates, and masks as they are; else None.

    None too where one of them, or an edge scale, wants a gradient.
    """
    if backend == "reference" or backends.settles_every_call():
        return None
    if torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in (*nodes, *weights, *scales)
    ):
        return None
    weights, masks = ([x for x in of if x is not None] for of in (weights, masks))
    kind = fused.kernel_type(fused.node_type(nodes, *weights), backend)
    as_they_are = (
        all(type(x) in fused.PLAIN for x in (*nodes, *weights, *masks))
        and all(x.dtype is kind for x in nodes)
        and all(x.dtype is fused.weight_type(kind) for x in weights)
    )
    return fused.kernels(backend, operator) if as_they_are else None


def flat(operator: str, nodes: Sequence[Any], graph: Any, history: Any) -> list[Any]:
    """The tensors of a call: ``nodes``, five of the graph, and four of each layer of history.

    Raises:
        ValueError: no graph, or a history that is none.
    """
    check_graph(operator, graph)
    check_updates(operator, history)
    tensors = [*nodes, *graph.tensors()]
    for update in history:
        tensors += update
    return tensors


def common_type(*nodes: Tensor) -> torch.dtype:
    """The type that tensors of these types promote to."""
    kind = nodes[0].dtype
    for tensor in nodes[1:]:
        kind = torch.promote_types(kind, tensor.dtype)
    return kind


def edge_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor,
    neighbors: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    edge_scale: Tensor | float | None = None,
    scale: Tensor | float | None = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention on any dense graph, its scores multiplied by edge weights, and the edges' update (Eqs. 4 to 7).

    ``s = scale * query @ key^T``; ``output = softmax over neighbours of (s * edge) @ value``;
    ``new_edge = gate * edge_scale * (edge + s * edge)``. A row without neighbours gives 0. What is off the graph is not
    read: neither an edge's weight nor a value that nobody hears, NaN and infinity included.

    Args:
        query, key: [B, K, N, d].
        value: [B, K, N, dv].
        edge: weights that broadcast to [B, K, N, N], of any real type; row i receives, column j sends.
        neighbors: bool, broadcasts to [B, K, N, N]; None means a complete graph.
        gate: [B, K, N]; with it, ``edge_scale`` (a scalar) is required and the updated edges are returned.
        scale: factor on the scores, a number or a tensor of one; None means 1 / sqrt(d). Another number compiles
            nothing anew.
        backend: "reference", "native", "triton"; None takes the fastest that can run the call.

    Returns:
        output: [B, K, N, dv], in the common type of query, key and value.
        new_edge: [B, K, N, N], 0 off the graph; None without ``gate``.

    Gradients reach query, key, value, edge, gate, edge_scale and a scale in a tensor, twice if asked.

    Raises:
        ValueError: a shape or a type that does not fit, or only one of gate and edge_scale.
        RuntimeError: the named backend cannot run the call.
    """
    tensors = (query, key, value, edge, neighbors, gate, edge_scale)
    plan = settled(_edge_plans, tensors, backend, lambda: _plan_edge_attention(*tensors, backend))
    full = (*query.shape[:3], query.shape[2])
    edge = _broadcastable("edge", edge, full)
    if neighbors is not None:
        neighbors = _broadcastable("neighbors", neighbors, full)
    if scale.__class__ is float and runs_at_once(plan):
        if plan.bound is not None:
            return plan.bound(query, key, value, edge, neighbors, gate, edge_scale, scale)
        factor = None if gate is None else row_factor(((None, None, gate, edge_scale),))
        output, new_edge, _ = plan.kernels.forward(
            query, key, value, edge, neighbors, factor, scale, fused.precision(plan.backend)
        )
        return output, None if gate is None else new_edge
    kind, chosen = plan.autocast, plan.backend
    if kind is not None:
        query, key, value = (backends.autocast(x, kind) for x in (query, key, value))
    scale, (query,) = score_scale("edge_attention", scale, query.shape[3], (query,))
    with without_autocast(query.device, kind):
        if chosen == "reference":
            if gate is not None:
                number = reference.compute_type(gate)
                edge_scale = torch.as_tensor(edge_scale, device=gate.device, dtype=number).reshape(())
            output, new_edge = torch.ops.ecore_kernels.edge_attention(
                query, key, value, edge, neighbors, gate, edge_scale, scale
            )
        else:
            factor = None if gate is None else row_factor([EdgeUpdate(query, key, gate, edge_scale)])
            output, new_edge = fused.edge_attention(query, key, value, edge, neighbors, factor, scale, chosen)
    if output.dtype is not plan.result:
        output = output.to(plan.result)
    return output, None if gate is None else new_edge


_edge_plans: dict[Any, Plan] = {}


def check_edge_attention(
    query: Any,
    key: Any,
    value: Any,
    edge: Any,
    neighbors: Any = None,
    gate: Any = None,
    edge_scale: Any = None,
    **_: Any,
) -> None:
    """Raise ValueError unless the arguments fit each other."""
    check_floats("edge_attention", query=query, key=key, value=value)
    if query.dim() != 4 or value.dim() != 4:
        raise ValueError(
            f"edge_attention: expected query [B, K, N, d] and value [B, K, N, dv], got {list(query.shape)} and "
            f"{list(value.shape)}"
        )
    check_shape("edge_attention", "key", key, query.shape)
    check_shape("edge_attention", "value", value, (*query.shape[:3], value.shape[3]))
    check_gate("edge_attention", "", gate, edge_scale, query.shape[:3])
    check_tensors("edge_attention", edge=edge)
    full = (*query.shape[:3], query.shape[2])
    if neighbors is not None:
        check_tensors("edge_attention", neighbors=neighbors)
        if neighbors.dtype != torch.bool:
            raise ValueError(f"edge_attention: neighbors: expected torch.bool, got {neighbors.dtype}")
        _broadcastable("neighbors", neighbors, full)
    _broadcastable("edge", edge, full)


def _plan_edge_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor,
    neighbors: Tensor | None,
    gate: Tensor | None,
    edge_scale: Tensor | float | None,
    backend: str | None,
) -> Plan:
    check_edge_attention(query, key, value, edge, neighbors, gate, edge_scale)
    kind = backends.autocast_type(query.device)
    nodes = [backends.autocast(x, kind) for x in (query, key, value)]
    chosen = backends.choose("edge_attention", backend, *nodes, edge, neighbors, gate=gate)
    if chosen != "reference":
        check_one_device("edge_attention", query, key, value, edge, neighbors, gate)
    module = bound = None
    if kind is None:
        module = direct_forward("edge_attention", chosen, nodes, (edge, gate), (neighbors,), (edge_scale,))
    if module is not None and hasattr(module, "bind"):
        full = (*query.shape[:3], query.shape[2])
        shared = None if neighbors is None else _broadcastable("neighbors", neighbors, full)
        bound = module.bind(query, key, value, _broadcastable("edge", edge, full), shared, gate, edge_scale)
    return Plan(chosen, kind, common_type(*nodes), module, bound)


def _broadcastable(name: str, tensor: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """``tensor`` as [1 or B, 1 or K, N, N]: what batch and resolutions share stays shared."""
    if tensor.shape == shape:
        return tensor
    try:
        tensor.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"edge_attention: {name}: expected a shape that broadcasts to {list(shape)}, got {list(tensor.shape)}"
        ) from None
    return tensor[(None,) * (4 - tensor.dim())].expand(-1, -1, *shape[2:])


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

    After the layers of ``history`` an edge weighs ``E_ij = E0_ij * r_i * prod_m (1 + scale * q^m_i . k^m_j)``, with r
    the product of the layers' gates and edge scales (Eqs. 5 and 7 unrolled). The output is
    ``softmax over neighbours of (scale * q_i . k_j * E_ij) @ value`` (Eqs. 4, 6, 7). A row without neighbours, or one
    that does not take part in a resolution, gives 0, and nothing of such a node is read.

    Args:
        query, key: [B, K, N, d], N = M words and then P emotions.
        value: [B, K, N, dv].
        graph: who hears whom, and E0.
        history: one :class:`EdgeUpdate` per earlier layer, first layer first; all share ``scale`` and one d.
        scale: factor on the scores, a number or a tensor of one; None means 1 / sqrt(d). Another number compiles
            nothing anew.
        receivers: "all", or "words" to compute the words' rows only.
        backend: "reference", "native", "triton"; None takes the fastest that can run the call.

    Returns:
        [B, K, N, dv], or [B, K, M, dv] with ``receivers="words"``, in the common type of query, key and value.

    Gradients reach query, key, value, the history's queries, keys, gates and edge scales, the graph's emotion_weight
    and correlation, and a scale in a tensor, twice if asked.

    Raises:
        ValueError: a shape or a type that does not fit, or unknown ``receivers``.
        RuntimeError: the named backend cannot run the call.
    """
    tensors = flat("graph_attention", (query, key, value), graph, history)
    plan = settled(
        _graph_plans,
        tensors,
        (receivers, backend, graph.word_weight.requires_grad),
        lambda: _plan_graph_attention(query, key, value, graph, history, receivers, backend),
    )
    if scale.__class__ is float and runs_at_once(plan):
        if plan.bound is not None:
            nodes_and_graph = (*tensors[:8], *tensors[8::4], *tensors[9::4])
            return plan.bound(nodes_and_graph, tensors[10::4], tensors[11::4], scale)
        factor = row_factor(history)
        output, _ = plan.kernels.forward(
            *tensors[:8], tensors[8::4], tensors[9::4], factor, scale, receivers == "words",
            fused.precision(plan.backend),
        )  # fmt: skip
        return output
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
            output = fused.graph_attention(
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


_graph_plans: dict[Any, Plan] = {}


def check_graph_attention(
    query: Any, key: Any, value: Any, graph: Any, history: Any = (), receivers: Any = "all", **_: Any
) -> None:
    """Raise ValueError unless the arguments fit each other."""
    check_floats("graph_attention", query=query, key=key, value=value)
    if query.dim() != 4 or value.dim() != 4:
        raise ValueError(
            f"graph_attention: expected query [B, K, N, d] and value [B, K, N, dv], got {list(query.shape)} and "
            f"{list(value.shape)}"
        )
    if receivers not in ("all", "words"):
        raise ValueError(f"graph_attention: receivers: expected 'all' or 'words', got {receivers!r}")
    check_graph("graph_attention", graph)
    batch, resolutions, words, emotions = graph.shape
    leading = (batch, resolutions, words + emotions)
    check_shape("graph_attention", "query", query, (*leading, query.shape[3]))
    check_shape("graph_attention", "key", key, query.shape)
    check_shape("graph_attention", "value", value, (*leading, value.shape[3]))
    check_history("graph_attention", history, leading, query.shape[3])


def _plan_graph_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    graph: EmotionGraph,
    history: Sequence[EdgeUpdate],
    receivers: str,
    backend: str | None,
) -> Plan:
    check_graph_attention(query, key, value, graph, history, receivers)
    kind = backends.autocast_type(query.device)
    nodes = [backends.autocast(x, kind) for x in (query, key, value)]
    past = autocast_history(history, kind)
    chosen = backends.choose("graph_attention", backend, *nodes, graph, past)
    if chosen != "reference":
        check_one_device(
            "graph_attention", query, key, value, *graph.tensors(), *(x for u in past for x in u[:3])
        )
    module = bound = None
    if kind is None:
        gates, scales = [u.gate for u in past], [u.edge_scale for u in past]
        weights = (graph.word_weight, graph.emotion_weight, graph.correlation, *gates)
        masks = (graph.word_mask, graph.emotion_mask)
        history_query, history_key = [u.query for u in past], [u.key for u in past]
        module = direct_forward(
            "graph_attention", chosen, [*nodes, *history_query, *history_key], weights, masks,
            scales,
        )  # fmt: skip
    if module is not None and hasattr(module, "bind"):
        bound = module.bind(
            query,
            key,
            value,
            *graph.tensors(),
            history_query,
            history_key,
            gates,
            scales,
            receivers == "words",
        )
    return Plan(chosen, kind, common_type(*nodes), module, bound)


def autocast_history(history: Sequence[EdgeUpdate], kind: torch.dtype | None) -> list[EdgeUpdate]:
    """``history`` with its queries and keys in the type that :func:`backends.autocast_type` gave."""
    return [
        EdgeUpdate(backends.autocast(u.query, kind), backends.autocast(u.key, kind), u.gate, u.edge_scale)
        for u in history
    ]


backends.CHECKS["edge_attention"] = check_edge_attention
backends.CHECKS["graph_attention"] = check_graph_attention
