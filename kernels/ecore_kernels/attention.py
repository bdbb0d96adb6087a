"""Attention whose scores are multiplied by learned edge weights: on any dense graph, and on the emotion graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ecore_kernels import backends, fused, reference
from ecore_kernels.graph import EmotionGraph


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
_library.impl("graph_attention", _graph_attention, "CompositeImplicitAutograd")


def without_autocast(
    device: torch.device, kind: torch.dtype | None
) -> contextlib.AbstractContextManager[None]:
    """Keeps autocast out of an operator's arithmetic; ``kind`` is what :func:`backends.autocast_type` said."""
    return contextlib.nullcontext() if kind is None else torch.autocast(device.type, enabled=False)


def past_nodes(history: Sequence[EdgeUpdate], kind: torch.dtype | None) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and keys of a history, in type ``kind`` if that is given."""
    queries, keys = [update.query for update in history], [update.key for update in history]
    if kind is None:
        return queries, keys
    return [x.to(kind) for x in queries], [x.to(kind) for x in keys]


def check_shape(operator: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless ``tensor`` has ``shape``."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{operator}: {name}: expected {list(shape)}, got {list(tensor.shape)}")


def check_scalar(operator: str, name: str, value: Tensor | float | None) -> None:
    """Raise ValueError unless ``value`` is one number, in a tensor of whatever shape or not."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{operator}: {name}: expected a scalar, got {list(value.shape)}")


def check_floats(operator: str, **tensors: Tensor) -> None:
    """Raise ValueError unless the tensors are floats: results in the inputs' type would be cut off to integers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{operator}: {name}: expected a float type, got {tensor.dtype}")


def check_history(
    operator: str, history: Sequence[EdgeUpdate], leading: tuple[int, int, int], dim: int | None = None
) -> None:
    """Raise ValueError unless every update has queries and keys [B, K, N, d] of one d and a gate [B, K, N] or none.

    Args:
        dim: the d that they must have; default that of the first.
    """
    for layer, update in enumerate(history):
        if update.query.dim() != 4:
            raise ValueError(
                f"{operator}: history[{layer}].query: expected [B, K, N, d], got {list(update.query.shape)}"
            )
        shape = (*leading, history[0].query.shape[3] if dim is None else dim)
        for name, tensor in (("query", update.query), ("key", update.key)):
            check_shape(operator, f"history[{layer}].{name}", tensor, shape)
            check_floats(operator, **{f"history[{layer}].{name}": tensor})
        if (update.gate is None) != (update.edge_scale is None):
            raise ValueError(
                f"{operator}: history[{layer}]: expected gate and edge_scale both given or both left out"
            )
        if update.gate is not None:
            check_shape(operator, f"history[{layer}].gate", update.gate, leading)
        check_scalar(operator, f"history[{layer}].edge_scale", update.edge_scale)


def row_factor(history: Iterable[EdgeUpdate]) -> Tensor | None:
    """r = prod_m gate^m * edge_scale^m, [B, K, N] in float32 at least; None where no layer has a gate."""
    factor = None
    for update in history:
        if update.gate is not None:
            scale = (
                update.edge_scale.reshape(()) if isinstance(update.edge_scale, Tensor) else update.edge_scale
            )
            gate = update.gate.to(reference.compute_type(update.gate)) * scale
            factor = gate if factor is None else factor * gate
    return factor


def edge_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor,
    neighbors: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    edge_scale: Tensor | float | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention on any dense graph, its scores multiplied by edge weights, and the edges' update (Eqs. 4 to 7).

    ``s = scale * query @ key^T``; ``output = softmax over neighbours of (s * edge) @ value``;
    ``new_edge = gate * edge_scale * (edge + s * edge)``. A row without neighbours gives 0.

    Args:
        query, key: [B, K, N, d].
        value: [B, K, N, dv].
        edge: weights that broadcast to [B, K, N, N], of any real type; row i receives, column j sends.
        neighbors: bool, broadcasts to [B, K, N, N]; None means a complete graph.
        gate: [B, K, N]; with it, ``edge_scale`` (a scalar) is required and the updated edges are returned.
        scale: factor on the scores.
        backend: "reference", "native", "triton"; None takes the fastest that can run the call.

    Returns:
        output: [B, K, N, dv], in the common type of query, key and value.
        new_edge: [B, K, N, N], 0 off the graph; None without ``gate``.

    Gradients reach query, key, value, edge, gate and edge_scale.

    Raises:
        ValueError: a shape or a type that does not fit, or only one of gate and edge_scale.
        RuntimeError: the named backend cannot run the call.
    """
    if query.dim() != 4 or value.dim() != 4:
        raise ValueError(
            f"edge_attention: expected query [B, K, N, d] and value [B, K, N, dv], got {list(query.shape)} and "
            f"{list(value.shape)}"
        )
    batch, resolutions, nodes, _ = query.shape
    check_shape("edge_attention", "key", key, query.shape)
    check_shape("edge_attention", "value", value, (*query.shape[:3], value.shape[3]))
    if (gate is None) != (edge_scale is None):
        raise ValueError("edge_attention: expected gate and edge_scale both given or both left out")
    check_floats("edge_attention", query=query, key=key, value=value)
    if edge.is_complex():
        raise ValueError(f"edge_attention: edge: expected real numbers, got {edge.dtype}")
    if gate is not None:
        check_shape("edge_attention", "gate", gate, query.shape[:3])
        check_scalar("edge_attention", "edge_scale", edge_scale)
    full = (batch, resolutions, nodes, nodes)
    if neighbors is not None:
        if neighbors.dtype != torch.bool:
            raise ValueError(f"edge_attention: neighbors: expected torch.bool, got {neighbors.dtype}")
        neighbors = _broadcastable("neighbors", neighbors, full)
    edge = _broadcastable("edge", edge, full)

    kind = backends.autocast_type(query.device)
    if kind is not None:
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    chosen = backends.choose("edge_attention", backend, query, key, value, edge, neighbors, gate=gate)
    result = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    with without_autocast(query.device, kind):
        if chosen == "reference":
            if gate is not None:
                number = reference.compute_type(gate)
                edge_scale = torch.as_tensor(edge_scale, device=gate.device, dtype=number).reshape(())
            output, new_edge = torch.ops.ecore_kernels.edge_attention(
                query, key, value, edge, neighbors, gate, edge_scale, scale
            )
        else:
            factor = row_factor([EdgeUpdate(query, key, gate, edge_scale)])
            output, new_edge = fused.edge_attention(query, key, value, edge, neighbors, factor, scale, chosen)
    return output.to(result), None if gate is None else new_edge


