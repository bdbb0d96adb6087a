"""Attention on the emotion graph on a CPU: csrc/graph_attention_cpu.cpp, seen from torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ecore_kernels.layout import asked, empty_rows, empty_saved, saved_order
from ecore_kernels.native_kernels import address, dense, graph_arguments, heads, kernel


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
        saved: [5, B, K, N], for the backward: of every receiver by its place the logarithm to base 2 of its softmax
            denominator, nothing, E0 of the edges that the node in that place sends to words; then order, int32
            [B, K, N]: the nodes that take part ([CLS], emotions, words); and counts, int32 [B, K, 2]: emotions and
            nodes that take part.
    """
    words, nodes = word_mask.shape[2], query.shape[2]
    output = empty_rows(value, words if words_only else nodes, value.shape[3], value.dtype)
    saved = empty_saved(query, 5)
    log_normalizer, _, weight = saved[:3]
    order, counts = saved_order(saved)
    queries = [dense(x) for x in (query, *history_query)]
    keys = [dense(x) for x in (key, *history_key)]
    value = dense(value)
    word_mask, correlation = word_mask.contiguous(), correlation.contiguous()
    emotion_mask = None if emotion_mask is None else emotion_mask.contiguous()
    word_weight, emotion_weight = word_weight.contiguous(), emotion_weight.contiguous()
    row_factor = None if row_factor is None else row_factor.contiguous()
    kernel("graph_attention_forward", query.dtype)(
        graph_arguments(word_mask, emotion_mask, correlation, nodes - words, word_weight, emotion_weight),
        [heads(x) for x in queries], [heads(x) for x in keys], heads(value), query.shape[3], value.shape[3],
        address(row_factor), scale, words_only, _saved(log_normalizer, order, weight, counts), heads(output),
        torch.get_num_threads(),
    )  # fmt: skip
    return output, saved


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
    log_normalizer, _, weight = saved[:3]
    order, counts = saved_order(saved)
    needs_emotion_weight, needs_correlation = needs[-2:]
    batch, resolutions, words = word_mask.shape
    nodes = query.shape[2]
    emotions = nodes - words
    grad_queries = [empty_rows(query, nodes, x.shape[3], x.dtype) for x in (query, *history_query)]
    grad_keys = [empty_rows(query, nodes, x.shape[3], x.dtype) for x in (key, *history_key)]
    grad_value = empty_rows(query, nodes, value.shape[3], value.dtype)
    grad_row_factor = None if row_factor is None else torch.empty_like(log_normalizer)
    grad_emotion_weight = grad_correlation = None
    if needs_emotion_weight:
        grad_emotion_weight = query.new_empty((batch, resolutions, emotions))
    if needs_correlation and not words_only:
        grad_correlation = query.new_empty((batch, resolutions, emotions, emotions))
    queries = [dense(x) for x in (query, *history_query)]
    keys = [dense(x) for x in (key, *history_key)]
    value, grad_output, output = dense(value), dense(grad_output), dense(output)
    word_mask, correlation = word_mask.contiguous(), correlation.contiguous()
    emotion_mask = None if emotion_mask is None else emotion_mask.contiguous()
    row_factor = None if row_factor is None else row_factor.contiguous()
    kernel("graph_attention_backward", query.dtype)(
        graph_arguments(word_mask, emotion_mask, correlation, emotions),
        [heads(x) for x in queries], [heads(x) for x in keys], heads(value), query.shape[3], value.shape[3],
        address(row_factor), scale, words_only, _saved(log_normalizer, order, weight, counts),
        heads(output), heads(grad_output), [heads(x) for x in grad_queries], [heads(x) for x in grad_keys],
        heads(grad_value), address(grad_row_factor), address(grad_emotion_weight), address(grad_correlation),
        torch.get_num_threads(),
    )  # fmt: skip
    gradients = [grad_queries[0], grad_keys[0], grad_value, *grad_queries[1:], *grad_keys[1:]]
    gradients.append(grad_row_factor)
    gradients.append(None if grad_emotion_weight is None else grad_emotion_weight.sum(1))
    if grad_correlation is not None:
        grad_correlation = grad_correlation.sum((0, 1) if correlation.dim() == 2 else 1)
    elif needs_correlation:  # words hear emotions by emotion_weight alone
        grad_correlation = correlation.new_zeros(correlation.shape)
    gradients.append(grad_correlation)
    return asked(gradients, needs)


def _saved(log_normalizer: Tensor, order: Tensor, weight: Tensor, counts: Tensor) -> tuple[int, ...]:
    """What the forward leaves for the backward, as the extension takes it."""
    return address(log_normalizer), address(order), address(weight), address(counts)
