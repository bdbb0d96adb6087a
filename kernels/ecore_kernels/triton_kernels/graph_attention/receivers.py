"""The backward by rows: gradients of receivers."""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.graph_attention.edges import (
    all_u,
    attention_of,
    end_of_senders,
    initial_edges,
    load_all,
    weighted,
)
from ecore_kernels.triton_kernels.graph_attention.gradients import (
    add_all,
    gradients_of_tile,
    store_all,
    zeros_like_all,
)
from ecore_kernels.triton_kernels.tiles import (
    add_product,
    inner_product,
    inner_sums,
    last_heard,
    load_pieces,
    place_of_receiver,
    scaled,
    store_pieces,
    takes_no_part,
    unheard_self,
    wanted,
    zero_pieces,
)


@triton.jit
def gradients_of_receivers(
    block, blocks,  # of receivers; programs of a (b, k)
    query, key, value, history_query, history_key,  # the value's and the output's of this (b, k) from here on
    correlation, word_mask, emotion_mask, row_factor, output, grad_output,
    saved_maximum, saved_inverse, weight, order, deltas,  # by place in the order
    grad_query, grad_history_query, grad_row_factor,
    pair, resolutions, words, emotions, emotion_count, count, zero,
    query_offset, query_row, value_row, output_row, gradient_batch, gradient_head, gradient_row,
    scale, number: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PIECE: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, WORDS_ONLY: tl.constexpr,
    HISTORY_QUERY: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """By rows: dq, dq^m and dr of BLOCK receivers, over all senders that they hear, STEP at a time.

    Shape tags: I = BLOCK receivers, which stay; J = STEP senders, which stream by.
    """
    nodes = words + emotions
    skipped = emotion_count if WORDS_ONLY else 0
    row = block * BLOCK + tl.arange(0, BLOCK)  # [I]
    exists = row < count - skipped
    place = place_of_receiver(row, skipped, count)
    node = tl.load(order + place)
    last = last_heard(place, emotion_count, count)[:, None]  # [I, 1]
    itself = unheard_self(place, emotion_count)[:, None]
    maximum = tl.load(saved_maximum + place)[:, None]
    inverse = tl.load(saved_inverse + place)[:, None]
    if row_factor is not None:
        factor = tl.load(row_factor + pair * nodes + node)[:, None]
    else:
        factor = None
    q = load_pieces(query + query_offset, node, query_row, DIM, PIECE, PRECISION)  # [I, d]
    past = load_all(history_query, query_offset, node, query_row, DIM, PIECE, PRECISION)  # a layer [I, d]
    do = load_pieces(grad_output, node, output_row, VALUE_DIM, PIECE, PRECISION)  # [I, dv]
    if deltas is not None:
        delta = tl.load(deltas + pair * nodes + place)[:, None]  # [I, 1]
    else:
        o = load_pieces(output, node, output_row, VALUE_DIM, PIECE, "ieee")
        delta = inner_sums(do, o, False)
    grad_q = zero_pieces(BLOCK, DIM, PIECE, number)  # [I, d]
    grad_past = zeros_like_all(grad_history_query, BLOCK, DIM, PIECE, number)  # a layer [I, d]
    grad_factor = tl.zeros([BLOCK], number)
    end = end_of_senders(block, skipped, emotion_count, count, BLOCK)
    end = tl.where(block * BLOCK < count - skipped, end, 0)
    for start in range(0, end, STEP):
        sender = start + tl.arange(0, STEP)  # [J]
        sender_place = tl.minimum(sender, count - 1)
        sender_node = tl.load(order + sender_place)
        if WORDS_ONLY:
            between = False
        else:
            between = (block * BLOCK <= emotion_count) & (start <= emotion_count)
        edge = initial_edges(
            place, sender_place, node, sender_node, tl.load(weight + sender_place), correlation, words,
            emotions, emotion_count, between, False,
        )  # fmt: skip  # [I, J]
        heard = (sender[None, :] <= last) & (sender[None, :] != itself)
        k = load_pieces(key + query_offset, sender_node, query_row, DIM, PIECE, PRECISION)  # [J, d]
        score = scale * inner_product(q, k, PRECISION)  # [I, J]
        u = all_u(past, history_key, query_offset, sender_node, query_row, scale, DIM, PIECE, PRECISION)
        v = load_pieces(value, sender_node, value_row, VALUE_DIM, PIECE, PRECISION)  # [J, dv]
        grad_attention = inner_product(do, v, PRECISION)  # [I, J]
        attention = attention_of(weighted(score, edge, factor, u), heard, maximum, inverse)
        grad_score, grad_u, _, grad_r = gradients_of_tile(
            score, u, attention, grad_attention, edge, factor, heard, delta
        )
        if RELOAD:
            sender_node += zero
        if grad_query is not None:
            k = load_pieces(key + query_offset, sender_node, query_row, DIM, PIECE, PRECISION)
            grad_q = add_product(grad_q, grad_score, k, PRECISION)
        grad_past = add_all(
            grad_past, wanted(grad_u, HISTORY_QUERY), wanted(history_key, HISTORY_QUERY), query_offset,
            sender_node, query_row, DIM, PIECE, PRECISION,
        )  # fmt: skip
        if grad_row_factor is not None:
            grad_factor += tl.sum(grad_r, 1)
    # Computed again: otherwise the compiler would keep all this in registers during the loop.
    pair = ((tl.program_id(0) + zero) // blocks).to(tl.int64)
    gradient_offset = (pair // resolutions * gradient_batch + pair % resolutions * gradient_head) * VECTOR
    row = (block + zero) * BLOCK + tl.arange(0, BLOCK)  # [I]
    exists = row < count - skipped
    node = tl.load(order + place_of_receiver(row, skipped, count))
    out = takes_no_part(row, word_mask, emotion_mask, words, words if WORDS_ONLY else nodes)
    nothing = zero_pieces(BLOCK, DIM, PIECE, number)  # [I, d]
    if grad_query is not None:
        grad_query += gradient_offset
        store_pieces(grad_query, node, gradient_row, scaled(grad_q, scale), exists, DIM, PIECE)
        store_pieces(grad_query, row, gradient_row, nothing, out, DIM, PIECE)
    store_all(grad_history_query, gradient_offset, node, gradient_row, grad_past, scale, exists, DIM, PIECE)
    for m in tl.static_range(len(grad_history_query)):
        store_pieces(grad_history_query[m] + gradient_offset, row, gradient_row, nothing, out, DIM, PIECE)
    if grad_row_factor is not None:
        tl.store(grad_row_factor + pair * nodes + node, grad_factor, mask=exists)
        tl.store(grad_row_factor + pair * nodes + row, tl.zeros([BLOCK], number), mask=out)
    if WORDS_ONLY:  # noqa: SIM102, settled when compiling
        if block == 0:  # no program handles the emotions as receivers
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