def _broadcastable(name: str, tensor: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """``tensor`` as [1 or B, 1 or K, N, N]: what batch and resolutions share stays shared."""
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
    scale: float = 1.0,
    receivers: str = "all",
    backend: str | None = None,
) -> Tensor:
    """Attention on the emotion graph, over edges recomputed from what earlier layers did to them.

    After the layers of ``history`` an edge weighs ``E_ij = E0_ij * r_i * prod_m (1 + scale * q^m_i . k^m_j)``, with r
    the product of the layers' gates and edge scales (Eqs. 5 and 7 unrolled). The output is
    ``softmax over neighbours of (scale * q_i . k_j * E_ij) @ value`` (Eqs. 4, 6, 7). A row without neighbours, or one
    that does not take part in a resolution, gives 0.

    Args:
        query, key: [B, K, N, d], N = M words and then P emotions.
        value: [B, K, N, dv].
        graph: who hears whom, and E0.
        history: one :class:`EdgeUpdate` per earlier layer, first layer first; all share ``scale`` and one d.
        scale: factor on the scores.
        receivers: "all", or "words" to compute the words' rows only.
        backend: "reference", "native", "triton"; None takes the fastest that can run the call.

    Returns:
        [B, K, N, dv], or [B, K, M, dv] with ``receivers="words"``, in the common type of query, key and value.

    Gradients reach query, key, value, the history's queries, keys, gates and edge scales, and the graph's
    emotion_weight and correlation.

    Raises:
        ValueError: a shape or a type that does not fit, or unknown ``receivers``.
        RuntimeError: the named backend cannot run the call.
    """
    if query.dim() != 4 or value.dim() != 4:
        raise ValueError(
            f"graph_attention: expected query [B, K, N, d] and value [B, K, N, dv], got {list(query.shape)} and "
            f"{list(value.shape)}"
        )
    if receivers not in ("all", "words"):
        raise ValueError(f"graph_attention: receivers: expected 'all' or 'words', got {receivers!r}")
    batch, resolutions, words, emotions = graph.shape
    leading = (batch, resolutions, words + emotions)
    check_shape("graph_attention", "query", query, (*leading, query.shape[3]))
    check_shape("graph_attention", "key", key, query.shape)
    check_shape("graph_attention", "value", value, (*leading, value.shape[3]))
    check_floats("graph_attention", query=query, key=key, value=value)
    check_history("graph_attention", history, leading, query.shape[3])

    kind = backends.autocast_type(query.device)
    if kind is not None:
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    history_query, history_key = past_nodes(history, kind)
    past = [EdgeUpdate(q, k, u.gate) for q, k, u in zip(history_query, history_key, history, strict=True)]
    chosen = backends.choose("graph_attention", backend, query, key, value, graph, past)
    result = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
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
    return output.to(result)
