"""Attention on any dense graph on fused kernels: the registered operators, their results, and autograd around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ecore_kernels import reference
from ecore_kernels.dtypes import kernel_type, node_type, weight_type
from ecore_kernels.layout import empty_rows, empty_saved
from ecore_kernels.operators import batching, registration

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? edge, Tensor? neighbors, Tensor? bias, Tensor? factor, "
    "Tensor? sender_gate, Tensor? edge_bias, Tensor? seed"
)
_NUMBERS = "float scale, float[]? clamp, float dropout, bool all_pairs"
registration.library.define(
    f"fused_edge_attention({_INPUTS}, {_NUMBERS}, bool with_lse, str precision, str backend) -> "
    "(Tensor output, Tensor new_edge, Tensor lse, Tensor saved)"
)
registration.library.define(
    f"fused_edge_attention_backward(Tensor grad_output, Tensor? grad_new_edge, Tensor? grad_lse, {_INPUTS}, "
    f"Tensor output, Tensor saved, {_NUMBERS}, bool[] needs, str precision, str backend) -> Tensor[]"
)


def _results(
    query, key, value, edge, neighbors, bias, factor, sender_gate, edge_bias, seed, scale, clamp, dropout, all_pairs,
    with_lse, precision,
):  # fmt: skip
    """Allocate the results of the forward.

    Args:
        query: [B, H, Nq, d], key [B, Hk, Nk, d], value [B, Hk, Nk, dv], of one type; Hk divides H.
        edge: [B or 1, H or 1, Nq, Nk]; None for 1.
        neighbors: bool, [B or 1, H or 1, Nq, Nk]; None for a complete graph.
        bias: [B or 1, H or 1, Nq, Nk], added to the weighted scores; None for 0.
        factor: [B, H, Nq], what the updated edges of a receiver are multiplied by; None for no updated edges.
        sender_gate: [B, H, Nk], a factor on the scores; None for 1.
        edge_bias: [], added to updated edges; None for 0.
        seed: int64 [] of the dropout; None for none.
        clamp: bounds of scores; None or empty for none.
        all_pairs: whether edges off the graph are updated too.
        with_lse: whether ``lse`` is wanted.
        precision: "ieee" or "tf32", for float32 on a GPU.

    Returns:
        output: [B, H, Nq, dv], in the type of value.
        new_edge: [B, H, Nq, Nk], float32 (float64 where query is); empty without ``factor``.
        lse: [B, H, Nq], the logarithm of every receiver's sum, in the type of new_edge; empty unless it is wanted.
        saved: [2, B, H, Nq], for the backward: every receiver's largest exponent to base 2, and one over the sum of its
            softmax, which is 0 without a neighbour.
    """
    batch, heads, receivers = query.shape[:3]
    number = weight_type(query.dtype)
    return (
        empty_rows(value, receivers, value.shape[3], value.dtype, heads),
        query.new_empty((0,) if factor is None else (batch, heads, receivers, key.shape[2]), dtype=number),
        query.new_empty((batch, heads, receivers) if with_lse else (0,), dtype=number),
        empty_saved(query, 2),
    )


def _gradients(
    grad_output, grad_new_edge, grad_lse, query, key, value, edge, neighbors, bias, factor, sender_gate, edge_bias,
    seed, output, saved, scale, clamp, dropout, all_pairs, needs, precision,
):  # fmt: skip
    """Allocate the results of the backward.

    Args:
        grad_output: the gradient of output, in its shape.
        grad_new_edge: the gradient of new_edge, in its shape; None for 0, or where there is no factor.
        grad_lse: the gradient of lse; None for 0.
        output, saved: from the forward; the other arguments are the forward's.
        needs: which of the gradients below are wanted, in their order; for the others nothing is computed.

    Returns:
        gradients of query, key, value, edge and bias (in their shapes and types), factor, sender_gate and edge_bias;
        None for those that are not needed.
    """
    rows = [
        empty_rows(query, x.shape[2], x.shape[3], x.dtype, x.shape[1]) if needed else None
        for x, needed in zip((query, key, value), needs[:3], strict=True)
    ]
    return rows + [
        x.new_empty(x.shape) if needed else None
        for x, needed in zip((edge, bias, factor, sender_gate, edge_bias), needs[3:], strict=True)
    ]


registration.register("edge_attention", "forward", _results)
registration.register("edge_attention", "backward", _gradients)
batching.register("edge_attention", {"edge": 3, "bias": 4})


def _inputs(tensors):
    """The inputs of the registered operators in their order, from the flat tensors of the autograd function."""
    query, key, value, edge, bias, factor, sender_gate, edge_bias, neighbors, seed = tensors
    return query, key, value, edge, neighbors, bias, factor, sender_gate, edge_bias, seed


def _forward(setting, tensors):
    return registration.run("edge_attention", "forward", tensors, (*_inputs(tensors), *setting))


def _backward(setting, needs, gradients, tensors, kept):
    *numbers, with_lse, precision, backend = setting
    grad_output, grad_new_edge, grad_lse = gradients
    if grad_output is None:
        grad_output = torch.zeros_like(kept[0])
    inputs = _inputs(tensors)
    # torch.compile makes gradients of zeros for results that are not wanted; they are empty, as those are.
    if inputs[6] is None:
        grad_new_edge = None
    if not with_lse:
        grad_lse = None
    arguments = (
        grad_output, grad_new_edge, grad_lse, *inputs, *kept, *numbers, list(needs[:8]), precision, backend,
    )  # fmt: skip
    return registration.run("edge_attention", "backward", (*gradients, *tensors), arguments)


def _reference(setting, tensors):
    query, key, value, edge, neighbors, bias, factor, *rest = _inputs(tensors)
    sender_gate, edge_bias, seed = rest
    scale, *options = setting[:5]
    results = reference.edge_attention(
        query, key, value, edge, neighbors, factor, None, scale, bias, edge_bias, sender_gate, seed, *options
    )
    return tuple(query.new_empty(0) if x is None else x for x in results)


_FLAT = (
    "query", "key", "value", "edge", "bias", "factor", "sender_gate", "edge_bias", "neighbors", "seed",
)  # fmt: skip
registration.OPERATORS["edge_attention"] = registration.FusedOperator(
    _forward,
    _backward,
    _reference,
    3,
    (0, 3),
    lambda _: list(_FLAT),
)


def fused_edge_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor | None,
    neighbors: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    sender_gate: Tensor | None,
    edge_bias: Tensor | float | None,
    seed: Tensor | None,
    numbers: tuple[Any, ...],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`ecore_kernels.edge_attention` on a backend's fused kernels.

    Args:
        query, key, value, sender_gate, edge_bias: as for :func:`ecore_kernels.edge_attention`.
        edge, neighbors, bias: [1 or B, 1 or H, Nq, Nk]; a size of 1 is shared.
        factor: [B, H, Nq], gate * edge_scale; None for no new edges.
        seed: int64 of no dimensions; None for no dropout.
        numbers: scale, clamp, dropout, whether all pairs are updated, whether lse is wanted.

    Returns:
        output [B, H, Nq, dv], in the type that values are multiplied in; new_edge [B, H, Nq, Nk], empty without
        ``factor``; lse [B, H, Nq], empty unless it is wanted.
    """
    nodes = [query, key, value]
    kind = kernel_type(node_type(nodes, edge, bias, factor, sender_gate), backend)
    number = weight_type(kind)
    if edge_bias is not None:
        edge_bias = torch.as_tensor(edge_bias, device=query.device, dtype=number).reshape(())
    output, new_edge, lse, _ = registration.apply(
        "edge_attention",
        (*numbers, registration.precision(backend), backend),
        *registration.apart(nodes, kind),
        *(None if x is None else registration.as_type(x, number) for x in (edge, bias, factor, sender_gate)),
        edge_bias,
        neighbors,
        seed,
    )
    return output, new_edge, lse
