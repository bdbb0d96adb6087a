"""Attention on the emotion graph, forward and backward, without any N x N tensor.

An edge is recomputed, tile by tile, from what determines it: E_ij = E0_ij * r_i * prod_m u^m_ij, where u^m_ij = 1 +
scale * q^m_i . k^m_j comes from an earlier layer m (Eqs. 5 and 7 unrolled). docs/kernels.md derives the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecore_kernels.layout import (
    asked,
    dense_rows,
    empty_rows,
    empty_saved,
    laid_out_like,
)
from ecore_kernels.triton_kernels import launch
from ecore_kernels.triton_kernels.tiles import (
    add_product,
    exponent,
    inner_product,
    inner_sums,
    last_heard,
    load_pieces,
    number_of,
    place_of_receiver,
    scaled,
    store_pieces,
    takes_no_part,
    unheard_self,
    wanted,
    write_order,
    zero_pieces,
)

CHUNK = 512  # nodes that are put in order at a time

# Sizes and strides differ from batch to batch: compiling anew where one happens to be a multiple of 16 would cost more
# than it gains. VECTOR tells the compiler what it needs.
VARYING = [
    "plane", "resolutions", "words", "emotions", "correlation_batch", "zero", "scale_bits",
    *(
        f"{of}_{name}"
        for of in ("query", "value", "output", "gradient", "value_gradient")
        for name in ("batch", "head", "row")
    ),
]  # fmt: skip


@triton.jit
def _saved_of(saved, plane, pair, nodes):
    """Where a (b, k) has what the forward leaves the backward, its planes of that many elements.

    Returns:
        by place in the order, receivers' maximum and one over their sum, and E0 of the edges that the node there sends
        to words; the order; the counts of emotions and of nodes that take part.
    """
    plane = plane.to(tl.int64)
    order = (saved + 3 * plane).to(tl.pointer_type(tl.int32), bitcast=True)
    counts = (saved + 4 * plane).to(tl.pointer_type(tl.int32), bitcast=True)
    saved += pair * nodes
    return saved, saved + plane, saved + 2 * plane, order + pair * nodes, counts + pair * 2


@triton.jit
def _initial_edges(
    receiver,  # places in the order
    sender,
    receiver_node,
    sender_node,
    weight,  # of the senders' edges to words
    correlation,  # [P, P]
    words,
    emotions,
    emotion_count,
    between_emotions,  # whether the tile may hold edges between emotions
    COLUMNS: tl.constexpr,
):
    """E0 of a tile: [receivers, senders], or with COLUMNS [senders, receivers]."""
    receiver = tl.expand_dims(receiver, 1 - COLUMNS)
    sender = tl.expand_dims(sender, COLUMNS)
    edge = tl.expand_dims(weight, COLUMNS) + tl.zeros_like(receiver).to(weight.dtype)
    if between_emotions:
        learned = (receiver > 0) & (receiver <= emotion_count) & (sender > 0) & (sender <= emotion_count)
        row = tl.expand_dims(receiver_node, 1 - COLUMNS).to(tl.int64) - words
        column = tl.expand_dims(sender_node, COLUMNS) - words
        entry = tl.load(correlation + row * emotions + column, mask=learned, other=0.0)
        edge = tl.where(learned, entry.to(edge.dtype), edge)
    return edge


@triton.jit
def _load_all(bases, offset, node, stride, WIDTH: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr):
    """The rows of these nodes from every tensor of a tuple."""
    tiles = ()
    for m in tl.static_range(len(bases)):
        tiles += (load_pieces(bases[m] + offset, node, stride, WIDTH, PIECE, PRECISION),)
    return tiles


@triton.jit
def _all_u(
    own, bases, offset, node, stride,
    scale, WIDTH: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u = 1 + scale * q . k of every earlier layer, between its rows at hand and the rows of these nodes."""
    u = ()
    for m in tl.static_range(len(own)):
        # Loaded right before its product: loaded together, the layers would fill the registers.
        rows = load_pieces(bases[m] + offset, node, stride, WIDTH, PIECE, PRECISION)
        u += (1.0 + scale * inner_product(own[m], rows, PRECISION),)
    return u


