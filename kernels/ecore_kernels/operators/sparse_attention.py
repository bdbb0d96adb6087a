"""Attention over the neighbours of a sparse graph, with edge scalars and edge vectors."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from ecore_kernels import backends
from ecore_kernels.dtypes import common_type, kernel_type, node_type, weight_type
from ecore_kernels.edge_list import EdgeList
from ecore_kernels.operators import registration
from ecore_kernels.operators.batching import register_one_by_one
from ecore_kernels.operators.checks import check_floats, check_number, check_one_device, check_tensors

# In plain PyTorch ------------------------------------------------------------------------------------------


def _reference(
    scale: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor | None,
    bias: Tensor | None,
    key_scale: Tensor | None,
    key_offset: Tensor | None,
    value_offset: Tensor | None,
    sender: Tensor,
    receiver: Tensor,
) -> Tensor:
    """Gather, softmax by receiver, scatter: the output [N, H, dv], in the type of value."""
    number = weight_type(node_type([query, key, value], edge, bias))
    keys = key.to(number)[sender]  # [E, H, d]
    keys = keys if key_scale is None else keys * key_scale
    keys = keys if key_offset is None else keys + key_offset
    score = scale * (query.to(number)[receiver] * keys).sum(-1)  # [E, H]
    score = score if edge is None else score * edge
    score = score if bias is None else score + bias
    to = receiver[:, None].expand_as(score)
    least = score.new_full((query.shape[0], score.shape[1]), -math.inf)
    highest = least.scatter_reduce(0, to, score.detach(), "amax")
    weight = (score - highest[receiver]).exp()
    total = torch.zeros_like(highest).index_add(0, receiver, weight)
    values = value.to(number)[sender]  # [E, H, dv]
    values = values if value_offset is None else values + value_offset
    heard = weight[:, :, None] * values / total[receiver][:, :, None]
    output = heard.new_zeros(query.shape[0], *values.shape[1:]).index_add(0, receiver, heard)
    return output.to(value.dtype)


# On fused kernels -------------------------------------------------------------------------------------------

_GRAPH = (
    "Tensor sender, Tensor receiver, Tensor receiver_begin, Tensor by_receiver, Tensor sender_begin, "
    "Tensor by_sender"
)
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? edge, Tensor? bias, Tensor? key_scale, Tensor? key_offset, "
    f"Tensor? value_offset, {_GRAPH}"
)
registration.library.define(
    f"fused_sparse_attention({_INPUTS}, float scale, str backend) -> (Tensor output, Tensor weight)"
)
registration.library.define(
    f"fused_sparse_attention_backward(Tensor grad_output, {_INPUTS}, Tensor weight, float scale, bool[] needs, "
    "str backend) -> Tensor[]"
)
_DIFFERENTIABLE = 8
"""Tensors that may have a gradient, the first of a call's."""


def _results(query, key, value, edge, bias, key_scale, key_offset, value_offset, sender, *graph_and_scale):
    """Allocate the results of the forward.

    Args:
        query: [N, H, d], key [M, H, d], value [M, H, dv], of one type.
        edge, bias: [E, H]; key_scale, key_offset [E, H, d]; value_offset [E, H, dv]; of that type, or of the type of
            edge weights beside it, or None.
        sender and what follows: of :class:`EdgeList`; and the factor on scores.

    Returns:
        output: [N, H, dv].
        weight: [E, H], the softmax, for the backward, in the type of edge weights.
    """
    receivers, heads, _ = query.shape
    weight = query.new_empty(sender.shape[0], heads, dtype=weight_type(query.dtype))
    return value.new_empty(receivers, heads, value.shape[2]), weight


def _gradients(
    grad_output,
    query,
    key,
    value,
    edge,
    bias,
    key_scale,
    key_offset,
    value_offset,
    sender,
    receiver,
    receiver_begin,
    by_receiver,
    sender_begin,
    by_sender,
    weight,
    scale,
    needs,
):
    """Allocate the results of the backward: gradients in their tensors' shapes, None for those not needed."""
    inputs = (query, key, value, edge, bias, key_scale, key_offset, value_offset)
    return [
        x.new_empty(x.shape) if needed and x is not None else None
        for x, needed in zip(inputs, needs, strict=True)
    ]


registration.register("sparse_attention", "forward", _results)
registration.register("sparse_attention", "backward", _gradients)
register_one_by_one("sparse_attention")


def _forward(setting, tensors):
    return registration.run("sparse_attention", "forward", tensors, (*tensors, *setting))


def _backward(setting, needs, gradients, tensors, kept):
    scale, backend = setting
    arguments = (*gradients, *tensors, *kept, scale, list(needs[:_DIFFERENTIABLE]), backend)
    return registration.run("sparse_attention", "backward", (*gradients, *tensors), arguments)


registration.OPERATORS["sparse_attention"] = registration.FusedOperator(
    _forward,
    _backward,
    lambda setting, tensors: (_reference(setting[0], *tensors[:10]),),
    1,
    (1,),
    lambda _: ["query", "key", "value", "edge", "bias", "key_scale", "key_offset", "value_offset"],
)


