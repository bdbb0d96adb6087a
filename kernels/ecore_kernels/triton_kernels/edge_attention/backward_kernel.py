"""The backward kernel of attention on any dense graph: for shared edges, for receivers, and for senders."""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.edge_attention.edges import (
    VARYING,
    addresses,
    attention_of,
    clamped,
    finite,
    gated,
    inside_graph,
    kept_in,
    logit,
    neighbors_in,
    through_clamp,
    tile_of,
)
from ecore_kernels.triton_kernels.tiles import (
    inner_sums,
    load_rows,
    number_of,
    rounded,
    row_products,
    store_rows,
)


@triton.jit(do_not_specialize=VARYING)
def _backward(
    query, key, value, edge, neighbors, bias, sender_gate, seed, factor, output, grad_output, grad_new_edge, grad_lse,
    saved,
    deltas,  # from _sum_deltas, or None: then delta is dO O
    grad_query, grad_key, grad_value,
    grad_edge, grad_factor,  # like edge and factor, but contiguous
    grad_bias, grad_sender_gate,  # [B, H, Nq, Nk] and [B, H, Nk]; these seven are None if not wanted
    plane, batches, heads, group, receivers, senders, edge_batches, edge_heads, zero,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    output_batch, output_head, output_row, gradient_batch, gradient_head, gradient_row,
    key_gradient_batch, key_gradient_head, key_gradient_row,
    value_gradient_batch, value_gradient_head, value_gradient_row,
    edge_batch, edge_head, edge_row, neighbors_batch, neighbors_head, neighbors_row,
    bias_batch, bias_head, bias_row, grad_new_edge_batch, grad_new_edge_head, grad_new_edge_row,
    scale_bits: tl.int64, low_bits: tl.int64, high_bits: tl.int64, least_kept: tl.int64, kept_bits: tl.int64,
    CLAMP: tl.constexpr, ALL_PAIRS: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_DIM: tl.constexpr, TILE_VALUE: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, SHARED_EDGE: tl.constexpr,
    RECEIVERS: tl.constexpr, SENDERS: tl.constexpr,  # whether gradients of receivers and of senders are wanted
    BLOCK: tl.constexpr, STEP: tl.constexpr, SHARED_STEP: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of BLOCK nodes of one (b, k), as receivers or as senders, or of a tile of edges.

    With G = A (dO V^T - delta), delta as in _sum_deltas: dx = G + f dE', ds = dx * E, dE = dx * s + f dE'; dropout is a
    factor on dO V^T, a sender gate is one on s, and the gradient of a bias is G.
    The gradient of an edge of a single (b, k) is written by the program of its receiver. With SHARED_EDGE each of the
    first programs takes a tile of edges, and goes through all (b, k) that share it, so every number has one writer.
    With RELOAD the tiles that stay are loaded again at every step, which keeps them out of the registers. ``zero`` is
    0, which the compiler does not know, so it cannot move the load out of the loop.
    Shape tags: I receivers and J senders, of which BLOCK stay and STEP stream by; SHARED_STEP senders of shared edges.
    """
    receiver_blocks, sender_blocks = tl.cdiv(receivers, BLOCK), tl.cdiv(senders, BLOCK)
    program = tl.program_id(0)
    query_row *= VECTOR
    key_row *= VECTOR
    value_row *= VECTOR
    output_row *= VECTOR
    number: tl.constexpr = saved.dtype.element_ty
    scale, low, high = (
        number_of(scale_bits, number),
        number_of(low_bits, number),
        number_of(high_bits, number),
    )

    if SHARED_EDGE:
        steps = tl.cdiv(senders, SHARED_STEP)
        tiles = edge_batches * edge_heads * receiver_blocks * steps
        if program < tiles:
            matrix = (program // (receiver_blocks * steps)).to(tl.int64)
            first = program // steps % receiver_blocks * BLOCK
            start = program % steps * SHARED_STEP
            edge_of, edge_for = matrix // edge_heads, matrix % edge_heads
            edge += edge_of * edge_batch + edge_for * edge_head
            grad_tile = tl.zeros([BLOCK, SHARED_STEP], number)  # [I, J]
            in_batch = heads // edge_heads
            for share in range(0, in_batch * (batches // edge_batches)):
                batch, head = edge_of + share // in_batch, edge_for + share % in_batch
                pair = batch * heads + head
                # Otherwise the compiler computes the addresses of all tiles before the loop, and keeps them in
                # registers.
                first += share * zero
                start += share * zero
                node = tl.minimum(first + tl.arange(0, BLOCK), receivers - 1)
                sender = tl.minimum(start + tl.arange(0, SHARED_STEP), senders - 1)  # [J]
                query_offset = (batch * query_batch + head * query_head) * VECTOR
                key_offset = (batch * key_batch + head // group * key_head) * VECTOR
                output_offset = (batch * output_batch + head * output_head) * VECTOR
                do = load_rows(
                    grad_output + output_offset, node, output_row, VALUE_DIM, TILE_VALUE, PRECISION
                )
                if deltas is not None:
                    delta = tl.load(deltas + pair * receivers + node)[:, None]
                else:
                    o = load_rows(output + output_offset, node, output_row, VALUE_DIM, TILE_VALUE, "ieee")
                    delta = inner_sums((do,), (o,), False)
                    if grad_lse is not None:
                        delta -= tl.load(grad_lse + pair * receivers + node)[:, None]
                value_of = value + (batch * value_batch + head // group * value_head) * VECTOR
                v = load_rows(value_of, sender, value_row, VALUE_DIM, TILE_VALUE, PRECISION)  # [J, dv]
                passed = row_products(do, v, None, PRECISION)
                if seed is not None:
                    passed *= kept_in(
                        seed, pair, first, start, least_kept, kept_bits, number, BLOCK, SHARED_STEP, False
                    )
                passed -= delta
                q = load_rows(query + query_offset, node, query_row, DIM, TILE_DIM, PRECISION)  # [I, d]
                k = load_rows(key + key_offset, sender, key_row, DIM, TILE_DIM, PRECISION)  # [J, d]
                maximum = tl.load(saved + pair * receivers + node)[:, None]
                inverse = tl.load(saved + plane + pair * receivers + node)[:, None]
                inside = inside_graph(first, start, receivers, senders, BLOCK, SHARED_STEP, False)
                heard = inside
                if neighbors is not None:
                    mask = neighbors + batch * neighbors_batch + head * neighbors_head
                    heard = neighbors_in(mask, neighbors_row, first, start, inside, BLOCK, SHARED_STEP, False)
                live = inside if ALL_PAIRS else heard
                weight = tile_of(edge, edge_row, first, start, live, 1.0, number, BLOCK, SHARED_STEP, False)
                score = clamped(scale * row_products(q, k, None, PRECISION), low, high, CLAMP)  # [I, J]
                if sender_gate is not None:
                    score = gated(score, sender_gate + pair * senders, sender, False)
                if bias is not None:
                    bias_of = bias + batch * bias_batch + head * bias_head
                    exponents = logit(
                        score, weight, bias_of, bias_row, first, start, heard, BLOCK, SHARED_STEP, False
                    )
                else:
                    exponents = logit(
                        score, weight, None, bias_row, first, start, heard, BLOCK, SHARED_STEP, False
                    )
                # Scores of pairs off the graph may be NaN.
                grad_x = tl.where(heard, attention_of(exponents, heard, maximum, inverse) * passed, 0.0)
                if grad_new_edge is not None:
                    gradient = grad_new_edge + batch * grad_new_edge_batch + head * grad_new_edge_head
                    address = addresses(gradient, grad_new_edge_row, first, start, BLOCK, SHARED_STEP, False)
                    f = tl.load(factor + pair * receivers + node)[:, None]
                    through_edge = tl.where(live, f * tl.load(address, mask=live, other=0.0), 0.0)
                    grad_x += through_edge
                    grad_tile += through_edge
                grad_tile += tl.where(live, grad_x * score, 0.0)
            grad_edge += matrix * receivers * senders
            address = addresses(grad_edge, senders, first, start, BLOCK, SHARED_STEP, False)
            inside = inside_graph(first, start, receivers, senders, BLOCK, SHARED_STEP, False)
            tl.store(address, grad_tile.to(grad_edge.dtype.element_ty), mask=inside)
            return
        program -= tiles

    parts = RECEIVERS * receiver_blocks + SENDERS * sender_blocks
    pair = (program // parts).to(tl.int64)
    block = program % parts
    batch, head = pair // heads, pair % heads
    query += (batch * query_batch + head * query_head) * VECTOR
    key += (batch * key_batch + head // group * key_head) * VECTOR
    value += (batch * value_batch + head // group * value_head) * VECTOR
    output += (batch * output_batch + head * output_head) * VECTOR
    grad_output += (batch * output_batch + head * output_head) * VECTOR
    if edge is not None:
        edge += batch * edge_batch + head * edge_head
    if bias is not None:
        bias += batch * bias_batch + head * bias_head
    if sender_gate is not None:
        sender_gate += pair * senders
    if neighbors is not None:
        neighbors += batch * neighbors_batch + head * neighbors_head
    if grad_new_edge is not None:
        grad_new_edge += batch * grad_new_edge_batch + head * grad_new_edge_head
        factor += pair * receivers
    if grad_lse is not None:
        grad_lse += pair * receivers
    saved += pair * receivers

    if RECEIVERS:
        if block < receiver_blocks:
            first = block * BLOCK
            row = first + tl.arange(0, BLOCK)
            exists = row < receivers
            node = tl.minimum(row, receivers - 1)
            q = load_rows(query, node, query_row, DIM, TILE_DIM, PRECISION)  # [I, d]
            do = load_rows(grad_output, node, output_row, VALUE_DIM, TILE_VALUE, PRECISION)  # [I, dv]
            if deltas is not None:
                delta = tl.load(deltas + pair * receivers + node)[:, None]
            else:
                o = load_rows(output, node, output_row, VALUE_DIM, TILE_VALUE, "ieee")
                delta = inner_sums((do,), (o,), False)
                if grad_lse is not None:
                    delta -= tl.load(grad_lse + node)[:, None]
            maximum = tl.load(saved + node)[:, None]
            inverse = tl.load(saved + plane + node)[:, None]
            if grad_new_edge is not None:
                f = tl.load(factor + node)[:, None]
            grad_f = tl.zeros([BLOCK], number)
            if grad_edge is not None and not SHARED_EDGE:
                grad_edge += pair * receivers * senders
            if grad_bias is not None:
                grad_bias += pair * receivers * senders
            grad_q = tl.zeros([BLOCK, TILE_DIM], number)  # [I, d]
            for start in range(0, senders, STEP):
                if RELOAD:
                    again = node + start * zero
                    q = load_rows(query, again, query_row, DIM, TILE_DIM, PRECISION)  # [I, d]
                    do = load_rows(
                        grad_output, again, output_row, VALUE_DIM, TILE_VALUE, PRECISION
                    )  # [I, dv]
                sender = tl.minimum(start + tl.arange(0, STEP), senders - 1)  # [J]
                k = load_rows(key, sender, key_row, DIM, TILE_DIM, PRECISION)  # [J, d]
                v = load_rows(value, sender, value_row, VALUE_DIM, TILE_VALUE, PRECISION)  # [J, dv]
                inside = inside_graph(first, start, receivers, senders, BLOCK, STEP, False)
                heard = neighbors_in(neighbors, neighbors_row, first, start, inside, BLOCK, STEP, False)
                live = inside if ALL_PAIRS else heard
                weight = tile_of(edge, edge_row, first, start, live, 1.0, number, BLOCK, STEP, False)
                if neighbors is not None:
                    k, lost = finite(k, number)
                whole = scale * row_products(q, k, None, PRECISION)  # [I, J]
                if neighbors is not None:
                    whole += lost
                score = gated(clamped(whole, low, high, CLAMP), sender_gate, sender, False)
                exponents = logit(score, weight, bias, bias_row, first, start, heard, BLOCK, STEP, False)
                attention = attention_of(exponents, heard, maximum, inverse)
                passed = row_products(do, v, None, PRECISION)
                if seed is not None:
                    passed *= kept_in(
                        seed, pair, first, start, least_kept, kept_bits, number, BLOCK, STEP, False
                    )
                grad_x = attention * (passed - delta)  # [I, J]
                if ALL_PAIRS or grad_bias is not None:
                    grad_x = tl.where(heard, grad_x, 0.0)
                if grad_bias is not None:
                    address = addresses(grad_bias, senders, first, start, BLOCK, STEP, False)
                    tl.store(address, grad_x.to(grad_bias.dtype.element_ty), mask=inside)
                if grad_new_edge is not None:
                    address = addresses(grad_new_edge, grad_new_edge_row, first, start, BLOCK, STEP, False)
                    gradient = tl.load(address, mask=live, other=0.0)
                    through_edge = tl.where(live, f * gradient, 0.0)
                    grad_x += through_edge
                    if grad_factor is not None:
                        grad_f += tl.sum(tl.where(live, gradient * (weight + score * weight), 0.0), 1)
                if grad_query is not None:
                    grad_score = through_clamp(
                        gated(grad_x * weight, sender_gate, sender, False), whole, low, high, CLAMP
                    )
                    grad_score = tl.where(live, grad_score, 0.0)  # it may be NaN off the graph
                    grad_q += tl.dot(rounded(grad_score.to(k.dtype), PRECISION), k, input_precision=PRECISION)
                if grad_edge is not None and not SHARED_EDGE:
                    address = addresses(grad_edge, senders, first, start, BLOCK, STEP, False)
                    grad_tile = grad_x * score
                    if grad_new_edge is not None:
                        grad_tile += through_edge
                    grad_tile = tl.where(live, grad_tile, 0.0)
                    tl.store(address, grad_tile.to(grad_edge.dtype.element_ty), mask=inside)
            if grad_query is not None:
                grad_query += (batch * gradient_batch + head * gradient_head) * VECTOR
                store_rows(grad_query, node, gradient_row * VECTOR, grad_q * scale, exists, DIM, TILE_DIM)
            if grad_factor is not None:
                tl.store(grad_factor + pair * receivers + row, grad_f, mask=exists)
            return
        block -= receiver_blocks

    if SENDERS:
        first = block * BLOCK
        row = first + tl.arange(0, BLOCK)
        exists = row < senders
        node = tl.minimum(row, senders - 1)
        k = load_rows(key, node, key_row, DIM, TILE_DIM, PRECISION)  # [J, d]
        v = load_rows(value, node, value_row, VALUE_DIM, TILE_VALUE, PRECISION)  # [J, dv]
        grad_k = tl.zeros([BLOCK, TILE_DIM], number)  # [J, d]
        grad_v = tl.zeros([BLOCK, TILE_VALUE], number)  # [J, dv]
        grad_gate = tl.zeros([BLOCK], number)  # [J]
        for start in range(0, receivers, STEP):
            if RELOAD:
                again = node + start * zero
                k = load_rows(key, again, key_row, DIM, TILE_DIM, PRECISION)  # [J, d]
                v = load_rows(value, again, value_row, VALUE_DIM, TILE_VALUE, PRECISION)  # [J, dv]
            receiver = tl.minimum(start + tl.arange(0, STEP), receivers - 1)  # [I]
            q = load_rows(query, receiver, query_row, DIM, TILE_DIM, PRECISION)  # [I, d]
            do = load_rows(grad_output, receiver, output_row, VALUE_DIM, TILE_VALUE, PRECISION)  # [I, dv]
            maximum = tl.load(saved + receiver)[None, :]
            inverse = tl.load(saved + plane + receiver)[None, :]
            inside = inside_graph(start, first, receivers, senders, STEP, BLOCK, True)
            heard = neighbors_in(neighbors, neighbors_row, start, first, inside, STEP, BLOCK, True)
            live = inside if ALL_PAIRS else heard
            weight = tile_of(edge, edge_row, start, first, live, 1.0, number, STEP, BLOCK, True)
            if neighbors is not None:
                q, lost = finite(q, number)
                do, lost_gradient = finite(do, number)
            whole = scale * row_products(k, q, None, PRECISION)  # [J, I]
            if neighbors is not None:
                whole += lost
            within = clamped(whole, low, high, CLAMP)
            score = gated(within, sender_gate, node, True)
            exponents = logit(score, weight, bias, bias_row, start, first, heard, STEP, BLOCK, True)
            attention = attention_of(exponents, heard, maximum, inverse)
            if neighbors is not None:
                attention = tl.where(heard, attention + lost_gradient, 0.0)
            kept_attention = attention
            if seed is not None:
                kept = kept_in(seed, pair, start, first, least_kept, kept_bits, number, STEP, BLOCK, True)
                kept_attention = attention * kept
            if grad_value is not None:
                grad_v += tl.dot(
                    rounded(kept_attention.to(do.dtype), PRECISION), do, input_precision=PRECISION
                )
            if grad_key is not None or grad_sender_gate is not None:
                if deltas is not None:
                    delta = tl.load(deltas + pair * receivers + receiver)[None, :]
                else:
                    o = load_rows(output, receiver, output_row, VALUE_DIM, TILE_VALUE, "ieee")
                    delta = inner_sums((do,), (o,), True)
                    if grad_lse is not None:
                        delta -= tl.load(grad_lse + receiver)[None, :]
                passed = row_products(v, do, None, PRECISION)
                if seed is not None:
                    passed *= kept
                grad_x = attention * (passed - delta)  # [J, I]
                if ALL_PAIRS:
                    grad_x = tl.where(heard, grad_x, 0.0)
                if grad_new_edge is not None:
                    address = addresses(grad_new_edge, grad_new_edge_row, start, first, STEP, BLOCK, True)
                    f = tl.load(factor + receiver)[None, :]
                    grad_x += tl.where(live, f * tl.load(address, mask=live, other=0.0), 0.0)
                if grad_sender_gate is not None:
                    grad_gate += tl.sum(tl.where(live, grad_x * within * weight, 0.0), 1)
                if grad_key is not None:
                    grad_score = through_clamp(
                        gated(grad_x * weight, sender_gate, node, True), whole, low, high, CLAMP
                    )
                    grad_score = tl.where(live, grad_score, 0.0)
                    grad_k += tl.dot(rounded(grad_score.to(q.dtype), PRECISION), q, input_precision=PRECISION)
        if grad_key is not None:
            grad_key += (batch * key_gradient_batch + head * key_gradient_head) * VECTOR
            store_rows(grad_key, node, key_gradient_row * VECTOR, grad_k * scale, exists, DIM, TILE_DIM)
        if grad_sender_gate is not None:
            tl.store(grad_sender_gate + pair * senders + row, grad_gate, mask=exists)
        if grad_value is not None:
            grad_value += (batch * value_gradient_batch + head * value_gradient_head) * VECTOR
            store_rows(grad_value, node, value_gradient_row * VECTOR, grad_v, exists, VALUE_DIM, TILE_VALUE)
