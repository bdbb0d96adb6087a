"""What emotions send after the layers of the history, on a CPU: csrc/edge_readout_cpu.cpp, seen from torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ecore_kernels.layout import asked, empty_rows
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
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel.

    Args:
        word_mask ... emotion_mask: as in :class:`ecore_kernels.EmotionGraph`.
        history: [B, K, N, d]; may be empty. All tensors are of one type, masks excepted.
        row_factor: [B, K, N]; None for 1.
        per_word: keep the words apart.

    Returns:
        word_to_emotion: [B, P], or [B, M, P] with per_word; emotion_to_emotion: [B, P, P].
    """
    check_sizes("edge_readout", word_mask, emotion_weight.shape[1])
    word_mask, emotion_weight, correlation = (
        x.contiguous() for x in (word_mask, emotion_weight, correlation)
    )
    emotion_mask = None if emotion_mask is None else emotion_mask.contiguous()
    row_factor = None if row_factor is None else row_factor.contiguous()
    queries, keys = [dense(x) for x in history_query], [dense(x) for x in history_key]
    tensors = (word_mask, emotion_weight, correlation, emotion_mask, *queries, *keys)
    return _laid_out(word_mask, correlation, queries, keys, per_word, emotion_weight.dtype)(
        tensors, (row_factor,), (None,), scale
    )


def bind(
    word_mask: Tensor,
    emotion_weight: Tensor,
    correlation: Tensor,
    emotion_mask: Tensor | None,
    history_query: Sequence[Tensor],
    history_key: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    edge_scales: Sequence[Any],
    per_word: bool,
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Bind :func:`forward` to the layout of these tensors.

    Args:
        gates, edge_scales: the history's.

    Returns:
        (tensors, gates, edge_scales, scale) -> forward's results, the tensors those from word_mask to the history's
        keys; None where a tensor in this layout has to be copied.
    """
    rows, graph = (*history_query, *history_key), (word_mask, emotion_weight, correlation, emotion_mask)
    if not (lies_ready(rows, *graph) and multiplies(gates, edge_scales, emotion_weight.dtype)):
        return None
    return _laid_out(word_mask, correlation, history_query, history_key, per_word, emotion_weight.dtype)


def _laid_out(
    word_mask: Tensor,
    correlation: Tensor,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    per_word: bool,
    kind: torch.dtype,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernel on tensors laid out as these: (tensors, gates, edge_scales, scale) -> forward's results."""
    batch, _, words = word_mask.shape
    emotions = correlation.shape[-1]
    run = kernel("bind_edge_readout_forward", kind)(
        graph_sizes(word_mask, correlation), [strides(x) for x in queries], [strides(x) for x in keys],
        queries[0].shape[3] if queries else 0, per_word,
    )  # fmt: skip
    word_shape = (batch, words, emotions) if per_word else (batch, emotions)
    emotion_shape = (batch, emotions, emotions)

    def call(
        tensors: Sequence[Tensor | None],
        gates: Sequence[Tensor | None],
        edge_scales: Sequence[Any],
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        to_word, to_emotion = (
            torch.empty(shape, dtype=kind, device=CPU) for shape in (word_shape, emotion_shape)
        )
        factors = [*gates, *(number(x, kind) for x in edge_scales)]
        run(
            addresses(tensors), addresses(factors), scale, to_word.data_ptr(), to_emotion.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return to_word, to_emotion

    return call


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
) -> list[Tensor]:
    """Run the backward kernel, and add up what it leaves per resolution.

    Args:
        grad_word_to_emotion, grad_emotion_to_emotion: gradients of :func:`forward`'s results; the rest as it got it.
        needs: which of the gradients below are wanted, in their order.

    Returns:
        gradients of the history's queries, its keys, row_factor, emotion_weight [B, P] and correlation (in its shape),
        those alone that are needed.
    """
    *needs_past, needs_row_factor, needs_emotion_weight, needs_correlation = needs
    batch, resolutions, _ = word_mask.shape
    emotions = emotion_weight.shape[1]
    check_sizes("edge_readout", word_mask, emotions)
    past = (*history_query, *history_key)
    gradients = [
        empty_rows(past[0], x.shape[2], x.shape[3], x.dtype) if needed else None
        for x, needed in zip(past, needs_past, strict=True)
    ]
    layers = len(history_query)
    grad_row_factor = grad_emotion_weight = grad_correlation = None
    if row_factor is not None and needs_row_factor:
        grad_row_factor = row_factor.new_empty(row_factor.shape)
    if needs_emotion_weight:
        grad_emotion_weight = emotion_weight.new_empty((batch, resolutions, emotions))
    if needs_correlation:
        grad_correlation = emotion_weight.new_empty((batch, resolutions, emotions, emotions))
    word_mask, emotion_weight, correlation = (
        x.contiguous() for x in (word_mask, emotion_weight, correlation)
    )
    emotion_mask = None if emotion_mask is None else emotion_mask.contiguous()
    row_factor = None if row_factor is None else row_factor.contiguous()
    queries, keys = [dense(x) for x in history_query], [dense(x) for x in history_key]
    grad_to_word, grad_to_emotion = grad_word_to_emotion.contiguous(), grad_emotion_to_emotion.contiguous()
    kernel("edge_readout_backward", emotion_weight.dtype)(
        graph_arguments(word_mask, emotion_mask, correlation, emotion_weight),
        [heads(x) for x in queries], [heads(x) for x in keys], queries[0].shape[3] if queries else 0,
        address(row_factor), scale, per_word, address(grad_to_word), address(grad_to_emotion),
        [heads(x) for x in gradients[:layers]], [heads(x) for x in gradients[layers:]], address(grad_row_factor),
        address(grad_emotion_weight), address(grad_correlation), torch.get_num_threads(),
    )  # fmt: skip
    gradients.append(grad_row_factor)
    gradients.append(None if grad_emotion_weight is None else grad_emotion_weight.sum(1))
    if grad_correlation is not None:
        grad_correlation = grad_correlation.sum((0, 1) if correlation.dim() == 2 else 1)
    gradients.append(grad_correlation)
    return asked(gradients, needs)
