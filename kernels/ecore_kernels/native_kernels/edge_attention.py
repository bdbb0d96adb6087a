"""Attention on any dense graph on a CPU: csrc/edge_attention_cpu.cpp, seen from torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ecore_kernels.native_kernels import (
    address,
    addresses,
    heads,
    kernel,
    lies_ready,
    readable,
    repeatable,
    strides,
)


def _laid_out(tensors: Sequence[Any], output: Tensor) -> Callable[..., None]:
    """The forward kernel bound to the layout of its tensors: query, key, value, edge, neighbors."""
    query, key, value, edge, neighbors = tensors
    return kernel("bind_edge_attention_forward", query.dtype)(
        (*query.shape, value.shape[3]), [strides(x) for x in (query, key, value)], _shared(edge), _shared(neighbors),
        strides(output),
    )  # fmt: skip


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor,
    neighbors: Tensor | None,
    factor: Tensor | None,
    scale: float,
    precision: str,
    results: Sequence[Tensor],
) -> None:
    """Run the forward kernel."""
    tensors = [readable(x) for x in (query, key, value, edge, neighbors)]
    factor = readable(factor)
    output, new_edge, saved = results
    _laid_out(tensors, output)(
        addresses(tensors), [address(factor), 0], scale,
        addresses((output, None if factor is None else new_edge, saved)), torch.get_num_threads(),
    )  # fmt: skip


def bind(
    arguments: Sequence[Any],
    results: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    edge_scales: Sequence[Any],
) -> Callable[..., tuple[Tensor, ...]] | None:
    """Bind :func:`forward` to the layout of its arguments: see :func:`ecore_kernels.native_kernels.repeatable`.

    Returns:
        None where a tensor in this layout has to be copied. Without a gate the output is the only result.
    """
    *tensors, gate, _, _ = arguments
    if not lies_ready(tensors, gates, edge_scales):
        return None
    wanted = results[:1] if gate is None else results[:2]
    return repeatable(_laid_out(tensors, results[0]), wanted, 3 - len(wanted))


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
    results: Sequence[Tensor | None],
) -> None:
    """Run the backward kernel."""
    batch, resolutions, nodes, dim = query.shape
    *gradients, grad_edge, grad_factor = results
    if grad_edge is not None and not batch * resolutions:
        grad_edge.zero_()  # the kernel writes nothing of an empty batch, but what batches share has a gradient then too
    groups = (batch, resolutions) if grad_edge is None else edge.shape[:2]
    node_tensors = [readable(x) for x in (query, key, value)]
    edge, neighbors, factor, grad_output, output, grad_new_edge = (
        readable(x) for x in (edge, neighbors, factor, grad_output, output, grad_new_edge)
    )
    kernel("edge_attention_backward", query.dtype)(
        (batch, resolutions, nodes, dim, value.shape[3]), [heads(x) for x in node_tensors], _matrices(edge),
        _matrices(neighbors), address(factor), scale, *_planes(saved), heads(output), heads(grad_output),
        _matrices(grad_new_edge), [heads(x) for x in gradients], (address(grad_edge), *groups),
        address(grad_factor), torch.get_num_threads(),
    )  # fmt: skip


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
