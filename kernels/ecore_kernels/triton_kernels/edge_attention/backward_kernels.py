"""The backward kernels of attention on any dense graph: for shared edges, for receivers, and for senders."""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.edge_attention.edges import (
    VARYING,
    addresses,
    attention_of,
    finite,
    inside_graph,
    neighbors_in,
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
def _sum_deltas(
    query, key, value, edge, neighbors, grad_output, saved,
    deltas,  # [B, K, N], written
    plane, resolutions, nodes,
    query_batch, query_head, query_row, value_batch, value_head, value_row, output_batch, output_head, output_row,
    edge_batch, edge_head, edge_row, neighbors_batch, neighbors_head, neighbors_row,
    scale_bits: tl.int64, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_DIM: tl.constexpr, TILE_VALUE: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program: delta of BLOCK receivers of one (b, k), the sum of A (dO V^T) over those whom they hear.

    Of the numbers that the backward has, and not dO O: see ``_sum_deltas`` of ``graph_attention``.
    Shape tags: I = BLOCK receivers, J = STEP senders.
    """
    blocks = tl.cdiv(nodes, BLOCK)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK
    batch, head = pair // resolutions, pair % resolutions
    query += (batch * query_batch + head * query_head) * VECTOR
    key += (batch * query_batch + head * query_head) * VECTOR
    value += (batch * value_batch + head * value_head) * VECTOR
    grad_output += (batch * output_batch + head * output_head) * VECTOR
    query_row *= VECTOR
    value_row *= VECTOR
    output_row *= VECTOR
    edge += batch * edge_batch + head * edge_head
    if neighbors is not None:
        neighbors += batch * neighbors_batch + head * neighbors_head
    saved += pair * nodes

    number: tl.constexpr = saved.dtype.element_ty
    scale = number_of(scale_bits, number)
    row = first + tl.arange(0, BLOCK)
    node = tl.minimum(row, nodes - 1)
    q = load_rows(query, node, query_row, DIM, TILE_DIM, PRECISION)  # [I, d]
    do = load_rows(grad_output, node, output_row, VALUE_DIM, TILE_VALUE, PRECISION)  # [I, dv]
    maximum = tl.load(saved + node)[:, None]
    inverse = tl.load(saved + plane + node)[:, None]
    delta = tl.zeros([BLOCK], number)
    for start in range(0, nodes, STEP):
        sender = tl.minimum(start + tl.arange(0, STEP), nodes - 1)  # [J]
        k = load_rows(key, sender, query_row, DIM, TILE_DIM, PRECISION)  # [J, d]
        v = load_rows(value, sender, value_row, VALUE_DIM, TILE_VALUE, PRECISION)  # [J, dv]
        inside = inside_graph(first, start, nodes, BLOCK, STEP, False)
        heard = neighbors_in(neighbors, neighbors_row, first, start, inside, BLOCK, STEP, False)
        weight = tl.load(addresses(edge, edge_row, first, start, BLOCK, STEP, False), mask=heard, other=0.0)
        score = scale * row_products(q, k, None, PRECISION)  # [I, J]
        attention = attention_of(score, weight.to(number), heard, maximum, inverse)
        # What is not heard may be NaN, which no attention of 0 takes away.
        delta += tl.sum(tl.where(heard, attention * row_products(do, v, None, PRECISION), 0.0), 1)
    tl.store(deltas + pair * nodes + row, delta, mask=row < nodes)


@triton.jit(do_not_specialize=VARYING)
def _backward(
    query, key, value, edge, neighbors, factor, output, grad_output, grad_new_edge, saved,
    deltas,  # from _sum_deltas, or None: then delta is dO O
    grad_query, grad_key, grad_value,
    grad_edge, grad_factor,  # like edge and factor, but contiguous; these five are None where not wanted
    plane, batches, resolutions, nodes, edge_batches, edge_resolutions, zero,
    query_batch, query_head, query_row, value_batch, value_head, value_row, output_batch, output_head, output_row,
    gradient_batch, gradient_head, gradient_row, value_gradient_batch, value_gradient_head, value_gradient_row,
    edge_batch, edge_head, edge_row, neighbors_batch, neighbors_head, neighbors_row,
    grad_new_edge_batch, grad_new_edge_head, grad_new_edge_row,
    scale_bits: tl.int64, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_DIM: tl.constexpr, TILE_VALUE: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, SHARED_EDGE: tl.constexpr,
    RECEIVERS: tl.constexpr, SENDERS: tl.constexpr,  # whether anything is wanted of the one, and of the other
    BLOCK: tl.constexpr, STEP: tl.constexpr, SHARED_STEP: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of BLOCK nodes of one (b, k), as receivers or as senders, or of a tile of edges.

    With G = A (dO V^T - delta), delta as in _sum_deltas: dx = G + f dE', ds = dx * E, dE = dx * s + f dE'.
    An edge that belongs to one (b, k) gets its gradient from its receiver's program. With SHARED_EDGE the first
    programs take a tile of edges each, and go through all the (b, k) that share it: every number has one writer.
    With RELOAD the tiles that stay are loaded again at every step, which keeps them out of the registers: ``zero`` is
    0, but the compiler does not know.
    Shape tags: I receivers and J senders, of which BLOCK stay and STEP stream by; SHARED_STEP senders of shared edges.
    """
    blocks = tl.cdiv(nodes, BLOCK)
    program = tl.program_id(0)
    query_row *= VECTOR
    value_row *= VECTOR
    output_row *= VECTOR
    number: tl.constexpr = saved.dtype.element_ty
    scale = number_of(scale_bits, number)

    if SHARED_EDGE:
        steps = tl.cdiv(nodes, SHARED_STEP)
        tiles = edge_batches * edge_resolutions * blocks * steps
        if program < tiles:
            matrix = (program // (blocks * steps)).to(tl.int64)
            first = program // steps % blocks * BLOCK
            start = program % steps * SHARED_STEP
            edge_of, edge_for = matrix // edge_resolutions, matrix % edge_resolutions
            edge += edge_of * edge_batch + edge_for * edge_head
            grad_tile = tl.zeros([BLOCK, SHARED_STEP], number)  # [I, J]
            heads = resolutions // edge_resolutions
            for share in range(0, heads * (batches // edge_batches)):
                batch, head = edge_of + share // heads, edge_for + share % heads
                pair = batch * resolutions + head
                # Else the addresses of all tiles are worked out before the loop, and wait in registers.
                first += share * zero
                start += share * zero
                node = tl.minimum(first + tl.arange(0, BLOCK), nodes - 1)
                sender = tl.minimum(start + tl.arange(0, SHARED_STEP), nodes - 1)  # [J]
                query_offset = (batch * query_batch + head * query_head) * VECTOR
                output_offset = (batch * output_batch + head * output_head) * VECTOR
                do = load_rows(
                    grad_output + output_offset, node, output_row, VALUE_DIM, TILE_VALUE, PRECISION
                )
                if deltas is not None:
                    delta = tl.load(deltas + pair * nodes + node)[:, None]
                else:
                    o = load_rows(output + output_offset, node, output_row, VALUE_DIM, TILE_VALUE, "ieee")
                    delta = inner_sums((do,), (o,), False)
                value_of = value + (batch * value_batch + head * value_head) * VECTOR
                v = load_rows(value_of, sender, value_row, VALUE_DIM, TILE_VALUE, PRECISION)  # [J, dv]
                passed = row_products(do, v, None, PRECISION) - delta
                q = load_rows(query + query_offset, node, query_row, DIM, TILE_DIM, PRECISION)  # [I, d]
                k = load_rows(key + query_offset, sender, query_row, DIM, TILE_DIM, PRECISION)  # [J, d]
                maximum = tl.load(saved + pair * nodes + node)[:, None]
                inverse = tl.load(saved + plane + pair * nodes + node)[:, None]
                heard = inside_graph(first, start, nodes, BLOCK, SHARED_STEP, False)
                if neighbors is not None:
                    mask = neighbors + batch * neighbors_batch + head * neighbors_head
                    heard = neighbors_in(mask, neighbors_row, first, start, heard, BLOCK, SHARED_STEP, False)
                weight = tl.load(
                    addresses(edge, edge_row, first, start, BLOCK, SHARED_STEP, False), mask=heard, other=0.0
                ).to(number)
                score = scale * row_products(q, k, None, PRECISION)  # [I, J]
                grad_x = attention_of(score, weight, heard, maximum, inverse) * passed
                if grad_new_edge is not None:
                    gradient = grad_new_edge + batch * grad_new_edge_batch + head * grad_new_edge_head
                    address = addresses(gradient, grad_new_edge_row, first, start, BLOCK, SHARED_STEP, False)
                    f = tl.load(factor + pair * nodes + node)[:, None]
                    through_edge = tl.where(heard, f * tl.load(address, mask=heard, other=0.0), 0.0)
                    grad_x += through_edge
                    grad_tile += through_edge
                grad_tile += tl.where(heard, grad_x * score, 0.0)  # what is not heard may be NaN
            grad_edge += matrix * nodes * nodes
            address = addresses(grad_edge, nodes, first, start, BLOCK, SHARED_STEP, False)
            inside = inside_graph(first, start, nodes, BLOCK, SHARED_STEP, False)
            tl.store(address, grad_tile.to(grad_edge.dtype.element_ty), mask=inside)
            return
        program -= tiles

    parts = (RECEIVERS + SENDERS) * blocks
    pair = (program // parts).to(tl.int64)
    block = program % parts
    batch, head = pair // resolutions, pair % resolutions
    query += (batch * query_batch + head * query_head) * VECTOR
    key += (batch * query_batch + head * query_head) * VECTOR
    value += (batch * value_batch + head * value_head) * VECTOR
    output += (batch * output_batch + head * output_head) * VECTOR
    grad_output += (batch * output_batch + head * output_head) * VECTOR
    gradient_offset = (batch * gradient_batch + head * gradient_head) * VECTOR
    gradient_row *= VECTOR
    edge += batch * edge_batch + head * edge_head
    if neighbors is not None:
        neighbors += batch * neighbors_batch + head * neighbors_head
    if grad_new_edge is not None:
        grad_new_edge += batch * grad_new_edge_batch + head * grad_new_edge_head
        factor += pair * nodes
    saved += pair * nodes

    if RECEIVERS:
        if block < blocks:
            first = block * BLOCK
            row = first + tl.arange(0, BLOCK)
            exists = row < nodes
            node = tl.minimum(row, nodes - 1)
            q = load_rows(query, node, query_row, DIM, TILE_DIM, PRECISION)  # [I, d]
            do = load_rows(grad_output, node, output_row, VALUE_DIM, TILE_VALUE, PRECISION)  # [I, dv]
            if deltas is not None:
                delta = tl.load(deltas + pair * nodes + node)[:, None]
            else:
                o = load_rows(output, node, output_row, VALUE_DIM, TILE_VALUE, "ieee")
                delta = inner_sums((do,), (o,), False)
            maximum = tl.load(saved + node)[:, None]
            inverse = tl.load(saved + plane + node)[:, None]
            if grad_new_edge is not None:
                f = tl.load(factor + node)[:, None]
            grad_f = tl.zeros([BLOCK], number)
            if grad_edge is not None and not SHARED_EDGE:
                grad_edge += pair * nodes * nodes
            grad_q = tl.zeros([BLOCK, TILE_DIM], number)  # [I, d]
            for start in range(0, nodes, STEP):
                if RELOAD:
                    again = node + start * zero
                    q = load_rows(query, again, query_row, DIM, TILE_DIM, PRECISION)  # [I, d]
                    do = load_rows(
                        grad_output, again, output_row, VALUE_DIM, TILE_VALUE, PRECISION
                    )  # [I, dv]
                sender = tl.minimum(start + tl.arange(0, STEP), nodes - 1)  # [J]
                k = load_rows(key, sender, query_row, DIM, TILE_DIM, PRECISION)  # [J, d]
                v = load_rows(value, sender, value_row, VALUE_DIM, TILE_VALUE, PRECISION)  # [J, dv]
                inside = inside_graph(first, start, nodes, BLOCK, STEP, False)
                heard = neighbors_in(neighbors, neighbors_row, first, start, inside, BLOCK, STEP, False)
                weight = tl.load(
                    addresses(edge, edge_row, first, start, BLOCK, STEP, False), mask=heard, other=0.0
                )
                weight = weight.to(number)
                if neighbors is not None:
                    k, lost = finite(k, number)
                score = scale * row_products(q, k, None, PRECISION)  # [I, J]
                if neighbors is not None:
                    score += lost
                attention = attention_of(score, weight, heard, maximum, inverse)
                grad_x = attention * (row_products(do, v, None, PRECISION) - delta)  # [I, J]
                if grad_new_edge is not None:
                    address = addresses(grad_new_edge, grad_new_edge_row, first, start, BLOCK, STEP, False)
                    gradient = tl.load(address, mask=heard, other=0.0)
                    through_edge = tl.where(heard, f * gradient, 0.0)
                    grad_x += through_edge
                    if grad_factor is not None:
                        grad_f += tl.sum(tl.where(heard, gradient * (weight + score * weight), 0.0), 1)
                if grad_query is not None:
                    grad_score = tl.where(heard, grad_x * weight, 0.0)  # what is not heard may be NaN
                    grad_q += tl.dot(rounded(grad_score.to(k.dtype), PRECISION), k, input_precision=PRECISION)
                if grad_edge is not None and not SHARED_EDGE:
                    address = addresses(grad_edge, nodes, first, start, BLOCK, STEP, False)
                    grad_tile = grad_x * score
                    if grad_new_edge is not None:
                        grad_tile += through_edge
                    grad_tile = tl.where(heard, grad_tile, 0.0)
                    tl.store(address, grad_tile.to(grad_edge.dtype.element_ty), mask=inside)
            if grad_query is not None:
                store_rows(
                    grad_query + gradient_offset, node, gradient_row, grad_q * scale, exists, DIM, TILE_DIM
                )
            if grad_factor is not None:
                tl.store(grad_factor + pair * nodes + row, grad_f, mask=exists)
            return
        block -= blocks

    if SENDERS:
        first = block * BLOCK
        row = first + tl.arange(0, BLOCK)
        exists = row < nodes
        node = tl.minimum(row, nodes - 1)
        k = load_rows(key, node, query_row, DIM, TILE_DIM, PRECISION)  # [J, d]
        v = load_rows(value, node, value_row, VALUE_DIM, TILE_VALUE, PRECISION)  # [J, dv]
        grad_k = tl.zeros([BLOCK, TILE_DIM], number)  # [J, d]
        grad_v = tl.zeros([BLOCK, TILE_VALUE], number)  # [J, dv]
        for start in range(0, nodes, STEP):
            if RELOAD:
                again = node + start * zero
                k = load_rows(key, again, query_row, DIM, TILE_DIM, PRECISION)  # [J, d]
                v = load_rows(value, again, value_row, VALUE_DIM, TILE_VALUE, PRECISION)  # [J, dv]
            receiver = tl.minimum(start + tl.arange(0, STEP), nodes - 1)  # [I]
            q = load_rows(query, receiver, query_row, DIM, TILE_DIM, PRECISION)  # [I, d]
            do = load_rows(grad_output, receiver, output_row, VALUE_DIM, TILE_VALUE, PRECISION)  # [I, dv]
            maximum = tl.load(saved + receiver)[None, :]
            inverse = tl.load(saved + plane + receiver)[None, :]
            inside = inside_graph(start, first, nodes, STEP, BLOCK, True)
            heard = neighbors_in(neighbors, neighbors_row, start, first, inside, STEP, BLOCK, True)
            weight = tl.load(
                addresses(edge, edge_row, start, first, STEP, BLOCK, True), mask=heard, other=0.0
            )
            weight = weight.to(number)
            if neighbors is not None:
                q, lost = finite(q, number)
                do, lost_gradient = finite(do, number)
            score = scale * row_products(k, q, None, PRECISION)  # [J, I]
            if neighbors is not None:
                score += lost
            attention = attention_of(score, weight, heard, maximum, inverse)
            if neighbors is not None:
                attention = tl.where(heard, attention + lost_gradient, 0.0)
            if grad_value is not None:
                grad_v += tl.dot(rounded(attention.to(do.dtype), PRECISION), do, input_precision=PRECISION)
            if grad_key is not None:
                if deltas is not None:
                    delta = tl.load(deltas + pair * nodes + receiver)[None, :]
                else:
                    o = load_rows(output, receiver, output_row, VALUE_DIM, TILE_VALUE, "ieee")
                    delta = inner_sums((do,), (o,), True)
                grad_x = attention * (row_products(v, do, None, PRECISION) - delta)  # [J, I]
                if grad_new_edge is not None:
                    address = addresses(grad_new_edge, grad_new_edge_row, start, first, STEP, BLOCK, True)
                    f = tl.load(factor + receiver)[None, :]
                    grad_x += tl.where(heard, f * tl.load(address, mask=heard, other=0.0), 0.0)
                grad_score = tl.where(heard, grad_x * weight, 0.0)
                grad_k += tl.dot(rounded(grad_score.to(q.dtype), PRECISION), q, input_precision=PRECISION)
        if grad_key is not None:
            store_rows(grad_key + gradient_offset, node, gradient_row, grad_k * scale, exists, DIM, TILE_DIM)
        if grad_value is not None:
            grad_value += (batch * value_gradient_batch + head * value_gradient_head) * VECTOR
            store_rows(grad_value, node, value_gradient_row * VECTOR, grad_v, exists, VALUE_DIM, TILE_VALUE)
