"""Launches of the readout of the edges' emotion columns: what the kernels read, and where they write.

Arguments and results are those of ``_results`` and ``_gradients`` in :mod:`ecore_kernels.operators.edge_readout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ecore_kernels.layout import dense_rows, laid_out_like, sum_resolutions
from ecore_kernels.triton_kernels import launch
from ecore_kernels.triton_kernels.edge_readout.backward_kernel import _backward
from ecore_kernels.triton_kernels.edge_readout.forward_kernel import _forward
from ecore_kernels.triton_kernels.emotion_graph import graph_arguments


def _setting(
    history: Sequence[Tensor], emotion_weight: Tensor, precision: str, direction: str
) -> tuple[dict[str, object], dict[str, int]]:
    """Kernel constants and the compiler's options, which depend on types and sizes of the model alone."""
    dim = history[0].shape[3] if history else 1
    arithmetic = launch.arithmetic_of(history[0].dtype if history else emotion_weight.dtype, precision)
    constants, options = launch.configuration(
        f"edge_readout_{direction}", arithmetic, launch.padded(dim), len(history),
        launch.architecture(emotion_weight.device),
    )  # fmt: skip
    columns = min(constants["COLUMNS"], launch.padded(emotion_weight.shape[1]))
    tile = {"DIM": dim, "TILE_DIM": launch.padded(dim), "PRECISION": launch.dot_precision(arithmetic)}
    return {**tile, **constants, "COLUMNS": columns}, options


def _inputs(
    word_mask: Tensor,
    emotion_weight: Tensor,
    correlation: Tensor,
    emotion_mask: Tensor | None,
    history_query: Sequence[Tensor],
    history_key: Sequence[Tensor],
    row_factor: Tensor | None,
) -> dict[str, Any]:
    """The arguments that both kernels share, laid out as they expect them."""
    if history_query:
        model = dense_rows(history_query[0])
        history_query = [laid_out_like(x, model) for x in history_query]
        history_key = [laid_out_like(x, model) for x in history_key]
    double = (*history_query, emotion_weight)[0].dtype is torch.float64
    number = torch.float64 if double else torch.float32
    return {
        "history_query": tuple(history_query),
        "history_key": tuple(history_key),
        "emotion_weight": emotion_weight.to(number).contiguous(),
        **graph_arguments(word_mask, correlation, emotion_mask, row_factor, number),
    }


def _strides(**tensors: Sequence[Tensor]) -> dict[str, int]:
    """Strides as kernel arguments; without history they do not matter."""
    if all(tensors.values()):
        return launch.strides(**{name: of[0] for name, of in tensors.items()})
    return {"VECTOR": 1} | {f"{name}_{of}": 0 for name in tensors for of in ("batch", "head", "row")}


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
    """Launch the forward kernel, and sum its results over blocks of words if there are several."""
    batch, _, words = word_mask.shape
    emotions = emotion_weight.shape[1]
    arguments = _inputs(
        word_mask, emotion_weight, correlation, emotion_mask, history_query, history_key, row_factor
    )
    history_query = arguments["history_query"]
    constants, options = _setting(history_query, emotion_weight, precision, "forward")
    to_word, to_emotion = results
    word_blocks = triton.cdiv(words, constants["BLOCK"])
    by_block = None if per_word or word_blocks == 1 else to_word.new_empty((batch, word_blocks, emotions))
    arguments.update(
        to_word=to_word if by_block is None else by_block,
        to_emotion=to_emotion,
        **_strides(history=history_query),
        scale_bits=launch.bits(scale),
        PER_WORD=per_word,
        **constants,
    )
    blocks = word_blocks + triton.cdiv(emotions, constants["BLOCK"])
    programs = batch * blocks * triton.cdiv(emotions, constants["COLUMNS"])
    launch.launch(_forward, (programs,), arguments, options, emotion_weight.device)
    if by_block is not None:
        torch.sum(by_block, 1, out=to_word)


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
    """Launch the backward kernel, and sum its results over resolutions."""
    batch, resolutions, words = word_mask.shape
    emotions, depth = emotion_weight.shape[1], len(history_query)
    arguments = _inputs(
        word_mask, emotion_weight, correlation, emotion_mask, history_query, history_key, row_factor
    )
    history_query = arguments["history_query"]
    constants, options = _setting(history_query, emotion_weight, precision, "backward")
    *of_past, grad_row_factor, grad_emotion_weight, grad_correlation = results
    grad_query, grad_key = of_past[:depth], of_past[depth:]
    wanted_past = [tuple(x for x in past if x is not None) for past in (grad_query, grad_key)]
    of_receivers = any(x is not None for x in (*grad_query, grad_row_factor, grad_correlation))
    of_senders = any(x is not None for x in (*grad_key, grad_emotion_weight))
    if not of_receivers:  # whose programs write zeros for the words' keys, which are not used
        for gradient in wanted_past[1]:
            gradient.zero_()

    def apart(gradient: Tensor | None, *shape: int) -> Tensor | None:
        return None if gradient is None else gradient.new_empty((batch, resolutions, *shape))

    by_weight, by_correlation = (
        apart(grad_emotion_weight, emotions),
        apart(grad_correlation, emotions, emotions),
    )
    number = arguments["emotion_weight"].dtype
    arguments.update(
        grad_to_word=grad_word_to_emotion.to(number).contiguous(),
        grad_to_emotion=grad_emotion_to_emotion.to(number).contiguous(),
        grad_history_query=wanted_past[0],
        grad_history_key=wanted_past[1],
        grad_row_factor=grad_row_factor,
        grad_emotion_weight=by_weight,
        grad_correlation=by_correlation,
        pairs=batch * resolutions,
        **_strides(history=history_query, gradient=[*wanted_past[0], *wanted_past[1], *history_query][:1]),
        scale_bits=launch.bits(scale),
        PER_WORD=per_word,
        RECEIVERS=of_receivers,
        SENDERS=of_senders,
        HISTORY_QUERY=launch.present(grad_query),
        HISTORY_KEY=launch.present(grad_key),
        **constants,
    )
    blocks = (
        triton.cdiv(words, constants["BLOCK"]) + triton.cdiv(emotions, constants["BLOCK"])
    ) * of_receivers
    programs = batch * resolutions * (triton.cdiv(emotions, constants["COLUMNS"]) * of_senders + blocks)
    if programs:
        launch.launch(_backward, (programs,), arguments, options, emotion_weight.device)
    sum_resolutions(by_weight, grad_emotion_weight)
    sum_resolutions(by_correlation, grad_correlation)