# The public function -----------------------------------------------------------------------------------------


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edges: EdgeList,
    *,
    edge: Tensor | None = None,
    bias: Tensor | None = None,
    key_scale: Tensor | None = None,
    key_offset: Tensor | None = None,
    value_offset: Tensor | None = None,
    scale: float | None = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Attention of every receiver to the senders of its edges, with memory linear in the number of edges.

    For an edge e from j to i: ``x_e = scale * q_i . (k_j * key_scale_e + key_offset_e) * edge_e + bias_e``;
    ``output_i = sum_e softmax_i(x)_e (v_j + value_offset_e)``, the softmax over the edges to i. A receiver without
    edges gets 0. PyTorch Geometric's ``TransformerConv`` is this with ``key_offset = value_offset`` and scale
    1 / sqrt(d).

    Args:
        query: [N, H, d]: receivers, heads, head size.
        key: [M, H, d], of the senders.
        value: [M, H, dv].
        edges: the graph, N receivers and M senders, E edges.
        edge, bias: [E] or [E, H], which multiply an edge's score and are added to it.
        key_scale, key_offset: broadcast to [E, H, d]: edge vectors on the key.
        value_offset: broadcasts to [E, H, dv]: edge vectors on the value.
        scale: factor on the scores; None means 1 / sqrt(d).
        backend: "reference", "native", "triton"; None takes the fastest that can run the call.

    Returns:
        [N, H, dv], in the common type of query, key and value.

    Gradients reach all tensors, and can be differentiated twice; those of the fused kernels are the same bits on every
    run.

    Raises:
        ValueError: a shape or a type that does not fit.
        RuntimeError: the named backend cannot run the call.
    """
    _check(query, key, value, edges, edge, bias, key_scale, key_offset, value_offset, scale)
    if scale is None:
        scale = max(query.shape[2], 1) ** -0.5
    kind = backends.autocast_type(query.device)
    nodes = [backends.autocast(x, kind) for x in (query, key, value)]
    of_edges = [
        None if x is None else _expanded(name, x, _shape_of(name, query, value, edges))
        for name, x in zip(_OF_EDGES, (edge, bias, key_scale, key_offset, value_offset), strict=True)
    ]
    chosen = backends.choose(
        "sparse_attention", backend, *nodes, edges, **dict(zip(_OF_EDGES, of_edges, strict=True))
    )
    result = common_type(*nodes)
    device = query.device.type
    with torch.autocast(device, enabled=False) if kind is not None else _NOTHING:
        if chosen == "reference":
            number = node_type(nodes, *of_edges)
            given: Any = [*(x.to(number) for x in nodes), *of_edges, edges.sender, edges.receiver]
            return _reference(float(scale), *given).to(result)
        number = kernel_type(node_type(nodes, *of_edges), chosen)
        given_edges = [None if x is None else x.to(_edge_type(x.dtype, number)) for x in of_edges]
        (output, *_) = registration.apply(
            "sparse_attention",
            (float(scale), chosen),
            *registration.apart(nodes, number),
            *given_edges,
            edges.sender,
            edges.receiver,
            edges.receiver_begin,
            edges.by_receiver,
            edges.sender_begin,
            edges.by_sender,
        )
    return registration.as_type(output, result)


_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
_OF_EDGES = ("edge", "bias", "key_scale", "key_offset", "value_offset")


def _edge_type(kind: torch.dtype, number: torch.dtype) -> torch.dtype:
    """The type in which kernels for nodes of type ``number`` take a tensor of edges: its own, if they take that."""
    return number if kind is number else weight_type(number)


def _shape_of(name: str, query: Tensor, value: Tensor, edges: EdgeList) -> tuple[int, ...]:
    pairs = len(edges), query.shape[1]
    return {"edge": pairs, "bias": pairs, "value_offset": (*pairs, value.shape[2])}.get(
        name, (*pairs, query.shape[2])
    )


def _expanded(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of edges in its full shape, as a view."""
    if tensor.dim() == 1 and len(shape) == 2:
        tensor = tensor[:, None]
    try:
        return tensor.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"sparse_attention: {name}: expected a shape that broadcasts to {list(shape)}, got {list(tensor.shape)}"
        ) from None


def _check(
    query: Any,
    key: Any,
    value: Any,
    edges: Any,
    edge: Any = None,
    bias: Any = None,
    key_scale: Any = None,
    key_offset: Any = None,
    value_offset: Any = None,
    scale: Any = 1.0,
    **_: Any,
) -> None:
    """Raise ValueError unless the arguments fit each other."""
    check_floats("sparse_attention", query=query, key=key, value=value)
    if not isinstance(edges, EdgeList):
        raise ValueError(f"sparse_attention: edges: expected an EdgeList, got {type(edges).__name__}")
    if scale is not None:
        check_number("sparse_attention", "scale", scale)
    n, m = edges.receivers, edges.senders
    if query.dim() != 3 or value.dim() != 3 or query.shape[0] != n:
        raise ValueError(
            f"sparse_attention: expected query [{n}, H, d] and value [{m}, H, dv], got {list(query.shape)} and "
            f"{list(value.shape)}"
        )
    for name, tensor, width in (("key", key, query.shape[2]), ("value", value, value.shape[2])):
        if tuple(tensor.shape) != (m, query.shape[1], width):
            raise ValueError(
                f"sparse_attention: {name}: expected {[m, query.shape[1], width]}, got {list(tensor.shape)}"
            )
    given = {
        "edge": edge,
        "bias": bias,
        "key_scale": key_scale,
        "key_offset": key_offset,
        "value_offset": value_offset,
    }
    given = {name: x for name, x in given.items() if x is not None}
    check_tensors("sparse_attention", **given)
    for name, x in given.items():
        _expanded(name, x, _shape_of(name, query, value, edges))
    check_one_device("sparse_attention", query, key, value, *given.values(), edges.sender)


backends.register("sparse_attention", sparse_attention, _check)
