"""The backward kernel of the readout of the edges' emotion columns: for senders, and for receivers."""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.edge_readout.edges import (
    VARYING,
    edge_values,
    factors,
    heard_by,
    load_all,
    rows_of_block,
    takes_part,
)
from ecore_kernels.triton_kernels.tiles import number_of, rounded, store_rows, wanted


@triton.jit
def _store_all(bases, offset, node, stride, tiles, scale, stored, WIDTH: tl.constexpr, TILE: tl.constexpr):
    for m in tl.static_range(len(bases)):
        store_rows(bases[m] + offset, node, stride, tiles[m] * scale, stored, WIDTH, TILE)


@triton.jit
def _gradients(u, upstream, initial, factor, heard):
    """The gradients of every layer's u, of E0, and of r before its sum over senders, on a tile.

    They are 0 off the graph.

    Args:
        upstream, initial: D and E0.
        factor: r of the receivers.
    """
    grad_initial = upstream * factor
    grad_factor = upstream * initial
    scaled = grad_factor * factor
    grad_u = ()
    for m in tl.static_range(len(u)):
        others = scaled  # the product over the other factors: u may be 0, so never divide
        for n in tl.static_range(len(u)):
            if n != m:
                others *= u[n]
        grad_u += (tl.where(heard, others, 0.0),)  # it may be NaN off the graph
        grad_initial *= u[m]
        grad_factor *= u[m]
    return grad_u, tl.where(heard, grad_initial, 0.0), tl.where(heard, grad_factor, 0.0)


@triton.jit
def _accumulate(totals, tiles, others, PRECISION: tl.constexpr):
    """Every total plus its tile's product with the streaming rows."""
    sums = ()
    for m in tl.static_range(len(totals)):
        sums += (
            totals[m]
            + tl.dot(rounded(tiles[m].to(others[m].dtype), PRECISION), others[m], input_precision=PRECISION),
        )
    return sums


@triton.jit
def _zeros(LIKE, ROWS: tl.constexpr, TILE: tl.constexpr, TYPE: tl.constexpr):
    """A tile of zeros for every member of a tuple."""
    tiles = ()
    for _ in tl.static_range(len(LIKE)):
        tiles += (tl.zeros([ROWS, TILE], TYPE),)
    return tiles


