"""Attention on any dense graph on a CPU: csrc/edge_attention_cpu.cpp, seen from torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ecore_kernels.layout import own_heads, sum_heads, sum_updated
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
from ecore_kernels.philox import threshold


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """B, H, Hk, Nq, Nk, d, dv."""
    batch, heads, receivers, dim = query.shape
    return batch, heads, key.shape[1], receivers, key.shape[2], dim, value.shape[3]


def _laid_out(tensors: Sequence[Any], output: Tensor, more: tuple[Any, ...] | None) -> Callable[..., None]:
    """The forward kernel bound to the layout of query, key, value, edge and neighbors, and of the bias in ``more``."""
    query, key, value, edge, neighbors = tensors[:5]
    return kernel("bind_edge_attention_forward", query.dtype)(
        _sizes(query, key, value), [strides(x) for x in (query, key, value)], _shared(edge), _shared(neighbors),
        strides(output), more,
    )  # fmt: skip


def _more(
    bias: Tensor | None,
    sender_gate: Tensor | None,
    edge_bias: Tensor | None,
    seed: Tensor | None,
    clamp: Sequence[float] | None,
    dropout: float,
    all_pairs: bool,
) -> tuple[Any, ...] | None:
    """Return the arguments besides edges, neighbours and a factor, as the extension takes them, or None."""
    # Not by ==: for a tensor it fails inside torch, which takes as long as a whole small call.
    if bias is sender_gate is edge_bias is seed is None and not clamp and not all_pairs:
        return None
    least = threshold(dropout)
    kept = (least, 1.0 / (1.0 - dropout)) if least < 2**32 else (2**32 - 1, 0.0)
    addresses_of = address(sender_gate), address(edge_bias), address(seed)  # a bound call gives others
    low, high = clamp or (-math.inf, math.inf)
    return _matrices(bias), addresses_of, (low, high), all_pairs, kept


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor | None,
    neighbors: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    sender_gate: Tensor | None,
    edge_bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    clamp: Sequence[float] | None,
    dropout: float,
    all_pairs: bool,
    with_lse: bool,
    precision: str,
    results: Sequence[Tensor],
) -> None:
    """Run the forward kernel."""
    tensors = [readable(x) for x in (query, key, value, edge, neighbors, bias)]
    factor, sender_gate = readable(factor), readable(sender_gate)
    output, new_edge, lse, saved = results
    _laid_out(tensors, output, _more(tensors[5], sender_gate, edge_bias, seed, clamp, dropout, all_pairs))(
        addresses((*tensors, sender_gate, edge_bias, seed)), [address(factor), 0], scale,
        addresses((output, None if factor is None else new_edge, lse if with_lse else None, saved)),
        torch.get_num_threads(),
    )  # fmt: skip


def bind(
    arguments: Sequence[Any],
    results: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    edge_scales: Sequence[Any],
) -> Callable[..., tuple[Tensor, ...]] | None:
    """Bind :func:`forward` to the layout of its arguments: see :func:`ecore_kernels.native_kernels.repeatable`.

    A call's tensors are query, key, value, edge, neighbors, bias, sender_gate, edge_bias and seed.

    Returns:
        None if a tensor in this layout has to be copied. The results are the output; new edges if there are gates; the
        logarithms of sums if they are wanted.
    """
    tensors, (sender_gate, edge_bias, seed) = arguments[:6], arguments[7:10]
    _, clamp, dropout, all_pairs, with_lse, _ = arguments[10:]
    if not lies_ready(tensors, (*gates, sender_gate), (*edge_scales, edge_bias)):
        return None
    output, new_edge, lse, _ = results
    run = _laid_out(
        tensors, output, _more(tensors[5], sender_gate, edge_bias, seed, clamp, dropout, all_pairs)
    )
    return repeatable(run, (output, new_edge if gates else None, lse if with_lse else None, None))


def backward(
    grad_output: Tensor,
    grad_new_edge: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor | None,
    neighbors: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    sender_gate: Tensor | None,
    edge_bias: Tensor | None,
    seed: Tensor | None,
    output: Tensor,
    saved: Tensor,
    scale: float,
    clamp: Sequence[float] | None,
    dropout: float,
    all_pairs: bool,
    needs: list[bool],
    precision: str,
    results: Sequence[Tensor | None],
) -> None:
    """Run the backward kernel."""
    grad_query, grad_key, grad_value, grad_edge, grad_bias, grad_factor, grad_sender_gate, grad_edge_bias = (
        results
    )
    grad_new_edge = None if factor is None else grad_new_edge
    sizes = _sizes(query, key, value)
    if 0 in sizes[:5]:  # the kernel writes nothing then, but what an empty batch shares has gradients, too
        for result in results:
            if result is not None:
                result.zero_()
        return
    of_key, of_value = own_heads(grad_key, query), own_heads(grad_value, query)
    node_tensors = [readable(x) for x in (query, key, value)]
    edge, neighbors, bias, factor, sender_gate, grad_output, output, grad_new_edge = (
        readable(x) for x in (edge, neighbors, bias, factor, sender_gate, grad_output, output, grad_new_edge)
    )
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    kernel("edge_attention_backward", query.dtype)(
        sizes, [heads(x) for x in node_tensors], _matrices(edge), _matrices(neighbors), address(factor), scale,
        _more(bias, sender_gate, edge_bias, seed, clamp, dropout, all_pairs), *_planes(saved), heads(output),
        heads(grad_output), _matrices(grad_new_edge), address(grad_lse),
        [heads(x) for x in (grad_query, of_key, of_value)], _gradient(grad_edge), _gradient(grad_bias),
        address(grad_factor), address(grad_sender_gate), torch.get_num_threads(),
    )  # fmt: skip
    sum_heads(of_key, grad_key)
    sum_heads(of_value, grad_value)
    sum_updated(grad_new_edge, None if all_pairs else neighbors, grad_edge_bias)


def _gradient(matrices: Tensor | None) -> tuple[int, int, int]:
    """A gradient [B or 1, H or 1, Nq, Nk] as the extension takes it."""
    return (0, 1, 1) if matrices is None else (address(matrices), *matrices.shape[:2])


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
    """The planes that the forward saves for the backward, as the extension takes them."""
    first = saved.data_ptr()
    return first, first + saved.stride(0) * saved.element_size()