@triton.jit
def _weighted(score, edge, factor, u):
    """Scores times their edges, multiplied in the one order that forward and backward share."""
    x = score * edge
    if factor is not None:
        x *= factor
    for m in tl.static_range(len(u)):
        x *= u[m]
    return x


@triton.jit
def _whole_edges(edge, factor, u):
    """The edges of a tile, of E0, r of the receivers (None for 1) and every layer's u."""
    if factor is not None:
        edge = edge * factor
    for m in tl.static_range(len(u)):
        edge *= u[m]
    return edge


@triton.jit(do_not_specialize=VARYING)
def _forward(
    query, key, value,  # [B, K, N, d], [B, K, N, d], [B, K, N, dv]
    history_query, history_key,  # tuples of [B, K, N, d]
    word_weight, word_mask,  # [B, M], [B, K, M]
    emotion_weight, correlation, emotion_mask,  # [B, P], [P, P] or [B, P, P], [B, P] or None
    row_factor,  # [B, K, N] or None
    output,  # [B, K, N or M, dv]
    saved,  # [5, B, K, N], for the backward: see _saved_of
    plane, resolutions, words, emotions, correlation_batch,
    query_batch, query_head, query_row, value_batch, value_head, value_row, output_batch, output_head, output_row,
    scale_bits: tl.int64, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PIECE: tl.constexpr,
    VECTOR: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, WORDS_ONLY: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK receivers of one (b, k), over all whom they hear, STEP at a time."""
    nodes = words + emotions
    receivers = words if WORDS_ONLY else nodes
    blocks = tl.cdiv(receivers, BLOCK)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    block = tl.where(
        block == 0, 0, blocks - block
    )  # the longest first: [CLS] hears all, the last words nearly all
    batch, head = pair // resolutions, pair % resolutions

    query_offset = (batch * query_batch + head * query_head) * VECTOR
    value_offset = (batch * value_batch + head * value_head) * VECTOR
    query_row *= VECTOR
    value_row *= VECTOR
    output_row *= VECTOR
    output += (batch * output_batch + head * output_head) * VECTOR
    word_mask += pair * words
    if emotion_mask is not None:
        emotion_mask += batch * emotions
    correlation += batch * correlation_batch
    _, _, weight, order, counts = _saved_of(saved, plane, pair, nodes)
    emotion_count, count = write_order(
        word_mask, emotion_mask, word_weight + batch * words, emotion_weight + batch * emotions,
        order, weight, words, emotions, CHUNK,
    )  # fmt: skip
    tl.store(counts, emotion_count)
    tl.store(counts + 1, count)

    row = block * BLOCK + tl.arange(0, BLOCK)
    number: tl.constexpr = saved.dtype.element_ty
    scale = number_of(scale_bits, number)
    nothing = zero_pieces(BLOCK, VALUE_DIM, PIECE, number)
    out = takes_no_part(row, word_mask, emotion_mask, words, receivers)
    store_pieces(output, row, output_row, nothing, out, VALUE_DIM, PIECE)
    skipped = emotion_count if WORDS_ONLY else 0
    if block * BLOCK >= count - skipped:
        return

    exists = row < count - skipped
    place = place_of_receiver(row, skipped, count)
    node = tl.load(order + place)
    last = last_heard(place, emotion_count, count)[:, None]
    itself = unheard_self(place, emotion_count)[:, None]
    q = load_pieces(query + query_offset, node, query_row, DIM, PIECE, PRECISION)
    past = _load_all(history_query, query_offset, node, query_row, DIM, PIECE, PRECISION)
    if row_factor is not None:
        factor = tl.load(row_factor + pair * nodes + node)[:, None]
    else:
        factor = None
    maximum = tl.full([BLOCK], float("-inf"), number)
    normalizer = tl.zeros([BLOCK], number)
    total = zero_pieces(BLOCK, VALUE_DIM, PIECE, number)
    end = tl.minimum(tl.maximum((block + 1) * BLOCK + skipped, emotion_count + 1), count)
    end = tl.where(block == 0, count, end)
    for start in range(0, end, STEP):
        sender = start + tl.arange(0, STEP)
        sender_place = tl.minimum(sender, count - 1)
        sender_node = tl.load(order + sender_place)
        if WORDS_ONLY:
            between = False
        else:
            between = (block * BLOCK <= emotion_count) & (start <= emotion_count)
        edge = _initial_edges(
            place, sender_place, node, sender_node, tl.load(weight + sender_place), correlation, words, emotions,
            emotion_count, between, False,
        )  # fmt: skip
        # Every tile is loaded right before its product: loaded together, they would fill shared memory and registers.
        k = load_pieces(key + query_offset, sender_node, query_row, DIM, PIECE, PRECISION)
        score = scale * inner_product(q, k, PRECISION)
        u = _all_u(past, history_key, query_offset, sender_node, query_row, scale, DIM, PIECE, PRECISION)
        x = exponent(_weighted(score, edge, factor, u))
        x = tl.where((sender[None, :] <= last) & (sender[None, :] != itself), x, float("-inf"))
        larger = tl.maximum(maximum, tl.max(x, 1))
        # Everybody hears [CLS], in the first tile; but what is heard there may all have overflowed.
        offset = tl.where(larger == float("-inf"), 0.0, larger)
        p = tl.exp2(x - offset[:, None])
        shrink = tl.exp2(maximum - offset)
        normalizer = normalizer * shrink + tl.sum(p, 1)
        v = load_pieces(value + value_offset, sender_node, value_row, VALUE_DIM, PIECE, PRECISION)
        total = add_product(scaled(total, shrink[:, None]), p, v, PRECISION)
        maximum = larger
    inverse = 1.0 / normalizer
    total = scaled(total, inverse[:, None])
    store_pieces(output, node, output_row, total, exists, VALUE_DIM, PIECE)
    saved_maximum, saved_inverse, _, _, _ = _saved_of(saved, plane, pair, nodes)
    tl.store(saved_maximum + place, maximum, mask=exists)
    tl.store(saved_inverse + place, inverse, mask=exists)


@triton.jit
def _attention(x, heard, maximum, inverse):
    """Attention of a tile as the forward had it, of its weighted scores and its receivers' maximum and inverse."""
    return tl.where(heard, tl.exp2(exponent(x) - maximum) * inverse, 0.0)


@triton.jit
def _tile(
    score, u, attention, grad_attention,  # of one tile [staying, streaming]; the last is dO V^T
    edge, factor,  # E0 of the tile; r of its receivers, or None
    heard, delta,  # who hears whom; see _sum_deltas
):  # fmt: skip
    """The backward of one tile, with G = A (dO V^T - delta) the gradient of the weighted scores.

    Returns:
        the gradients of the scores, of every layer's u, of E0, and of r before its sum over senders; 0 where nothing is
        heard.
    """
    scaled_edge = edge
    if factor is not None:
        scaled_edge = edge * factor
    g = attention * (grad_attention - delta)
    gs = g * score
    grad_u = ()
    for m in tl.static_range(len(u)):
        others = scaled_edge  # the product over the other factors: u may be 0, so never divide
        for n in tl.static_range(len(u)):
            if n != m:
                others *= u[n]
        grad_u += (tl.where(heard, gs * others, 0.0),)
    grad_edge = gs
    if factor is not None:
        grad_edge *= factor
    grad_factor = gs * edge
    for m in tl.static_range(len(u)):
        grad_edge *= u[m]
        grad_factor *= u[m]
    # What is not heard may be NaN, which no product with an attention of 0 takes away.
    grad_edge = tl.where(heard, grad_edge, 0.0)
    grad_factor = tl.where(heard, grad_factor, 0.0)
    return tl.where(heard, g * _whole_edges(edge, factor, u), 0.0), grad_u, grad_edge, grad_factor


@triton.jit(do_not_specialize=VARYING)
def _sum_deltas(
    query, key, value, history_query, history_key, correlation, row_factor, grad_output, saved,
    deltas,  # [B, K, N], written: by place in the order
    plane, resolutions, words, emotions, correlation_batch,
    query_batch, query_head, query_row, value_batch, value_head, value_row, output_batch, output_head, output_row,
    scale_bits: tl.int64, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PIECE: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, WORDS_ONLY: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program: delta of BLOCK receivers of one (b, k), the sum of A (dO V^T) over those whom they hear.

    In exact numbers that is dO O. But where softmaxes saturate, the backward multiplies what is left of a row's sum of
    G = A (dO V^T - delta) by its scores: so delta is of the very numbers that G is of.
    """
    nodes = words + emotions
    blocks = tl.cdiv(words if WORDS_ONLY else nodes, BLOCK)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    block = tl.where(block == 0, 0, blocks - block)  # the longest first
    batch, head = pair // resolutions, pair % resolutions
    query_offset = (batch * query_batch + head * query_head) * VECTOR
    query_row *= VECTOR
    value_row *= VECTOR
    output_row *= VECTOR
    value += (batch * value_batch + head * value_head) * VECTOR
    grad_output += (batch * output_batch + head * output_head) * VECTOR
    correlation += batch * correlation_batch
    saved_maximum, saved_inverse, weight, order, counts = _saved_of(saved, plane, pair, nodes)
    emotion_count = tl.load(counts)
    count = tl.load(counts + 1)
    skipped = emotion_count if WORDS_ONLY else 0
    if block * BLOCK >= count - skipped:
        return

    number: tl.constexpr = saved.dtype.element_ty
    scale = number_of(scale_bits, number)
    row = block * BLOCK + tl.arange(0, BLOCK)
    place = place_of_receiver(row, skipped, count)
    node = tl.load(order + place)
    last = last_heard(place, emotion_count, count)[:, None]
    itself = unheard_self(place, emotion_count)[:, None]
    maximum = tl.load(saved_maximum + place)[:, None]
    inverse = tl.load(saved_inverse + place)[:, None]
    if row_factor is not None:
        factor = tl.load(row_factor + pair * nodes + node)[:, None]
    else:
        factor = None
    q = load_pieces(query + query_offset, node, query_row, DIM, PIECE, PRECISION)
    past = _load_all(history_query, query_offset, node, query_row, DIM, PIECE, PRECISION)
    do = load_pieces(grad_output, node, output_row, VALUE_DIM, PIECE, PRECISION)
    delta = tl.zeros([BLOCK], number)
    end = tl.minimum(tl.maximum((block + 1) * BLOCK + skipped, emotion_count + 1), count)
    end = tl.where(block == 0, count, end)
    for start in range(0, end, STEP):
        sender = start + tl.arange(0, STEP)
        sender_place = tl.minimum(sender, count - 1)
        sender_node = tl.load(order + sender_place)
        if WORDS_ONLY:
            between = False
        else:
            between = (block * BLOCK <= emotion_count) & (start <= emotion_count)
        edge = _initial_edges(
            place, sender_place, node, sender_node, tl.load(weight + sender_place), correlation, words, emotions,
            emotion_count, between, False,
        )  # fmt: skip
        heard = (sender[None, :] <= last) & (sender[None, :] != itself)
        k = load_pieces(key + query_offset, sender_node, query_row, DIM, PIECE, PRECISION)
        score = scale * inner_product(q, k, PRECISION)
        u = _all_u(past, history_key, query_offset, sender_node, query_row, scale, DIM, PIECE, PRECISION)
        v = load_pieces(value, sender_node, value_row, VALUE_DIM, PIECE, PRECISION)
        grad_attention = inner_product(do, v, PRECISION)
        attention = _attention(_weighted(score, edge, factor, u), heard, maximum, inverse)
        # What is not heard may be NaN, which no attention of 0 takes away.
        delta += tl.sum(tl.where(heard, attention * grad_attention, 0.0), 1)
    tl.store(deltas + pair * nodes + place, delta, mask=row < count - skipped)


@triton.jit
def _add_all(
    totals,
    tiles,
    bases,
    offset,
    node,
    stride,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every total plus its tile's product with the rows of these nodes."""
    sums = ()
    for m in tl.static_range(len(totals)):
        rows = load_pieces(bases[m] + offset, node, stride, WIDTH, PIECE, PRECISION)
        sums += (add_product(totals[m], tiles[m], rows, PRECISION),)
    return sums


@triton.jit
def _zeros(like, ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr, TYPE: tl.constexpr):
    """Rows of zeros for every member of a tuple."""
    tiles = ()
    for _ in tl.static_range(len(like)):
        tiles += (zero_pieces(ROWS, WIDTH, PIECE, TYPE),)
    return tiles


@triton.jit
def _store_all(bases, offset, node, stride, tiles, scale, stored, WIDTH: tl.constexpr, PIECE: tl.constexpr):
    for m in tl.static_range(len(bases)):
        store_pieces(bases[m] + offset, node, stride, scaled(tiles[m], scale), stored, WIDTH, PIECE)


@triton.jit(do_not_specialize=VARYING)
def _backward(
    query, key, value, history_query, history_key, correlation, word_mask, emotion_mask, row_factor,
    output, grad_output, saved, deltas,  # the last from _sum_deltas, or None: then delta is dO O
    # None, or not in the tuple, where not wanted; of the last three [B, K, N], [B, K, P], [B, K, P, P]
    grad_query, grad_key, grad_value, grad_history_query, grad_history_key,
    grad_row_factor, grad_emotion_weight, grad_correlation,
    plane, resolutions, words, emotions, correlation_batch, zero,
    query_batch, query_head, query_row, value_batch, value_head, value_row, output_batch, output_head, output_row,
    gradient_batch, gradient_head, gradient_row, value_gradient_batch, value_gradient_head, value_gradient_row,
    scale_bits: tl.int64, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PIECE: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, WORDS_ONLY: tl.constexpr,
    RECEIVERS: tl.constexpr, SENDERS: tl.constexpr,  # whether anything is wanted of the one, and of the other
    SCORES: tl.constexpr,  # whether anything but grad_value is wanted of the senders
    HISTORY_QUERY: tl.constexpr, HISTORY_KEY: tl.constexpr,  # layers whose gradients are wanted, a bit each
    BLOCK: tl.constexpr, STEP: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of BLOCK nodes of one (b, k), as receivers or, in the later programs, as senders.

    With RELOAD the tiles that stream by are loaded once more for their second product instead of being kept for it:
    ``zero`` is 0, but the compiler does not know.
    """
    nodes = words + emotions
    receivers = words if WORDS_ONLY else nodes
    receiver_blocks = tl.cdiv(receivers, BLOCK) * RECEIVERS
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
    saved_maximum, saved_inverse, weight, order, counts = _saved_of(saved, plane, pair, nodes)
    emotion_count = tl.load(counts)
    count = tl.load(counts + 1)
    skipped = emotion_count if WORDS_ONLY else 0
    number: tl.constexpr = saved.dtype.element_ty
    scale = number_of(scale_bits, number)

    if RECEIVERS:
        if block < receiver_blocks:
            block = tl.where(block == 0, 0, receiver_blocks - block)  # the longest first
            row = block * BLOCK + tl.arange(0, BLOCK)
            exists = row < count - skipped
            place = place_of_receiver(row, skipped, count)
            node = tl.load(order + place)
            last = last_heard(place, emotion_count, count)[:, None]
            itself = unheard_self(place, emotion_count)[:, None]
            maximum = tl.load(saved_maximum + place)[:, None]
            inverse = tl.load(saved_inverse + place)[:, None]
            if row_factor is not None:
                factor = tl.load(row_factor + pair * nodes + node)[:, None]
            else:
                factor = None
            q = load_pieces(query + query_offset, node, query_row, DIM, PIECE, PRECISION)
            past = _load_all(history_query, query_offset, node, query_row, DIM, PIECE, PRECISION)
            do = load_pieces(grad_output, node, output_row, VALUE_DIM, PIECE, PRECISION)
            if deltas is not None:
                delta = tl.load(deltas + pair * nodes + place)[:, None]
            else:
                o = load_pieces(output, node, output_row, VALUE_DIM, PIECE, "ieee")
                delta = inner_sums(do, o, False)
            grad_q = zero_pieces(BLOCK, DIM, PIECE, number)
            grad_past = _zeros(grad_history_query, BLOCK, DIM, PIECE, number)
            grad_factor = tl.zeros([BLOCK], number)
            end = tl.minimum(tl.maximum((block + 1) * BLOCK + skipped, emotion_count + 1), count)
            end = tl.where(block == 0, count, end)
            end = tl.where(block * BLOCK < count - skipped, end, 0)
            for start in range(0, end, STEP):
                sender = start + tl.arange(0, STEP)
                sender_place = tl.minimum(sender, count - 1)
                sender_node = tl.load(order + sender_place)
                if WORDS_ONLY:
                    between = False
                else:
                    between = (block * BLOCK <= emotion_count) & (start <= emotion_count)
                edge = _initial_edges(
                    place, sender_place, node, sender_node, tl.load(weight + sender_place), correlation, words,
                    emotions, emotion_count, between, False,
                )  # fmt: skip
                heard = (sender[None, :] <= last) & (sender[None, :] != itself)
                k = load_pieces(key + query_offset, sender_node, query_row, DIM, PIECE, PRECISION)
                score = scale * inner_product(q, k, PRECISION)
                u = _all_u(
                    past, history_key, query_offset, sender_node, query_row, scale, DIM, PIECE, PRECISION
                )
                v = load_pieces(value, sender_node, value_row, VALUE_DIM, PIECE, PRECISION)
                grad_attention = inner_product(do, v, PRECISION)
                attention = _attention(_weighted(score, edge, factor, u), heard, maximum, inverse)
                grad_score, grad_u, _, grad_r = _tile(
                    score, u, attention, grad_attention, edge, factor, heard, delta
                )
                if RELOAD:
                    sender_node += zero
                if grad_query is not None:
                    k = load_pieces(key + query_offset, sender_node, query_row, DIM, PIECE, PRECISION)
                    grad_q = add_product(grad_q, grad_score, k, PRECISION)
                grad_past = _add_all(
                    grad_past, wanted(grad_u, HISTORY_QUERY), wanted(history_key, HISTORY_QUERY), query_offset,
                    sender_node, query_row, DIM, PIECE, PRECISION,
                )  # fmt: skip
                if grad_row_factor is not None:
                    grad_factor += tl.sum(grad_r, 1)
            # Computed anew: the compiler would otherwise keep all this in registers during the loop.
            pair = ((tl.program_id(0) + zero) // blocks).to(tl.int64)
            gradient_offset = (
                pair // resolutions * gradient_batch + pair % resolutions * gradient_head
            ) * VECTOR
            row = (block + zero) * BLOCK + tl.arange(0, BLOCK)
            exists = row < count - skipped
            node = tl.load(order + place_of_receiver(row, skipped, count))
            out = takes_no_part(row, word_mask, emotion_mask, words, receivers)
            nothing = zero_pieces(BLOCK, DIM, PIECE, number)
            if grad_query is not None:
                grad_query += gradient_offset
                store_pieces(grad_query, node, gradient_row, scaled(grad_q, scale), exists, DIM, PIECE)
                store_pieces(grad_query, row, gradient_row, nothing, out, DIM, PIECE)
            _store_all(
                grad_history_query, gradient_offset, node, gradient_row, grad_past, scale, exists, DIM, PIECE
            )
            for m in tl.static_range(len(grad_history_query)):
                store_pieces(
                    grad_history_query[m] + gradient_offset, row, gradient_row, nothing, out, DIM, PIECE
                )
            if grad_row_factor is not None:
                tl.store(grad_row_factor + pair * nodes + node, grad_factor, mask=exists)
                tl.store(grad_row_factor + pair * nodes + row, tl.zeros([BLOCK], number), mask=out)
            if WORDS_ONLY:  # noqa: SIM102, settled when compiling
                if block == 0:  # no program has the emotions as receivers
                    for start in range(0, emotions, BLOCK):
                        row = words + start + tl.arange(0, BLOCK)
                        out = row < nodes
                        if grad_query is not None:
                            store_pieces(grad_query, row, gradient_row, nothing, out, DIM, PIECE)
                        for m in tl.static_range(len(grad_history_query)):
                            past_gradient = grad_history_query[m] + gradient_offset
                            store_pieces(past_gradient, row, gradient_row, nothing, out, DIM, PIECE)
                        if grad_row_factor is not None:
                            zeros = tl.zeros([BLOCK], number)
                            tl.store(grad_row_factor + pair * nodes + row, zeros, mask=out)
            return
        block -= receiver_blocks

    if SENDERS:
        row = block * BLOCK + tl.arange(0, BLOCK)
        exists = row < count
        place = tl.minimum(row, count - 1)
        node = tl.load(order + place)
        own_weight = tl.load(weight + place)
        k = load_pieces(key + query_offset, node, query_row, DIM, PIECE, PRECISION)
        past = _load_all(history_key, query_offset, node, query_row, DIM, PIECE, PRECISION)
        if SCORES:
            v = load_pieces(value, node, value_row, VALUE_DIM, PIECE, PRECISION)
        grad_k = zero_pieces(BLOCK, DIM, PIECE, number)
        grad_past = _zeros(grad_history_key, BLOCK, DIM, PIECE, number)
        grad_v = zero_pieces(BLOCK, VALUE_DIM, PIECE, number)
        grad_weight = tl.zeros([BLOCK], number)
        emotional = block * BLOCK <= emotion_count
        # Who hears these senders: the receivers of the first block, for it holds [CLS]; and everybody who comes after
        # them, or, where there are emotions among them, simply everybody.
        following = tl.maximum((block * BLOCK - skipped) // STEP * STEP, STEP)
        following = tl.where(emotional, STEP, following)
        steps = 1 + tl.cdiv(tl.maximum(count - skipped - following, 0), STEP)
        steps = tl.where(block * BLOCK < count, steps, 0)
        for step in range(0, steps):
            start = tl.where(step == 0, 0, following + (step - 1) * STEP)
            receiver = start + tl.arange(0, STEP)
            heard_at_all = receiver < count - skipped
            receiver_place = place_of_receiver(receiver, skipped, count)
            receiver_node = tl.load(order + receiver_place)
            if row_factor is not None:
                factor = tl.load(row_factor + pair * nodes + receiver_node)[None, :]
            else:
                factor = None
            if WORDS_ONLY:
                between = False
            else:
                between = emotional & (start <= emotion_count)
            edge = _initial_edges(
                receiver_place, place, receiver_node, node, own_weight, correlation, words, emotions,
                emotion_count, between, True,
            )  # fmt: skip
            last = tl.where(heard_at_all, last_heard(receiver_place, emotion_count, count), -1)[None, :]
            itself = unheard_self(receiver_place, emotion_count)[None, :]
            heard = (row[:, None] <= last) & (row[:, None] != itself)
            q = load_pieces(query + query_offset, receiver_node, query_row, DIM, PIECE, PRECISION)
            score = scale * inner_product(k, q, PRECISION)
            u = _all_u(
                past, history_query, query_offset, receiver_node, query_row, scale, DIM, PIECE, PRECISION
            )
            if SCORES:
                do = load_pieces(grad_output, receiver_node, output_row, VALUE_DIM, PIECE, PRECISION)
                grad_attention = inner_product(v, do, PRECISION)
                if deltas is not None:
                    delta = tl.load(deltas + pair * nodes + receiver_place)[None, :]
                else:
                    o = load_pieces(output, receiver_node, output_row, VALUE_DIM, PIECE, "ieee")
                    delta = inner_sums(o, do, True)
            maximum = tl.load(saved_maximum + receiver_place)[None, :]
            inverse = tl.load(saved_inverse + receiver_place)[None, :]
            attention = _attention(_weighted(score, edge, factor, u), heard, maximum, inverse)
            if SCORES:
                grad_score, grad_u, grad_edge, _ = _tile(
                    score, u, attention, grad_attention, edge, factor, heard, delta
                )
            if RELOAD:
                receiver_node += zero
            if grad_value is not None:
                do = load_pieces(grad_output, receiver_node, output_row, VALUE_DIM, PIECE, PRECISION)
                grad_v = add_product(grad_v, attention, do, PRECISION)
            if grad_key is not None:
                q = load_pieces(query + query_offset, receiver_node, query_row, DIM, PIECE, PRECISION)
                grad_k = add_product(grad_k, grad_score, q, PRECISION)
            if SCORES:
                grad_past = _add_all(
                    grad_past, wanted(grad_u, HISTORY_KEY), wanted(history_query, HISTORY_KEY), query_offset,
                    receiver_node, query_row, DIM, PIECE, PRECISION,
                )  # fmt: skip
            is_emotion = ((receiver_place > 0) & (receiver_place <= emotion_count))[None, :]
            if grad_emotion_weight is not None:
                grad_weight += tl.sum(tl.where(is_emotion, 0.0, grad_edge), 1)
            if grad_correlation is not None:  # noqa: SIM102, settled when compiling; the next one in every tile
                if between:
                    to_emotion = (receiver_node - words).to(tl.int64)[None, :] * emotions
                    from_emotion = (node - words)[:, None]
                    sends = exists & (place > 0) & (place <= emotion_count)
                    tl.store(
                        grad_correlation + pair * emotions * emotions + to_emotion + from_emotion,
                        grad_edge,
                        mask=is_emotion & heard_at_all[None, :] & sends[:, None],
                    )
        pair = ((tl.program_id(0) + zero) // blocks).to(tl.int64)  # as above
        batch, head = pair // resolutions, pair % resolutions
        gradient_offset = (batch * gradient_batch + head * gradient_head) * VECTOR
        row = (block + zero) * BLOCK + tl.arange(0, BLOCK)
        exists = row < count
        place = tl.minimum(row, count - 1)
        node = tl.load(order + place)
        out = takes_no_part(row, word_mask, emotion_mask, words, nodes)
        nothing = zero_pieces(BLOCK, DIM, PIECE, number)
        if grad_key is not None:
            grad_key += gradient_offset
            store_pieces(grad_key, node, gradient_row, scaled(grad_k, scale), exists, DIM, PIECE)
            store_pieces(grad_key, row, gradient_row, nothing, out, DIM, PIECE)
        _store_all(
            grad_history_key, gradient_offset, node, gradient_row, grad_past, scale, exists, DIM, PIECE
        )
        for m in tl.static_range(len(grad_history_key)):
            store_pieces(grad_history_key[m] + gradient_offset, row, gradient_row, nothing, out, DIM, PIECE)
        if grad_value is not None:
            value_gradient_row *= VECTOR
            grad_value += (batch * value_gradient_batch + head * value_gradient_head) * VECTOR
            store_pieces(grad_value, node, value_gradient_row, grad_v, exists, VALUE_DIM, PIECE)
            nothing = zero_pieces(BLOCK, VALUE_DIM, PIECE, number)
            store_pieces(grad_value, row, value_gradient_row, nothing, out, VALUE_DIM, PIECE)
        if grad_emotion_weight is not None:
            sends = exists & (place > 0) & (place <= emotion_count)
            tl.store(grad_emotion_weight + pair * emotions + node - words, grad_weight, mask=sends)


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
