"""Attention on any dense graph on a CPU: csrc/edge_attention_cpu.cpp, seen from torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ecore_kernels.layout import asked, empty_rows, empty_saved
from ecore_kernels.native_kernels import address, dense, heads, kernel

TASKS = 16  # what shares an edge is cut in so many tasks in all: enough threads can then add up its gradient


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
        saved: [2, B, K, N], for the backward: logarithm to base 2 of every softmax denominator (0 where there is no
            neighbour), nothing.
    """
    batch, resolutions, nodes, dim = query.shape
    output = empty_rows(value, nodes, value.shape[3], value.dtype)
    saved = empty_saved(query, 2)
    log_normalizer = saved[0]
    new_edge = query.new_empty((0,) if factor is None else (batch, resolutions, nodes, nodes))
    nodes_in = [dense(x) for x in (query, key, value)]
    edge = dense(edge)
    neighbors = None if neighbors is None else dense(neighbors)
    factor = None if factor is None else factor.contiguous()
    kernel("edge_attention_forward", query.dtype)(
        (batch, resolutions, nodes, dim, value.shape[3]), [heads(x) for x in nodes_in], _matrices(edge),
        _matrices(neighbors), address(factor), scale, address(log_normalizer), heads(output),
        0 if factor is None else address(new_edge), torch.get_num_threads(),
    )  # fmt: skip
    return output, new_edge, saved


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
    log_normalizer, needs_edge = saved[0], needs[3]
    batch, resolutions, nodes, dim = query.shape
    gradients = [empty_rows(query, nodes, x.shape[3], x.dtype) for x in (query, key, value)]
    # An edge that several (b, k) share gets their gradients one after the other, in a few sums, one a task.
    groups = edge.shape[:2] if needs_edge else (batch, resolutions)
    alike = (batch * resolutions) // max(1, groups[0] * groups[1])
    shares = max(1, min(alike, TASKS // max(1, groups[0] * groups[1])))
    # Of an empty batch the kernel writes nothing, but what batches share has a gradient then too: 0.
    allocate = edge.new_empty if batch * resolutions else edge.new_zeros
    grad_edge = allocate((*groups, shares, nodes, nodes)) if needs_edge else None
    grad_factor = None if factor is None else torch.empty_like(log_normalizer)
    nodes_in = [dense(x) for x in (query, key, value)]
    edge, grad_output, output = dense(edge), dense(grad_output), dense(output)
    neighbors = None if neighbors is None else dense(neighbors)
    grad_new_edge = None if grad_new_edge is None else dense(grad_new_edge)
    factor = None if factor is None else factor.contiguous()
    kernel("edge_attention_backward", query.dtype)(
        (batch, resolutions, nodes, dim, value.shape[3]), [heads(x) for x in nodes_in], _matrices(edge),
        _matrices(neighbors), address(factor), scale, address(log_normalizer), heads(output), heads(grad_output),
        _matrices(grad_new_edge), [heads(x) for x in gradients], (address(grad_edge), *groups, shares),
        address(grad_factor), torch.get_num_threads(),
    )  # fmt: skip
    if grad_edge is not None:
        grad_edge = grad_edge.sum(2) if shares > 1 else grad_edge[:, :, 0]
    return asked([*gradients, grad_edge, grad_factor], needs)


def _matrices(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """A [B or 1, K or 1, N, N] as the extension takes it: address, strides over B, K and N; 0 where it is shared."""
    if tensor is None:
        return 0, 0, 0, 0
    batch, head = (0 if tensor.shape[i] == 1 else tensor.stride(i) for i in (0, 1))
    return tensor.data_ptr(), batch, head, tensor.stride(2)
