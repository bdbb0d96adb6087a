"""Attention on the emotion graph on a CPU: csrc/graph_attention_cpu.cpp, seen from torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ecore_kernels.layout import empty_rows, empty_saved
from ecore_kernels.native_kernels import (
    CPU,
    address,
    addresses,
    check_sizes,
    dense,
    graph_arguments,
    graph_sizes,
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
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel.

    Args:
        query, key, history: [B, K, N, d], value [B, K, N, dv]; all tensors of one type, masks excepted.
        word_weight ... emotion_mask: as in :class:`ecore_kernels.EmotionGraph`.
        row_factor: [B, K, N]; None for 1.
        words_only: only words receive.

    Returns:
        output: [B, K, N or M, dv].
        saved: [5, B, K, N], for the backward: of every receiver by its place the maximum of its scores (to base 2),
            one over the sum of their powers, E0 of the edges that the node in that place sends to words; then order,
            int32 [B, K, N]: the nodes that take part ([CLS], emotions, words); and counts, int32 [B, K, 2]: emotions
            and nodes that take part.
    """
    check_sizes("graph_attention", word_mask, query.shape[2] - word_mask.shape[2])
    queries = [dense(x) for x in (query, *history_query)]
    keys = [dense(x) for x in (key, *history_key)]
    value = dense(value)
    word_mask, correlation = word_mask.contiguous(), correlation.contiguous()
    emotion_mask = None if emotion_mask is None else emotion_mask.contiguous()
    word_weight, emotion_weight = word_weight.contiguous(), emotion_weight.contiguous()
    row_factor = None if row_factor is None else row_factor.contiguous()
    tensors = (
        queries[0], keys[0], value, word_weight, word_mask, emotion_weight, correlation, emotion_mask, *queries[1:],
        *keys[1:],
    )  # fmt: skip
    output = _empty_output(value, word_mask, words_only)
    saved = empty_saved(query, 5)
    _laid_out(queries, keys, value, word_mask, correlation, output, words_only)(
        addresses(tensors),
        [address(row_factor), 0],
        scale,
        address(saved),
        address(output),
        torch.get_num_threads(),
    )
    return output, saved


def bind(
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
    gates: Sequence[Tensor | None],
    edge_scales: Sequence[Any],
    words_only: bool,
) -> Callable[..., Tensor] | None:
    """Bind :func:`forward` to the layout of these tensors, for calls without a backward.

    Args:
        gates, edge_scales: the history's.

    Returns:
        (tensors, gates, edge_scales, scale) -> output, the tensors those from query to the history's keys; None where a
        tensor in this layout has to be copied.
    """
    queries, keys = (query, *history_query), (key, *history_key)
    graph = (word_weight, word_mask, emotion_weight, correlation, emotion_mask)
    if not (lies_ready((*queries, *keys, value), *graph) and multiplies(gates, edge_scales, query.dtype)):
        return None
    template = _empty_output(value, word_mask, words_only)
    run = _laid_out(queries, keys, value, word_mask, correlation, template, words_only)
    shape, stride, kind = template.shape, template.stride(), template.dtype

    def call(
        tensors: Sequence[Tensor | None],
        gates: Sequence[Tensor | None],
        edge_scales: Sequence[Any],
        scale: float,
    ) -> Tensor:
        output = torch.empty_strided(shape, stride, dtype=kind, device=CPU)
        factors = [*gates, *(number(x, kind) for x in edge_scales)]
        run(addresses(tensors), addresses(factors), scale, 0, output.data_ptr(), torch.get_num_threads())
        return output

    return call


def _empty_output(value: Tensor, word_mask: Tensor, words_only: bool) -> Tensor:
    return empty_rows(
        value, word_mask.shape[2] if words_only else value.shape[2], value.shape[3], value.dtype
    )


def _laid_out(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    value: Tensor,
    word_mask: Tensor,
    correlation: Tensor,
    output: Tensor,
    words_only: bool,
) -> Callable[..., None]:
    """The kernel on tensors laid out as these: (addresses, those of gates and edge scales, scale, ...)."""
    bind = kernel("bind_graph_attention_forward", value.dtype)
    return bind(
        graph_sizes(word_mask, correlation), [strides(x) for x in queries], [strides(x) for x in keys], strides(value),
        queries[0].shape[3], value.shape[3], words_only, strides(output),
    )  # fmt: skip


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
) -> list[Tensor]:
    """Run the backward kernel, and add up what it leaves per resolution.

    Args:
        grad_output: the gradient of output, in its shape.
        output, saved: from :func:`forward`; the rest as it got them.
        needs: which of the gradients below are wanted, in their order.

    Returns:
        gradients of query, key, value, the history's queries, its keys, row_factor, emotion_weight [B, P] and
        correlation (in its shape), those alone that are needed.
    """
    layers = len(history_query)
    words, nodes = word_mask.shape[2], query.shape[2]
    emotions = nodes - words
    check_sizes("graph_attention", word_mask, emotions)
    wanted = iter(needs)
    grads = [
        empty_rows(query, nodes, x.shape[3], x.dtype) if next(wanted) else None
        for x in (query, key, value, *history_query, *history_key)
    ]
    grad_queries, grad_keys = [grads[0], *grads[3 : 3 + layers]], [grads[1], *grads[3 + layers :]]
    pairs = query.shape[:2]
    grad_row_factor = saved.new_empty((*pairs, nodes)) if next(wanted) else None
    grad_emotion_weight = saved.new_empty((*pairs, emotions)) if next(wanted) else None
    needs_correlation = next(wanted)
    grad_correlation = None
    if needs_correlation and not words_only:
        grad_correlation = saved.new_empty((*pairs, emotions, emotions))
    queries = [dense(x) for x in (query, *history_query)]
    keys = [dense(x) for x in (key, *history_key)]
    value, grad_output, output = dense(value), dense(grad_output), dense(output)
    word_mask, correlation = word_mask.contiguous(), correlation.contiguous()
    emotion_mask = None if emotion_mask is None else emotion_mask.contiguous()
    row_factor = None if row_factor is None else row_factor.contiguous()
    kernel("graph_attention_backward", query.dtype)(
        graph_arguments(word_mask, emotion_mask, correlation),
        [heads(x) for x in queries], [heads(x) for x in keys], heads(value), query.shape[3], value.shape[3],
        address(row_factor), scale, words_only, _planes(saved),
        heads(output), heads(grad_output), [heads(x) for x in grad_queries], [heads(x) for x in grad_keys],
        heads(grads[2]), address(grad_row_factor), address(grad_emotion_weight), address(grad_correlation),
        torch.get_num_threads(),
    )  # fmt: skip
    grads.append(grad_row_factor)
    grads.append(None if grad_emotion_weight is None else grad_emotion_weight.sum(1))
    if grad_correlation is not None:
        grad_correlation = grad_correlation.sum((0, 1) if correlation.dim() == 2 else 1)
    elif needs_correlation:  # words hear emotions by emotion_weight alone
        grad_correlation = correlation.new_zeros(correlation.shape)
    return [x for x in (*grads, grad_correlation) if x is not None]


def _planes(saved: Tensor) -> tuple[int, ...]:
    """The planes of what the forward leaves for the backward, as the extension takes them."""
    first, plane = saved.data_ptr(), saved.stride(0) * saved.element_size()
    return first, first + plane, first + 2 * plane, first + 3 * plane, first + 4 * plane
