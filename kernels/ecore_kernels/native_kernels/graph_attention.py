"""Attention on the emotion graph on a CPU: csrc/graph_attention_cpu.cpp, seen from torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ecore_kernels.layout import sum_resolutions
from ecore_kernels.native_kernels import (
    address,
    addresses,
    check_sizes,
    graph_arguments,
    graph_sizes,
    heads,
    kernel,
    lies_ready,
    readable,
    repeatable,
    strides,
)


def _laid_out(tensors: Sequence[Any], layers: int, words_only: bool, output: Tensor) -> Callable[..., None]:
    """The forward kernel bound to the layout of its tensors, those from query to the history's keys."""
    query, key, value, _, word_mask, _, correlation, _, *past = tensors
    queries, keys = (query, *past[:layers]), (key, *past[layers:])
    return kernel("bind_graph_attention_forward", value.dtype)(
        graph_sizes(word_mask, correlation), [strides(x) for x in queries], [strides(x) for x in keys], strides(value),
        query.shape[3], value.shape[3], words_only, strides(output),
    )  # fmt: skip


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    word_weight: Tensor,
    word_mask: Tensor,
    emotion_weight: Tensor,
    correlation: Tensor,
    emotion_mask: Tensor | None,
    history_query: Sequence[Tensor],
    history_key: Sequence[Tensor],
    row_factor: Tensor | None,
    scale: float,
    words_only: bool,
    precision: str,
    results: Sequence[Tensor],
) -> None:
    """Run the forward kernel."""
    check_sizes("graph_attention", word_mask, query.shape[2] - word_mask.shape[2])
    graph = (word_weight, word_mask, emotion_weight, correlation, emotion_mask)
    tensors = [readable(x) for x in (query, key, value, *graph, *history_query, *history_key)]
    factor = readable(row_factor)
    _laid_out(tensors, len(history_query), words_only, results[0])(
        addresses(tensors), [address(factor), 0], scale, addresses(results), torch.get_num_threads()
    )


def bind(
    arguments: Sequence[Any],
    results: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    edge_scales: Sequence[Any],
) -> Callable[..., tuple[Tensor, ...]] | None:
    """Bind :func:`forward` to the layout of its arguments: see :func:`ecore_kernels.native_kernels.repeatable`.

    Returns:
        None if a tensor in this layout has to be copied.
    """
    *nodes_and_graph, history_query, history_key, _, _, words_only, _ = arguments
    tensors = (*nodes_and_graph, *history_query, *history_key)
    if not lies_ready(tensors, gates, edge_scales):
        return None
    output, _ = results
    return repeatable(_laid_out(tensors, len(history_query), words_only, output), [output, None])


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    word_mask: Tensor,
    correlation: Tensor,
    emotion_mask: Tensor | None,
    history_query: Sequence[Tensor],
    history_key: Sequence[Tensor],
    row_factor: Tensor | None,
    output: Tensor,
    saved: Tensor,
    scale: float,
    words_only: bool,
    needs: list[bool],
    precision: str,
    results: Sequence[Tensor | None],
) -> None:
    """Run the backward kernel, and sum its results over resolutions."""
    layers, emotions = len(history_query), correlation.shape[-1]
    check_sizes("graph_attention", word_mask, query.shape[2] - word_mask.shape[2])
    *gradients, grad_row_factor, grad_emotion_weight, grad_correlation = results
    grad_queries, grad_keys = (
        [gradients[0], *gradients[3 : 3 + layers]],
        [gradients[1], *gradients[3 + layers :]],
    )
    apart = query.shape[:2]
    by_weight = None if grad_emotion_weight is None else saved.new_empty((*apart, emotions))
    by_correlation = None
    if grad_correlation is not None and words_only:  # edges from emotions to words have emotion_weight alone
        grad_correlation.zero_()
    elif grad_correlation is not None:
        by_correlation = saved.new_empty((*apart, emotions, emotions))
    queries = [readable(x) for x in (query, *history_query)]
    keys = [readable(x) for x in (key, *history_key)]
    value, grad_output, output = readable(value), readable(grad_output), readable(output)
    word_mask, correlation, emotion_mask, row_factor = (
        readable(x) for x in (word_mask, correlation, emotion_mask, row_factor)
    )
    kernel("graph_attention_backward", query.dtype)(
        graph_arguments(word_mask, emotion_mask, correlation),
        [heads(x) for x in queries], [heads(x) for x in keys], heads(value), query.shape[3], value.shape[3],
        address(row_factor), scale, words_only, _planes(saved),
        heads(output), heads(grad_output), [heads(x) for x in grad_queries], [heads(x) for x in grad_keys],
        heads(gradients[2]), address(grad_row_factor), address(by_weight), address(by_correlation),
        torch.get_num_threads(),
    )  # fmt: skip
    sum_resolutions(by_weight, grad_emotion_weight)
    sum_resolutions(by_correlation, grad_correlation)


def _planes(saved: Tensor) -> tuple[int, ...]:
    """The planes that the forward saves for the backward, as the extension takes them."""
    first, plane = saved.data_ptr(), saved.stride(0) * saved.element_size()
    return first, first + plane, first + 2 * plane, first + 3 * plane, first + 4 * plane
