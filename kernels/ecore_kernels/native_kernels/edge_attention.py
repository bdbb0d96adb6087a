"""Attention on any dense graph on a CPU: csrc/edge_attention_cpu.cpp, seen from torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ecore_kernels.layout import empty_rows, empty_saved
from ecore_kernels.native_kernels import (
    CPU,
    address,
    addresses,
    dense,
    heads,
    kernel,
    lies_ready,
    multiplies,
    number,
    strides,
)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor,
    neighbors: Tensor | None,
    factor: Tensor | None,
    scale: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernel.

    Args:
        query, key: [B, K, N, d], value [B, K, N, dv].
        edge: [B or 1, K or 1, N, N]; all tensors are of one type, neighbors excepted.
        neighbors: bool, [B or 1, K or 1, N, N]; None for a complete graph.
        factor: [B, K, N], what the updated edges of a receiver are multiplied by; None for no updated edges.

    Returns:
        output: [B, K, N, dv].
        new_edge: [B, K, N, N], 0 off the graph; empty without ``factor``.
        saved: [2, B, K, N], for the backward: the maximum of every receiver's scores (to base 2), and one over the sum
            of their powers (0 where there is no neighbour).
    """
    query, key, value, edge = (dense(x) for x in (query, key, value, edge))
    neighbors = None if neighbors is None else dense(neighbors)
    factor = None if factor is None else factor.contiguous()
    output = empty_rows(value, value.shape[2], value.shape[3], value.dtype)
    saved = empty_saved(query, 2)
    new_edge = query.new_empty((0,) if factor is None else (*query.shape[:3], query.shape[2]))
    _laid_out(query, key, value, edge, neighbors, output)(
        addresses((query, key, value, edge, neighbors)), [address(factor), 0], scale, address(saved), address(output),
        0 if factor is None else address(new_edge), torch.get_num_threads(),
    )  # fmt: skip
    return output, new_edge, saved


def bind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor,
    neighbors: Tensor | None,
    gate: Tensor | None,
    edge_scale: Any,
) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """Bind :func:`forward` to the layout of these tensors, for calls without a backward.

    Args:
        gate: None where no updated edges are wanted.

    Returns:
        (query, key, value, edge, neighbors, gate, edge_scale, scale) -> output and new_edge or None; None where a
        tensor in this layout has to be copied.
    """
    rows = (query, key, value, edge, *(() if neighbors is None else (neighbors,)))
    if not (lies_ready(rows) and multiplies((gate,), (edge_scale,), query.dtype)):
        return None
    template = empty_rows(value, value.shape[2], value.shape[3], value.dtype)
    run = _laid_out(query, key, value, edge, neighbors, template)
    shape, stride, kind = template.shape, template.stride(), template.dtype
    edge_shape = None if gate is None else (*query.shape[:3], query.shape[2])

    def call(
        query: Tensor, key: Tensor, value: Tensor, edge: Tensor, neighbors: Tensor | None, gate: Tensor | None,
        edge_scale: Any, scale: float,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        output = torch.empty_strided(shape, stride, dtype=kind, device=CPU)
        new_edge = None if edge_shape is None else torch.empty(edge_shape, dtype=kind, device=CPU)
        tensors, factors = (query, key, value, edge, neighbors), (gate, number(edge_scale, kind))
        run(
            addresses(tensors), addresses(factors), scale, 0, address(output), address(new_edge),
            torch.get_num_threads(),
        )  # fmt: skip
        return output, new_edge

    return call


def _laid_out(
    query: Tensor, key: Tensor, value: Tensor, edge: Tensor, neighbors: Tensor | None, output: Tensor
) -> Callable[..., None]:
    """The kernel on tensors laid out as these: (addresses, those of gate and edge scale, scale, ...)."""
    return kernel("bind_edge_attention_forward", query.dtype)(
        (*query.shape, value.shape[3]), [strides(x) for x in (query, key, value)], _shared(edge), _shared(neighbors),
        strides(output),
    )  # fmt: skip


def backward(
    grad_output: Tensor,
    grad_new_edge: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor,
    neighbors: Tensor | None,
    factor: Tensor | None,
    output: Tensor,
    saved: Tensor,
    scale: float,
    needs: list[bool],
    precision: str,
) -> list[Tensor]:
    """Run the backward kernel.

    Args:
        grad_output: the gradient of output, in its shape.
        grad_new_edge: the gradient of new_edge, in its shape; None for 0, or where there is no factor.
        output, saved: from :func:`forward`; the rest as it got them.
        needs: which of the gradients below are wanted, in their order.

    Returns:
        gradients of query, key, value, edge (in its shape and type) and factor, those alone that are needed.
    """
    batch, resolutions, nodes, dim = query.shape
    grads = [
        empty_rows(query, nodes, x.shape[3], x.dtype) if needed else None
        for x, needed in zip((query, key, value), needs, strict=False)
    ]
    # Of an empty batch the kernel writes nothing, but what batches share has a gradient then too: 0.
    allocate = edge.new_empty if batch * resolutions else edge.new_zeros
    grad_edge = allocate(edge.shape) if needs[3] else None
    grad_factor = saved.new_empty(query.shape[:3]) if needs[4] else None
    groups = edge.shape[:2] if needs[3] else (batch, resolutions)
    nodes_in = [dense(x) for x in (query, key, value)]
    edge, grad_output, output = dense(edge), dense(grad_output), dense(output)
    neighbors = None if neighbors is None else dense(neighbors)
    grad_new_edge = None if grad_new_edge is None else dense(grad_new_edge)
    factor = None if factor is None else factor.contiguous()
    kernel("edge_attention_backward", query.dtype)(
        (batch, resolutions, nodes, dim, value.shape[3]), [heads(x) for x in nodes_in], _matrices(edge),
        _matrices(neighbors), address(factor), scale, *_planes(saved), heads(output), heads(grad_output),
        _matrices(grad_new_edge), [heads(x) for x in grads], (address(grad_edge), *groups),
        address(grad_factor), torch.get_num_threads(),
    )  # fmt: skip
    return [x for x in (*grads, grad_edge, grad_factor) if x is not None]


def _shared(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """A [B or 1, K or 1, N, N] of any address, as the extension takes it."""
    if tensor is None:
        return 0, 0, 0, 0
    batch, head = (0 if tensor.shape[i] == 1 else tensor.stride(i) for i in (0, 1))
    return 0, batch, head, tensor.stride(2)


def _matrices(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """The same with its address."""
    return address(tensor), *_shared(tensor)[1:]


def _planes(saved: Tensor) -> tuple[int, int]:
    """The planes of what the forward leaves for the backward, as the extension takes them."""
    first = saved.data_ptr()
    return first, first + saved.stride(0) * saved.element_size()
