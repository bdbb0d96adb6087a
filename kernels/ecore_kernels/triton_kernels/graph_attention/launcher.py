"""Launches of attention on the emotion graph: what the kernels read, and where they write.

Arguments and results are those of ``_results`` and ``_gradients`` in :mod:`ecore_kernels.operators.graph_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ecore_kernels.layout import dense_rows, laid_out_like, sum_resolutions
from ecore_kernels.triton_kernels import launch
from ecore_kernels.triton_kernels.emotion_graph import graph_arguments
from ecore_kernels.triton_kernels.graph_attention.backward_kernel import _backward
from ecore_kernels.triton_kernels.graph_attention.deltas_kernel import _sum_deltas
from ecore_kernels.triton_kernels.graph_attention.forward_kernel import _forward

CHUNK = 512  # nodes that are ordered at a time


def _setting(query: Tensor, value: Tensor, history: int, precision: str, direction: str):
    """Kernel constants and the compiler's options, which depend on types and head sizes alone."""
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
    return {
        "query": query,
        "key": laid_out_like(key, query),
        "value": dense_rows(value),
        "history_query": tuple(laid_out_like(x, query) for x in history_query),
        "history_key": tuple(laid_out_like(x, query) for x in history_key),
        **graph_arguments(word_mask, correlation, emotion_mask, row_factor, number),
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
    results: Sequence[Tensor],
) -> None:
    """Launch the forward kernel."""
    arguments = _inputs(
        query, key, value, word_mask, correlation, emotion_mask, history_query, history_key, row_factor
    )
    output, saved = results
    batch, resolutions, nodes, _ = query.shape
    constants, options = _setting(query, value, len(history_query), precision, "forward")
    arguments.update(
        word_weight=word_weight.to(saved.dtype).contiguous(),
        emotion_weight=emotion_weight.to(saved.dtype).contiguous(),
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
    """Launch the backward kernel, and sum its results over resolutions."""
    arguments = _inputs(
        query, key, value, word_mask, correlation, emotion_mask, history_query, history_key, row_factor
    )
    batch, resolutions, nodes, _ = query.shape
    emotions, depth = correlation.shape[-1], len(history_query)
    grad_output = laid_out_like(grad_output, output)
    *of_nodes, grad_row_factor, grad_emotion_weight, grad_correlation = results
    grad_query, grad_key, grad_value = of_nodes[:3]
    grad_past = of_nodes[3 : 3 + depth], of_nodes[3 + depth :]
    wanted_past = [tuple(gradient for gradient in past if gradient is not None) for past in grad_past]
    # No program writes a result for an emotion that takes no part.
    empty = saved.new_empty if emotion_mask is None else saved.new_zeros
    by_weight = by_correlation = None
    if grad_emotion_weight is not None:
        by_weight = empty((batch, resolutions, emotions))
    if grad_correlation is not None and words_only:  # edges from emotions to words have emotion_weight alone
        grad_correlation.zero_()
    elif grad_correlation is not None:
        by_correlation = empty((batch, resolutions, emotions, emotions))
    by_receivers = [x for x in (grad_query, *wanted_past[0], grad_row_factor) if x is not None]
    of_scores = [x for x in (grad_key, *wanted_past[1], by_weight, by_correlation) if x is not None]
    constants, options = _setting(query, value, depth, precision, "backward")
    # Operands of tensor cores have lost more precision than a plain sum of dO O does.
    by_itself = launch.arithmetic_of(query.dtype, precision) in ("ieee", "float64")
    deltas = torch.empty_like(saved[0]) if by_itself and (by_receivers or of_scores) else None
    given = next((x for x in of_nodes if x is not None and x is not grad_value), query)
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
        grad_emotion_weight=by_weight,
        grad_correlation=by_correlation,
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
    sum_resolutions(by_weight, grad_emotion_weight)
    sum_resolutions(by_correlation, grad_correlation)
