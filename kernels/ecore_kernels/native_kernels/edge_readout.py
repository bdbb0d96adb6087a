"""Readout of the last edges' emotion columns on a CPU: csrc/edge_readout_cpu.cpp, seen from torch."""

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


def _laid_out(tensors: Sequence[Any], layers: int, per_word: bool) -> Callable[..., None]:
    """The forward kernel bound to the layout of its tensors, those from word_mask to the history's keys."""
    word_mask, emotion_weight, correlation, _, *past = tensors
    return kernel("bind_edge_readout_forward", emotion_weight.dtype)(
        graph_sizes(word_mask, correlation), [strides(x) for x in past[:layers]], [strides(x) for x in past[layers:]],
        past[0].shape[3] if past else 0, per_word,
    )  # fmt: skip


def forward(
    word_mask: Tensor,
    emotion_weight: Tensor,
    correlation: Tensor,
    emotion_mask: Tensor | None,
    history_query: Sequence[Tensor],
    history_key: Sequence[Tensor],
    row_factor: Tensor | None,
    scale: float,
    per_word: bool,
    precision: str,
    results: Sequence[Tensor],
) -> None:
    """Run the forward kernel."""
    check_sizes("edge_readout", word_mask, emotion_weight.shape[1])
    graph = (word_mask, emotion_weight, correlation, emotion_mask)
    tensors = [readable(x) for x in (*graph, *history_query, *history_key)]
    factor = readable(row_factor)
    _laid_out(tensors, len(history_query), per_word)(
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
    *graph, history_query, history_key, _, _, per_word, _ = arguments
    tensors = (*graph, *history_query, *history_key)
    if not lies_ready(tensors, gates, edge_scales):
        return None
    return repeatable(_laid_out(tensors, len(history_query), per_word), results)


def backward(
    grad_word_to_emotion: Tensor,
    grad_emotion_to_emotion: Tensor,
    word_mask: Tensor,
    emotion_weight: Tensor,
    correlation: Tensor,
    emotion_mask: Tensor | None,
    history_query: Sequence[Tensor],
    history_key: Sequence[Tensor],
    row_factor: Tensor | None,
    scale: float,
    per_word: bool,
    needs: list[bool],
    precision: str,
    results: Sequence[Tensor | None],
) -> None:
    """Run the backward kernel, and sum its results over resolutions."""
    *gradients, grad_row_factor, grad_emotion_weight, grad_correlation = results
    batch, resolutions, _ = word_mask.shape
    emotions, layers = emotion_weight.shape[1], len(history_query)
    check_sizes("edge_readout", word_mask, emotions)

    def apart(gradient: Tensor | None, *shape: int) -> Tensor | None:
        return None if gradient is None else emotion_weight.new_empty((batch, resolutions, *shape))

    by_weight = apart(grad_emotion_weight, emotions)
    by_correlation = apart(grad_correlation, emotions, emotions)
    word_mask, emotion_weight, correlation, emotion_mask, row_factor = (
        readable(x) for x in (word_mask, emotion_weight, correlation, emotion_mask, row_factor)
    )
    queries, keys = [readable(x) for x in history_query], [readable(x) for x in history_key]
    grad_to_word, grad_to_emotion = readable(grad_word_to_emotion), readable(grad_emotion_to_emotion)
    kernel("edge_readout_backward", emotion_weight.dtype)(
        graph_arguments(word_mask, emotion_mask, correlation, emotion_weight),
        [heads(x) for x in queries], [heads(x) for x in keys], queries[0].shape[3] if queries else 0,
        address(row_factor), scale, per_word, address(grad_to_word), address(grad_to_emotion),
        [heads(x) for x in gradients[:layers]], [heads(x) for x in gradients[layers:]], address(grad_row_factor),
        address(by_weight), address(by_correlation), torch.get_num_threads(),
    )  # fmt: skip
    sum_resolutions(by_weight, grad_emotion_weight)
    sum_resolutions(by_correlation, grad_correlation)