@triton.jit(do_not_specialize=VARYING)
def _backward(
    history_query, history_key, word_mask, emotion_mask, emotion_weight, correlation, row_factor,
    grad_to_word, grad_to_emotion,  # [B, P], or [B, M, P] with PER_WORD; [B, P, P]
    grad_history_query, grad_history_key,  # of the wanted layers
    grad_row_factor, grad_emotion_weight, grad_correlation,  # [B, K, N], [B, K, P], [B, K, P, P]; None if not wanted
    resolutions, words, emotions, correlation_batch, pairs,
    history_batch, history_head, history_row, gradient_batch, gradient_head, gradient_row,
    scale_bits: tl.int64, DIM: tl.constexpr, TILE_DIM: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
    PER_WORD: tl.constexpr, RECEIVERS: tl.constexpr, SENDERS: tl.constexpr,  # whether their gradients are wanted
    HISTORY_QUERY: tl.constexpr, HISTORY_KEY: tl.constexpr,  # a bit for each layer whose gradients are wanted
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program of one (b, k): gradients of COLUMNS emotions as senders or, in later programs, of BLOCK receivers.

    Shape tags: I = BLOCK receivers, J = COLUMNS senders.
    """
    nodes = words + emotions
    blocks = tl.cdiv(words, BLOCK) + tl.cdiv(emotions, BLOCK)
    column_blocks = tl.cdiv(emotions, COLUMNS)
    # The senders' programs come first, because their loops are longer.
    sending = pairs * column_blocks * SENDERS
    by_column = tl.program_id(0) < sending
    within = tl.where(by_column, tl.program_id(0), tl.program_id(0) - sending)
    parts = tl.where(by_column, column_blocks, blocks)
    pair = (within // parts).to(tl.int64)
    part = within % parts
    batch, head = pair // resolutions, pair % resolutions

    history_offset = (batch * history_batch + head * history_head) * VECTOR
    gradient_offset = (batch * gradient_batch + head * gradient_head) * VECTOR
    history_row *= VECTOR
    gradient_row *= VECTOR
    word_mask += pair * words
    if emotion_mask is not None:
        emotion_mask += batch * emotions
    if row_factor is not None:
        row_factor += pair * nodes
    emotion_weight += batch * emotions
    correlation += batch * correlation_batch
    grad_to_emotion += batch * emotions * emotions
    if PER_WORD:
        grad_to_word += batch * words * emotions
        word_row = emotions
    else:
        grad_to_word += batch * emotions
        word_row = 0
    number: tl.constexpr = grad_to_emotion.dtype.element_ty
    scale = number_of(scale_bits, number)

    if SENDERS:  # noqa: SIM102, settled when compiling
        if by_column:
            column = part * COLUMNS + tl.arange(0, COLUMNS)  # [J]
            sends = takes_part(words + column, column < emotions, word_mask, emotion_mask, words)
            k = load_all(
                history_key, history_offset, words + column, history_row, sends, DIM, TILE_DIM, PRECISION
            )
            grad_k = _zeros(grad_history_key, COLUMNS, TILE_DIM, number)  # a layer [J, d]
            grad_weight = tl.zeros([COLUMNS], number)  # [J]
            for block in range(0, blocks):
                emotional, row, node, exists = rows_of_block(block, words, emotions, BLOCK)
                receives = takes_part(node, exists, word_mask, emotion_mask, words)
                q = load_all(
                    history_query, history_offset, node, history_row, receives, DIM, TILE_DIM, PRECISION
                )
                factor = receives.to(number)
                if row_factor is not None:
                    factor = tl.load(row_factor + node, mask=receives, other=0.0)
                i, j = row[None, :], column[:, None]
                heard = heard_by((node - words)[None, :], j, receives[None, :], sends[:, None])
                initial = edge_values(emotion_weight, 0, correlation, i, j, emotional, heard, emotions)
                upstream = edge_values(
                    grad_to_word, word_row, grad_to_emotion, i, j, emotional, heard, emotions
                )
                u = factors(k, q, scale, PRECISION)  # a layer [J, I]
                grad_u, grad_initial, _grad_r = _gradients(u, upstream, initial, factor[None, :], heard)
                if len(grad_k) > 0:
                    grad_k = _accumulate(
                        grad_k, wanted(grad_u, HISTORY_KEY), wanted(q, HISTORY_KEY), PRECISION
                    )
                if grad_emotion_weight is not None:
                    grad_weight += tl.where(emotional, 0.0, tl.sum(grad_initial, 1))
            _store_all(
                grad_history_key, gradient_offset, words + column, gradient_row, grad_k, scale, column < emotions,
                DIM, TILE_DIM,
            )  # fmt: skip
            if grad_emotion_weight is not None:
                tl.store(grad_emotion_weight + pair * emotions + column, grad_weight, mask=column < emotions)
            return

    if RECEIVERS:
        emotional, row, node, exists = rows_of_block(part, words, emotions, BLOCK)
        receives = takes_part(node, exists, word_mask, emotion_mask, words)
        q = load_all(
            history_query, history_offset, node, history_row, receives, DIM, TILE_DIM, PRECISION
        )  # [I, d]
        factor = receives.to(number)
        if row_factor is not None:
            factor = tl.load(row_factor + node, mask=receives, other=0.0)
        grad_q = _zeros(grad_history_query, BLOCK, TILE_DIM, number)  # a layer [I, d]
        grad_factor = tl.zeros([BLOCK], number)  # [I]
        # The loop includes emotions even if none takes part, to write the zeros of grad_correlation.
        end = tl.where((tl.max(receives.to(tl.int32), 0) > 0) | emotional, emotions, 0)
        for start in range(0, end, COLUMNS):
            column = start + tl.arange(0, COLUMNS)  # [J]
            sends = takes_part(words + column, column < emotions, word_mask, emotion_mask, words)
            k = load_all(
                history_key, history_offset, words + column, history_row, sends, DIM, TILE_DIM, PRECISION
            )
            i, j = row[:, None], column[None, :]
            heard = heard_by((node - words)[:, None], j, receives[:, None], sends[None, :])
            initial = edge_values(emotion_weight, 0, correlation, i, j, emotional, heard, emotions)
            upstream = edge_values(grad_to_word, word_row, grad_to_emotion, i, j, emotional, heard, emotions)
            u = factors(q, k, scale, PRECISION)  # a layer [I, J]
            grad_u, grad_initial, grad_r = _gradients(u, upstream, initial, factor[:, None], heard)
            if len(grad_q) > 0:  # Triton 3.3 fails on a loop that carries only an empty tuple
                grad_q = _accumulate(
                    grad_q, wanted(grad_u, HISTORY_QUERY), wanted(k, HISTORY_QUERY), PRECISION
                )
            if grad_row_factor is not None:
                grad_factor += tl.sum(grad_r, 1)
            if grad_correlation is not None:
                entry = grad_correlation + (pair * emotions + i) * emotions + j
                tl.store(entry, grad_initial, mask=(exists & (node >= words))[:, None] & (j < emotions))
        _store_all(
            grad_history_query, gradient_offset, node, gradient_row, grad_q, scale, exists, DIM, TILE_DIM
        )
        if grad_row_factor is not None:
            tl.store(grad_row_factor + pair * nodes + node, grad_factor, mask=exists)
        # The words' keys are not used.
        nothing = _zeros(grad_history_key, BLOCK, TILE_DIM, number)
        of_word = exists & (node < words)
        _store_all(
            grad_history_key, gradient_offset, node, gradient_row, nothing, 1.0, of_word, DIM, TILE_DIM
        )
