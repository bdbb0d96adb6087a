"""Launches of attention on the emotion graph: what the kernels read, and where they write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ecore_kernels.layout import (
    asked,
    dense_rows,
    empty_rows,
    empty_saved,
    laid_out_like,
)
from ecore_kernels.triton_kernels import launch
from ecore_kernels.triton_kernels.graph_attention.backward_kernels import _backward, _sum_deltas
from ecore_kernels.triton_kernels.graph_attention.forward_kernel import _forward

CHUNK = 512  # nodes that are put in order at a time


def _setting(query: Tensor, value: Tensor, history: int, precision: str, direction: str):
    """What depends on types and head sizes alone: kernel constants and the compiler's options."""
    arithmetic = launch.arithmetic_of(query.dtype, precision)
    dim, value_dim = query.shape[3], value.shape[3]
    head = launch.padded(max(dim, value_dim))
    constants, options = launch.configuration(
        f"graph_attention_{direction}", arithmetic, head, history, launch.architecture(query.device)
    )
    tile = {"DIM": dim, "VALUE_DIM": value_dim, "PRECISION": launch.dot_precision(arithmetic)}
    return {**tile, **constants, "PIECE": min(constants["PIECE"], head)}, options


def _inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    word_mask: Tensor,
    correlation: Tensor,
    emotion_mask: Tensor | None,
    history_query: Sequence[Tensor],
    history_key: Sequence[Tensor],
    row_factor: Tensor | None,
) -> dict[str, Any]:
    """The arguments that both kernels share, laid out as they expect them."""
    query = dense_rows(query)
    number = torch.float64 if query.dtype is torch.float64 else torch.float32
    _, resolutions, words = word_mask.shape
    emotions = correlation.shape[-1]
    return {
        "query": query,
        "key": laid_out_like(key, query),
        "value": dense_rows(value),
        "history_query": tuple(laid_out_like(x, query) for x in history_query),
        "history_key": tuple(laid_out_like(x, query) for x in history_key),
        "word_mask": word_mask.contiguous(),
        "correlation": correlation.to(number).contiguous(),
        "emotion_mask": None if emotion_mask is None else emotion_mask.contiguous(),
        "row_factor": None if row_factor is None else row_factor.to(number).contiguous(),
        "resolutions": resolutions,
        "words": words,
        "emotions": emotions,
        "correlation_batch": 0 if correlation.dim() == 2 else emotions * emotions,
    }


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
    """Launch the forward kernel.

    Args:
        query, key, history: [B, K, N, d], value [B, K, N, dv], of one type.
        word_weight ... emotion_mask: as in :class:`ecore_kernels.EmotionGraph`.
        row_factor: [B, K, N], float32 (float64 where query is); None for 1.
        words_only: only words receive.
        precision: "ieee" or "tf32", for float32.

    Returns:
        output: [B, K, N or M, dv], in the type of value.
        saved: [5, B, K, N], for the backward: of every receiver by its place its largest exponent to base 2, one over
            the sum of its softmax, E0 of the edges that the node in that place sends to words; then order, int32
            [B, K, N]: the nodes that take part ([CLS], emotions, words); and counts, int32 [B, K, 2]: emotions and
            nodes that take part.
    """
    arguments = _inputs(
        query, key, value, word_mask, correlation, emotion_mask, history_query, history_key, row_factor
    )
    batch, resolutions, nodes, _ = query.shape
    number = torch.float64 if query.dtype is torch.float64 else torch.float32
    output = empty_rows(value, word_mask.shape[2] if words_only else nodes, value.shape[3], value.dtype)
    saved = empty_saved(query, 5)
    constants, options = _setting(query, value, len(history_query), precision, "forward")
    arguments.update(
        word_weight=word_weight.to(number).contiguous(),
        emotion_weight=emotion_weight.to(number).contiguous(),
        output=output,
        saved=saved,
        plane=batch * resolutions * nodes,
        **launch.strides(query=arguments["query"], value=arguments["value"], output=output),
        scale_bits=launch.bits(scale),
        CHUNK=CHUNK,
        WORDS_ONLY=words_only,
        **constants,
    )
    programs = batch * resolutions * triton.cdiv(output.shape[2], constants["BLOCK"])
    launch.launch(_forward, (programs,), arguments, options, query.device)
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
    """Launch the backward kernel, and add up what it leaves per resolution.

    Args:
        grad_output: the gradient of output, in its shape.
        output, saved: from :func:`forward`; the rest as it got them.
        needs: which of the gradients below are wanted, in their order.

    Returns:
        gradients of query, key, value, the history's queries, its keys, row_factor, emotion_weight [B, P] and
        correlation (in its shape), those alone that are needed: nothing is computed for the others.
    """
    arguments = _inputs(
        query, key, value, word_mask, correlation, emotion_mask, history_query, history_key, row_factor
    )
    batch, resolutions, nodes, _ = query.shape
    emotions, depth = correlation.shape[-1], len(history_query)
    grad_output = laid_out_like(grad_output, output)

    def rows(needed: bool, like: Tensor) -> Tensor | None:
        return empty_rows(query, nodes, like.shape[3], like.dtype) if needed else None

    node_tensors = (query, key, value, *history_query, *history_key)
    gradients = [rows(needed, like) for needed, like in zip(needs[:-3], node_tensors, strict=True)]
    grad_query, grad_key, grad_value = gradients[:3]
    grad_past = gradients[3 : 3 + depth], gradients[3 + depth :]
    wanted_past = [tuple(gradient for gradient in past if gradient is not None) for past in grad_past]
    needs_factor, needs_weight, needs_correlation = needs[-3:]
    grad_row_factor = torch.empty_like(saved[0]) if needs_factor else None
    # An emotion that takes no part gets no program's result.
    partial = saved.new_empty if emotion_mask is None else saved.new_zeros
    grad_emotion_weight = partial((batch, resolutions, emotions)) if needs_weight else None
    grad_correlation = None
    if needs_correlation and not words_only:
        grad_correlation = partial((batch, resolutions, emotions, emotions))
    by_receivers = [x for x in (grad_query, *wanted_past[0], grad_row_factor) if x is not None]
    of_scores = [
        x for x in (grad_key, *wanted_past[1], grad_emotion_weight, grad_correlation) if x is not None
    ]
    constants, options = _setting(query, value, depth, precision, "backward")
    # Tensor cores' operands have lost more than a plain sum of dO O does.
    by_itself = launch.arithmetic_of(query.dtype, precision) in ("ieee", "float64")
    deltas = torch.empty_like(saved[0]) if by_itself and (by_receivers or of_scores) else None
    given = next((x for x in gradients if x is not None and x is not grad_value), query)
    arguments.update(
        output=output,
        grad_output=grad_output,
        saved=saved,
        deltas=deltas,
        plane=batch * resolutions * nodes,
        grad_query=grad_query,
        grad_key=grad_key,
        grad_value=grad_value,
        grad_history_query=wanted_past[0],
        grad_history_key=wanted_past[1],
        grad_row_factor=grad_row_factor,
        grad_emotion_weight=grad_emotion_weight,
        grad_correlation=grad_correlation,
        zero=0,
        **launch.strides(
            query=arguments["query"],
            value=arguments["value"],
            output=output,
            gradient=given,
            value_gradient=value if grad_value is None else grad_value,
        ),
        scale_bits=launch.bits(scale),
        WORDS_ONLY=words_only,
        RECEIVERS=bool(by_receivers),
        SENDERS=grad_value is not None or bool(of_scores),
        SCORES=bool(of_scores),
        HISTORY_QUERY=launch.present(grad_past[0]),
        HISTORY_KEY=launch.present(grad_past[1]),
        **constants,
    )
    receiver_blocks = triton.cdiv(output.shape[2], constants["BLOCK"])
    if deltas is not None:
        programs = batch * resolutions * receiver_blocks
        launch.launch(_sum_deltas, (programs,), launch.taken(_sum_deltas, arguments), options, query.device)
    blocks = receiver_blocks * arguments["RECEIVERS"]
    blocks += triton.cdiv(nodes, constants["BLOCK"]) * arguments["SENDERS"]
    if blocks:
        launch.launch(_backward, (batch * resolutions * blocks,), arguments, options, query.device)
    if grad_emotion_weight is not None:
        grad_emotion_weight = grad_emotion_weight.sum(1)
    if grad_correlation is not None:
        grad_correlation = grad_correlation.sum((0, 1) if correlation.dim() == 2 else 1)
    elif needs_correlation:  # words hear emotions by emotion_weight alone
        grad_correlation = correlation.new_zeros(correlation.shape)
    return asked([*gradients, grad_row_factor, grad_emotion_weight, grad_correlation], needs)
