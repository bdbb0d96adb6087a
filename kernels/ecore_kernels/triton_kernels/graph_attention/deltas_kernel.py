"""The kernel that runs before a backward in ieee and float64: delta of every receiver."""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.graph_attention.edges import (
    VARYING,
    all_u,
    attention_of,
    end_of_senders,
    initial_edges,
    load_all,
    saved_of,
    weighted,
)
from ecore_kernels.triton_kernels.tiles import (
    inner_product,
    last_heard,
    load_pieces,
    number_of,
    place_of_receiver,
    unheard_self,
)


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
    """One program: delta of BLOCK receivers of one (b, k), the sum of A (dO V^T) over the senders that they hear.

    In exact arithmetic that is dO O. But if a softmax saturates, the backward multiplies the rounding error in a row's
    sum of G = A (dO V^T - delta) by its scores, so delta is computed from the same numbers as G.
    Shape tags: I = BLOCK receivers, J = STEP senders.
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
    saved_maximum, saved_inverse, weight, order, counts = saved_of(saved, plane, pair, nodes)
    emotion_count = tl.load(counts)
    count = tl.load(counts + 1)
    skipped = emotion_count if WORDS_ONLY else 0
    if block * BLOCK >= count - skipped:
        return

    number: tl.constexpr = saved.dtype.element_ty
    scale = number_of(scale_bits, number)
    row = block * BLOCK + tl.arange(0, BLOCK)  # [I]
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
    past = load_all(history_query, query_offset, node, query_row, DIM, PIECE, PRECISION)
    do = load_pieces(grad_output, node, output_row, VALUE_DIM, PIECE, PRECISION)  # [I, dv]
    delta = tl.zeros([BLOCK], number)
    for start in range(0, end_of_senders(block, skipped, emotion_count, count, BLOCK), STEP):
        sender = start + tl.arange(0, STEP)  # [J]
        sender_place = tl.minimum(sender, count - 1)
        sender_node = tl.load(order + sender_place)
        if WORDS_ONLY:
            between = False
        else:
            between = (block * BLOCK <= emotion_count) & (start <= emotion_count)
        edge = initial_edges(
            place, sender_place, node, sender_node, tl.load(weight + sender_place), correlation, words, emotions,
            emotion_count, between, False,
        )  # fmt: skip  # [I, J]
        heard = (sender[None, :] <= last) & (sender[None, :] != itself)
        k = load_pieces(key + query_offset, sender_node, query_row, DIM, PIECE, PRECISION)  # [J, d]
        score = scale * inner_product(q, k, PRECISION)  # [I, J]
        u = all_u(past, history_key, query_offset, sender_node, query_row, scale, DIM, PIECE, PRECISION)
        v = load_pieces(value, sender_node, value_row, VALUE_DIM, PIECE, PRECISION)  # [J, dv]
        grad_attention = inner_product(do, v, PRECISION)  # [I, J]
        attention = attention_of(weighted(score, edge, factor, u), heard, maximum, inverse)
        # Values of senders that are not heard may be NaN, and an attention of 0 times NaN is NaN.
        delta += tl.sum(tl.where(heard, attention * grad_attention, 0.0), 1)
    tl.store(deltas + pair * nodes + place, delta, mask=row < count - skipped)
