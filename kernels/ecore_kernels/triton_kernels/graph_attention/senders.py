"""The backward by columns: gradients of senders."""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.graph_attention.edges import (
    all_u,
    attention_of,
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
def gradients_of_senders(
    block, blocks,  # of senders; programs of a (b, k)
    query, key, value, history_query, history_key,  # the value's and the output's of this (b, k) from here on
    correlation, word_mask, emotion_mask, row_factor, output, grad_output,
    saved_maximum, saved_inverse, weight, order, deltas,  # by place in the order
    grad_key, grad_value, grad_history_key, grad_emotion_weight, grad_correlation,
    pair, resolutions, words, emotions, emotion_count, count, zero,
    query_offset, query_row, value_row, output_row, gradient_batch, gradient_head, gradient_row,
    value_gradient_batch, value_gradient_head, value_gradient_row,
    scale, number: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PIECE: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, WORDS_ONLY: tl.constexpr, SCORES: tl.constexpr,
    HISTORY_KEY: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """By columns: dk, dk^m, dv and dE0 of BLOCK senders, over all receivers that hear them, STEP at a time.

    Shape tags: J = BLOCK senders, which stay; I = STEP receivers, which stream by.
    """
    nodes = words + emotions
    skipped = emotion_count if WORDS_ONLY else 0
    row = block * BLOCK + tl.arange(0, BLOCK)  # [J]
    exists = row < count
    place = tl.minimum(row, count - 1)
    node = tl.load(order + place)
    own_weight = tl.load(weight + place)
    k = load_pieces(key + query_offset, node, query_row, DIM, PIECE, PRECISION)  # [J, d]
    past = load_all(history_key, query_offset, node, query_row, DIM, PIECE, PRECISION)  # a layer [J, d]
    if SCORES:
        v = load_pieces(value, node, value_row, VALUE_DIM, PIECE, PRECISION)  # [J, dv]
    grad_k = zero_pieces(BLOCK, DIM, PIECE, number)  # [J, d]
    grad_past = zeros_like_all(grad_history_key, BLOCK, DIM, PIECE, number)  # a layer [J, d]
    grad_v = zero_pieces(BLOCK, VALUE_DIM, PIECE, number)  # [J, dv]
    grad_weight = tl.zeros([BLOCK], number)
    emotional = block * BLOCK <= emotion_count
    # The receivers that hear these senders: those of the first block, since it holds [CLS], and all later ones; if
    # there are emotions among the senders, all receivers.
    following = tl.maximum((block * BLOCK - skipped) // STEP * STEP, STEP)
    following = tl.where(emotional, STEP, following)
    steps = 1 + tl.cdiv(tl.maximum(count - skipped - following, 0), STEP)
    steps = tl.where(block * BLOCK < count, steps, 0)
    for step in range(0, steps):
        start = tl.where(step == 0, 0, following + (step - 1) * STEP)
        receiver = start + tl.arange(0, STEP)  # [I]
        heard_at_all = receiver < count - skipped
        receiver_place = place_of_receiver(receiver, skipped, count)
        receiver_node = tl.load(order + receiver_place)
        if row_factor is not None:
            factor = tl.load(row_factor + pair * nodes + receiver_node)[None, :]  # [1, I]
        else:
            factor = None
        if WORDS_ONLY:
            between = False
        else:
            between = emotional & (start <= emotion_count)
        edge = initial_edges(
            receiver_place, place, receiver_node, node, own_weight, correlation, words, emotions,
            emotion_count, between, True,
        )  # fmt: skip  # [J, I]
        last = tl.where(heard_at_all, last_heard(receiver_place, emotion_count, count), -1)[None, :]  # [1, I]
        itself = unheard_self(receiver_place, emotion_count)[None, :]
        heard = (row[:, None] <= last) & (row[:, None] != itself)  # [J, I]
        q = load_pieces(query + query_offset, receiver_node, query_row, DIM, PIECE, PRECISION)  # [I, d]
        score = scale * inner_product(k, q, PRECISION)  # [J, I]
        u = all_u(past, history_query, query_offset, receiver_node, query_row, scale, DIM, PIECE, PRECISION)
        if SCORES:
            do = load_pieces(grad_output, receiver_node, output_row, VALUE_DIM, PIECE, PRECISION)  # [I, dv]
            grad_attention = inner_product(v, do, PRECISION)  # [J, I]
            if deltas is not None:
                delta = tl.load(deltas + pair * nodes + receiver_place)[None, :]  # [1, I]
            else:
                o = load_pieces(output, receiver_node, output_row, VALUE_DIM, PIECE, "ieee")
                delta = inner_sums(o, do, True)
        maximum = tl.load(saved_maximum + receiver_place)[None, :]
        inverse = tl.load(saved_inverse + receiver_place)[None, :]
        attention = attention_of(weighted(score, edge, factor, u), heard, maximum, inverse)
        if SCORES:
            grad_score, grad_u, grad_edge, _ = gradients_of_tile(
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
            grad_past = add_all(
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
    pair = ((tl.program_id(0) + zero) // blocks).to(tl.int64)  # as in gradients_of_receivers
    batch, head = pair // resolutions, pair % resolutions
    gradient_offset = (batch * gradient_batch + head * gradient_head) * VECTOR
    row = (block + zero) * BLOCK + tl.arange(0, BLOCK)  # [J]
    exists = row < count
    place = tl.minimum(row, count - 1)
    node = tl.load(order + place)
    out = takes_no_part(row, word_mask, emotion_mask, words, nodes)
    nothing = zero_pieces(BLOCK, DIM, PIECE, number)  # [J, d]
    if grad_key is not None:
        grad_key += gradient_offset
        store_pieces(grad_key, node, gradient_row, scaled(grad_k, scale), exists, DIM, PIECE)
        store_pieces(grad_key, row, gradient_row, nothing, out, DIM, PIECE)
    store_all(grad_history_key, gradient_offset, node, gradient_row, grad_past, scale, exists, DIM, PIECE)
    for m in tl.static_range(len(grad_history_key)):
        store_pieces(grad_history_key[m] + gradient_offset, row, gradient_row, nothing, out, DIM, PIECE)
    if grad_value is not None:
        value_gradient_row *= VECTOR
        grad_value += (batch * value_gradient_batch + head * value_gradient_head) * VECTOR
        store_pieces(grad_value, node, value_gradient_row, grad_v, exists, VALUE_DIM, PIECE)
        nothing = zero_pieces(BLOCK, VALUE_DIM, PIECE, number)  # [J, dv]
        store_pieces(grad_value, row, value_gradient_row, nothing, out, VALUE_DIM, PIECE)
    if grad_emotion_weight is not None:
        sends = exists & (place > 0) & (place <= emotion_count)
        tl.store(grad_emotion_weight + pair * emotions + node - words, grad_weight, mask=sends)
