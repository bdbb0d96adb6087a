"""The forward kernel of attention on the emotion graph."""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.graph_attention.edges import (
    VARYING,
    all_u,
    end_of_senders,
    initial_edges,
    load_all,
    saved_of,
    weighted,
)
from ecore_kernels.triton_kernels.tiles import (
    add_product,
    exponent,
    inner_product,
    last_heard,
    load_pieces,
    number_of,
    place_of_receiver,
    scaled,
    store_pieces,
    takes_no_part,
    unheard_self,
    write_order,
    zero_pieces,
)


@triton.jit(do_not_specialize=VARYING)
def _forward(
    query, key, value,  # [B, K, N, d], [B, K, N, d], [B, K, N, dv]
    history_query, history_key,  # tuples of [B, K, N, d]
    word_weight, word_mask,  # [B, M], [B, K, M]
    emotion_weight, correlation, emotion_mask,  # [B, P], [P, P] or [B, P, P], [B, P] or None
    row_factor,  # [B, K, N] or None
    output,  # [B, K, N or M, dv]
    saved,  # [5, B, K, N], for the backward: see saved_of
    plane, resolutions, words, emotions, correlation_batch,
    query_batch, query_head, query_row, value_batch, value_head, value_row, output_batch, output_head, output_row,
    scale_bits: tl.int64, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PIECE: tl.constexpr,
    VECTOR: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, WORDS_ONLY: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK receivers of one (b, k), over all senders that they hear, STEP at a time.

    Shape tags: I = BLOCK receivers, J = STEP senders.
    """
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
    _, _, weight, order, counts = saved_of(saved, plane, pair, nodes)
    emotion_count, count = write_order(
        word_mask, emotion_mask, word_weight + batch * words, emotion_weight + batch * emotions,
        order, weight, words, emotions, CHUNK,
    )  # fmt: skip
    tl.store(counts, emotion_count)
    tl.store(counts + 1, count)

    row = block * BLOCK + tl.arange(0, BLOCK)  # [I]
    number: tl.constexpr = saved.dtype.element_ty
    scale = number_of(scale_bits, number)
    nothing = zero_pieces(BLOCK, VALUE_DIM, PIECE, number)  # [I, dv]
    out = takes_no_part(row, word_mask, emotion_mask, words, receivers)  # [I]
    store_pieces(output, row, output_row, nothing, out, VALUE_DIM, PIECE)
    skipped = emotion_count if WORDS_ONLY else 0
    if block * BLOCK >= count - skipped:
        return

    exists = row < count - skipped
    place = place_of_receiver(row, skipped, count)  # [I]
    node = tl.load(order + place)  # [I]
    last = last_heard(place, emotion_count, count)[:, None]  # [I, 1]
    itself = unheard_self(place, emotion_count)[:, None]  # [I, 1]
    q = load_pieces(query + query_offset, node, query_row, DIM, PIECE, PRECISION)  # [I, d]
    past = load_all(history_query, query_offset, node, query_row, DIM, PIECE, PRECISION)  # a layer [I, d]
    if row_factor is not None:
        factor = tl.load(row_factor + pair * nodes + node)[:, None]  # [I, 1]
    else:
        factor = None
    maximum = tl.full([BLOCK], float("-inf"), number)
    normalizer = tl.zeros([BLOCK], number)
    total = zero_pieces(BLOCK, VALUE_DIM, PIECE, number)  # [I, dv]
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
        # Each tile is loaded right before its product: together they would fill shared memory and registers.
        k = load_pieces(key + query_offset, sender_node, query_row, DIM, PIECE, PRECISION)  # [J, d]
        score = scale * inner_product(q, k, PRECISION)  # [I, J]
        u = all_u(past, history_key, query_offset, sender_node, query_row, scale, DIM, PIECE, PRECISION)
        x = exponent(weighted(score, edge, factor, u))
        x = tl.where((sender[None, :] <= last) & (sender[None, :] != itself), x, float("-inf"))
        larger = tl.maximum(maximum, tl.max(x, 1))
        # Every receiver hears [CLS], in the first tile; but all scores there may have overflowed.
        offset = tl.where(larger == float("-inf"), 0.0, larger)
        p = tl.exp2(x - offset[:, None])  # [I, J]
        shrink = tl.exp2(maximum - offset)
        normalizer = normalizer * shrink + tl.sum(p, 1)
        v = load_pieces(value + value_offset, sender_node, value_row, VALUE_DIM, PIECE, PRECISION)  # [J, dv]
        total = add_product(scaled(total, shrink[:, None]), p, v, PRECISION)
        maximum = larger
    inverse = 1.0 / normalizer
    total = scaled(total, inverse[:, None])
    store_pieces(output, node, output_row, total, exists, VALUE_DIM, PIECE)
    saved_maximum, saved_inverse, _, _, _ = saved_of(saved, plane, pair, nodes)
    tl.store(saved_maximum + place, maximum, mask=exists)
    tl.store(saved_inverse + place, inverse, mask=exists)
