"""The backward kernels of attention on the emotion graph: by rows, for receivers, and by columns, for senders."""

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
    add_product,
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
    zero_pieces,
)


@triton.jit
def _whole_edges(edge, factor, u):
    """The edges of a tile, of E0, r of the receivers (None for 1) and every layer's u."""
    if factor is not None:
        edge = edge * factor
    for m in tl.static_range(len(u)):
        edge *= u[m]
    return edge


@triton.jit
def _tile(
    score, u, attention, grad_attention,  # of one tile [I, J] or [J, I]; the last is dO V^T
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


@triton.jit
def _gradients_of_receivers(
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
    """By rows: dq, dq^m and dr of BLOCK receivers, over all whom they hear, STEP at a time.

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
    grad_past = _zeros(grad_history_query, BLOCK, DIM, PIECE, number)  # a layer [I, d]
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
        grad_score, grad_u, _, grad_r = _tile(score, u, attention, grad_attention, edge, factor, heard, delta)
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
    _store_all(grad_history_query, gradient_offset, node, gradient_row, grad_past, scale, exists, DIM, PIECE)
    for m in tl.static_range(len(grad_history_query)):
        store_pieces(grad_history_query[m] + gradient_offset, row, gradient_row, nothing, out, DIM, PIECE)
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


@triton.jit
def _gradients_of_senders(
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
    """By columns: dk, dk^m, dv and dE0 of BLOCK senders, over all who hear them, STEP at a time.

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
    grad_past = _zeros(grad_history_key, BLOCK, DIM, PIECE, number)  # a layer [J, d]
    grad_v = zero_pieces(BLOCK, VALUE_DIM, PIECE, number)  # [J, dv]
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
    pair = ((tl.program_id(0) + zero) // blocks).to(tl.int64)  # as in _gradients_of_receivers
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
    _store_all(grad_history_key, gradient_offset, node, gradient_row, grad_past, scale, exists, DIM, PIECE)
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


@triton.jit(do_not_specialize=VARYING)
def _backward(
    query, key, value,  # [B, K, N, d], [B, K, N, d], [B, K, N, dv]
    history_query, history_key,  # tuples of [B, K, N, d]
    correlation, word_mask, emotion_mask, row_factor,  # as in the forward
    output, grad_output,  # [B, K, N or M, dv]
    saved,  # [5, B, K, N]
    deltas,  # [B, K, N] from _sum_deltas, or None: then delta is dO O
    # None, or not in the tuple, where not wanted
    grad_query, grad_key, grad_value,  # [B, K, N, d], [B, K, N, d], [B, K, N, dv]
    grad_history_query, grad_history_key,  # tuples of [B, K, N, d]
    grad_row_factor, grad_emotion_weight, grad_correlation,  # [B, K, N], [B, K, P], [B, K, P, P]
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
            _gradients_of_receivers(
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
        _gradients_of_senders(
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
