"""Attention whose scores are multiplied by edge weights, on any dense graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ecore_kernels import backends, reference
from ecore_kernels.dtypes import common_type, kernel_type, node_type, weight_type
from ecore_kernels.layout import empty_rows, empty_saved
from ecore_kernels.operators import batching, registration
from ecore_kernels.operators.checks import (
    check_floats,
    check_gate,
    check_one_device,
    check_shape,
    check_tensors,
)
from ecore_kernels.operators.history import EdgeUpdate, row_factor
from ecore_kernels.operators.plans import (
    Plan,
    bound_forward,
    runs_at_once,
    score_scale,
    settled,
    takes_as_they_are,
    without_autocast,
)

# In plain PyTorch ------------------------------------------------------------------------------------------


registration.library.define(
    "edge_attention(Tensor query, Tensor key, Tensor value, Tensor edge, Tensor? neighbors, Tensor? gate, "
    "Tensor? edge_scale, float scale) -> (Tensor, Tensor)"
)


def _composite(
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


# Composite: autograd, torch.func and torch.compile see through the operator to the PyTorch that it is made of.
registration.library.impl("edge_attention", _composite, "CompositeImplicitAutograd")
registration.library.impl("edge_attention", _composite, "FuncTorchBatchedDecomposition")


# On fused kernels -------------------------------------------------------------------------------------------


registration.library.define(
    "fused_edge_attention(Tensor query, Tensor key, Tensor value, Tensor edge, Tensor? neighbors, Tensor? factor, "
    "float scale, str precision, str backend) -> (Tensor output, Tensor new_edge, Tensor saved)"
)
registration.library.define(
    "fused_edge_attention_backward(Tensor grad_output, Tensor? grad_new_edge, Tensor query, Tensor key, Tensor value, "
    "Tensor edge, Tensor? neighbors, Tensor? factor, Tensor output, Tensor saved, float scale, bool[] needs, "
    "str precision, str backend) -> Tensor[]"
)


def _results(query, key, value, edge, neighbors, factor, scale, precision):
    """Allocate the results of the forward.

    Args:
        query, key: [B, K, N, d], value [B, K, N, dv], of one type.
        edge: [B or 1, K or 1, N, N].
        neighbors: bool, [B or 1, K or 1, N, N]; None for a complete graph.
        factor: [B, K, N], what the updated edges of a receiver are multiplied by; None for no updated edges.
        precision: "ieee" or "tf32", for float32 on a GPU.

    Returns:
        output: [B, K, N, dv], in the type of value.
        new_edge: [B, K, N, N], 0 off the graph, float32 (float64 where query is); empty without ``factor``.
        saved: [2, B, K, N], for the backward: every receiver's largest exponent to base 2, and one over the sum of its
            softmax. The backends agree on neither where there is no neighbour.
    """
    batch, resolutions, nodes = query.shape[:3]
    new_edge = (0,) if factor is None else (batch, resolutions, nodes, nodes)
    return (
        empty_rows(value, nodes, value.shape[3], value.dtype),
        query.new_empty(new_edge, dtype=weight_type(query.dtype)),
        empty_saved(query, 2),
    )


def _gradients(
    grad_output,
    grad_new_edge,
    query,
    key,
    value,
    edge,
    neighbors,
    factor,
    output,
    saved,
    scale,
    needs,
    precision,
):
    """Allocate the results of the backward.

    Args:
        grad_output: the gradient of output, in its shape.
        grad_new_edge: the gradient of new_edge, in its shape; None for 0, or where there is no factor.
        output, saved: from the forward; the rest as it got them.
        needs: which of the gradients below are wanted, in their order; for the others nothing is computed.

    Returns:
        gradients of query, key, value, edge (in its shape and type) and factor; None for those that are not needed.
    """
    gradients = [
        empty_rows(query, query.shape[2], x.shape[3], x.dtype) if needed else None
        for x, needed in zip((query, key, value), needs[:3], strict=True)
    ]
    gradients.append(edge.new_empty(edge.shape) if needs[3] else None)
    gradients.append(saved.new_empty(query.shape[:3]) if needs[4] else None)
    return gradients


registration.register("edge_attention", "forward", _results)
registration.register("edge_attention", "backward", _gradients)
batching.register("edge_attention", "edge", place=3)


def _forward(setting, tensors):
    query, key, value, edge, factor, neighbors = tensors
    arguments = (query, key, value, edge, neighbors, factor, *setting)
    return registration.run("edge_attention", "forward", tensors, arguments)


def _backward(setting, needs, gradients, tensors, kept):
    scale, precision, backend = setting
    query, key, value, edge, factor, neighbors = tensors
    grad_output, grad_new_edge = gradients
    if grad_output is None:
        grad_output = torch.zeros_like(kept[0])
    arguments = (
        grad_output, None if factor is None else grad_new_edge, query, key, value, edge, neighbors, factor, *kept,
        scale, list(needs[:5]), precision, backend,
    )  # fmt: skip
    return registration.run("edge_attention", "backward", (*gradients, *tensors), arguments)


def _reference(setting, tensors):
    scale, _, _ = setting
    query, key, value, edge, factor, neighbors = tensors
    one = None if factor is None else factor.new_ones(())
    output, new_edge = reference.edge_attention(query, key, value, edge, neighbors, factor, one, scale)
    return output, output.new_empty(0) if new_edge is None else new_edge


registration.OPERATORS["edge_attention"] = registration.FusedOperator(
    _forward,
    _backward,
    _reference,
    2,
    (0, 2),
    lambda _: ["query", "key", "value", "edge", "factor", "neighbors"],
)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor,
    neighbors: Tensor | None,
    factor: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """:func:`ecore_kernels.edge_attention` on a backend's fused kernels.

    Args:
        query, key, value: as there.
        edge, neighbors: [1 or B, 1 or K, N, N]; a size of 1 is shared. No neighbors: the graph is complete.
        factor: [B, K, N], gate * edge_scale; None for no new edges.
        scale: factor on the scores.

    Returns:
        output [B, K, N, dv], in the type that values are multiplied in; new_edge [B, K, N, N], empty without
        ``factor``.
    """
    nodes = [query, key, value]
    kind = kernel_type(node_type(nodes, edge, factor), backend)
    number = weight_type(kind)
    output, new_edge, _ = registration.apply(
        "edge_attention",
        (scale, registration.precision(backend), backend),
        *registration.apart(nodes, kind),
        registration.as_type(edge, number),
        None if factor is None else registration.as_type(factor, number),
        neighbors,
    )
    return output, new_edge


# The public function -----------------------------------------------------------------------------------------


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
    plan = settled(_plans, tensors, backend, lambda: _plan(*tensors, backend))
    full = (*query.shape[:3], query.shape[2])
    edge = _broadcastable("edge", edge, full)
    if neighbors is not None:
        neighbors = _broadcastable("neighbors", neighbors, full)
    if scale.__class__ is float and runs_at_once(plan):
        if plan.bound is not None:
            if gate is None:
                return plan.bound((query, key, value, edge, neighbors), (), (), scale)[0], None
            return plan.bound((query, key, value, edge, neighbors), (gate,), (edge_scale,), scale)
        factor = None if gate is None else row_factor(((None, None, gate, edge_scale),))
        arguments = (
            query, key, value, edge, neighbors, factor, scale, registration.precision(plan.backend), plan.backend,
        )  # fmt: skip
        output, new_edge, _ = registration.compute("edge_attention", "forward", arguments)
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
            output, new_edge = _fused(query, key, value, edge, neighbors, factor, scale, chosen)
    if output.dtype is not plan.result:
        output = output.to(plan.result)
    return output, None if gate is None else new_edge


_plans: dict[Any, Plan] = {}


def _check(
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


def _plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor,
    neighbors: Tensor | None,
    gate: Tensor | None,
    edge_scale: Tensor | float | None,
    backend: str | None,
) -> Plan:
    _check(query, key, value, edge, neighbors, gate, edge_scale)
    kind = backends.autocast_type(query.device)
    nodes = [backends.autocast(x, kind) for x in (query, key, value)]
    chosen = backends.choose("edge_attention", backend, *nodes, edge, neighbors, gate=gate)
    if chosen != "reference":
        check_one_device("edge_attention", query, key, value, edge, neighbors, gate)
    as_they_are, bound = False, None
    if kind is None:
        as_they_are = takes_as_they_are(chosen, nodes, (edge, gate), (neighbors,), (edge_scale,))
    if as_they_are:
        full = (*query.shape[:3], query.shape[2])
        shared = None if neighbors is None else _broadcastable("neighbors", neighbors, full)
        arguments = (*nodes, _broadcastable("edge", edge, full), shared, gate, 1.0, "ieee")
        bound = bound_forward("edge_attention", chosen, arguments, (gate,), (edge_scale,))
    return Plan(chosen, kind, common_type(*nodes), as_they_are, bound)


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


backends.register("edge_attention", edge_attention, _check)
