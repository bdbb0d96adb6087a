"""The backward kernel of attention on the emotion graph: by rows, for receivers, and by columns, for senders."""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.graph_attention.edges import VARYING, saved_of
from ecore_kernels.triton_kernels.graph_attention.receivers import gradients_of_receivers
from ecore_kernels.triton_kernels.graph_attention.senders import gradients_of_senders
from ecore_kernels.triton_kernels.tiles import number_of


@triton.jit(do_not_specialize=VARYING)
def _backward(
    query, key, value,  # [B, K, N, d], [B, K, N, d], [B, K, N, dv]
    history_query, history_key,  # tuples of [B, K, N, d]
    correlation, word_mask, emotion_mask, row_factor,  # as in the forward
    output, grad_output,  # [B, K, N or M, dv]
    saved,  # [5, B, K, N]
    deltas,  # [B, K, N] from _sum_deltas, or None: then delta is dO O
    # None, or not in the tuple, if not wanted
    grad_query, grad_key, grad_value,  # [B, K, N, d], [B, K, N, d], [B, K, N, dv]
    grad_history_query, grad_history_key,  # tuples of [B, K, N, d]
    grad_row_factor, grad_emotion_weight, grad_correlation,  # [B, K, N], [B, K, P], [B, K, P, P]
    plane, resolutions, words, emotions, correlation_batch, zero,
    query_batch, query_head, query_row, value_batch, value_head, value_row, output_batch, output_head, output_row,
    gradient_batch, gradient_head, gradient_row, value_gradient_batch, value_gradient_head, value_gradient_row,
    scale_bits: tl.int64, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PIECE: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, WORDS_ONLY: tl.constexpr,
    RECEIVERS: tl.constexpr, SENDERS: tl.constexpr,  # whether gradients of receivers and of senders are wanted
    SCORES: tl.constexpr,  # whether the senders need more than grad_value
    HISTORY_QUERY: tl.constexpr, HISTORY_KEY: tl.constexpr,  # a bit for each layer whose gradients are wanted
    BLOCK: tl.constexpr, STEP: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """One program: gradients of BLOCK nodes of one (b, k), as receivers or, in later programs, as senders.

    With RELOAD the streaming tiles are loaded again for their second product instead of being kept for it. ``zero`` is
    0, which the compiler does not know, so it cannot remove the second load.
    """
    nodes = words + emotions
    receiver_blocks = tl.cdiv(words if WORDS_ONLY else nodes, BLOCK) * RECEIVERS
    blocks = receiver_blocks + tl.cdiv(nodes, BLOCK) * SENDERS
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    batch, head = pair // resolutions, pair % resolutions

    query_offset = (batch * query_batch + head * query_head) * VECTOR
    query_row *= VECTOR
    gradient_row *= VECTOR
    value_row *= VECTOR
    output_row *= VECTOR
    value += (batch * value_batch + head * value_head) * VECTOR
    output += (batch * output_batch + head * output_head) * VECTOR
    grad_output += (batch * output_batch + head * output_head) * VECTOR
    word_mask += pair * words
    if emotion_mask is not None:
        emotion_mask += batch * emotions
    correlation += batch * correlation_batch
    saved_maximum, saved_inverse, weight, order, counts = saved_of(saved, plane, pair, nodes)
    emotion_count = tl.load(counts)
    count = tl.load(counts + 1)
    number: tl.constexpr = saved.dtype.element_ty
    scale = number_of(scale_bits, number)

    if RECEIVERS:
        if block < receiver_blocks:
            block = tl.where(block == 0, 0, receiver_blocks - block)  # the longest first
            gradients_of_receivers(
                block, blocks, query, key, value, history_query, history_key,
                correlation, word_mask, emotion_mask, row_factor, output, grad_output,
                saved_maximum, saved_inverse, weight, order, deltas,
                grad_query, grad_history_query, grad_row_factor,
                pair, resolutions, words, emotions, emotion_count, count, zero,
                query_offset, query_row, value_row, output_row, gradient_batch, gradient_head, gradient_row,
                scale, number, DIM, VALUE_DIM, PIECE, VECTOR, PRECISION, WORDS_ONLY, HISTORY_QUERY,
                BLOCK, STEP, RELOAD,
            )  # fmt: skip
            return
        block -= receiver_blocks

    if SENDERS:
        gradients_of_senders(
            block, blocks, query, key, value, history_query, history_key,
            correlation, word_mask, emotion_mask, row_factor, output, grad_output,
            saved_maximum, saved_inverse, weight, order, deltas,
            grad_key, grad_value, grad_history_key, grad_emotion_weight, grad_correlation,
            pair, resolutions, words, emotions, emotion_count, count, zero,
            query_offset, query_row, value_row, output_row, gradient_batch, gradient_head, gradient_row,
            value_gradient_batch, value_gradient_head, value_gradient_row,
            scale, number, DIM, VALUE_DIM, PIECE, VECTOR, PRECISION, WORDS_ONLY, SCORES, HISTORY_KEY,
            BLOCK, STEP, RELOAD,
        )  # fmt: skip
