"""Attention on any dense graph, its scores multiplied by edge weights that lie in memory: forward and backward.

With s = scale * q k^T and x = s * E: out = softmax over neighbours (x) v, new_edge = f * (E + x) (Eqs. 4 to 7), f one
factor per receiver. What lies off the graph is never read: not an edge, nor a gradient of an updated edge.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecore_kernels.layout import dense_rows, laid_out_like
from ecore_kernels.triton_kernels import launch
from ecore_kernels.triton_kernels.tiles import (
    exponent,
    inner_sums,
    load_rows,
    number_of,
    rounded,
    row_products,
    store_rows,
)

# Sizes and strides differ from batch to batch: compiling anew where one happens to be a multiple of 16 would cost more
# than it gains. VECTOR tells the compiler what it needs.
VARYING = [
    "plane", "batches", "resolutions", "nodes", "edge_batches", "edge_resolutions", "zero", "scale_bits",
    *(
        f"{of}_{name}"
        for of in ("query", "value", "output", "gradient", "value_gradient", "edge", "neighbors", "grad_new_edge")
        for name in ("batch", "head", "row")
    ),
]  # fmt: skip


@triton.jit
def _inside(receiver, sender, nodes, RECEIVERS: tl.constexpr, SENDERS: tl.constexpr, COLUMNS: tl.constexpr):
    """What of the tile that begins at (receiver, sender) lies in the [N, N]; see ``_addresses`` for its shape."""
    receivers = tl.expand_dims(receiver + tl.arange(0, RECEIVERS), 1 - COLUMNS)
    senders = tl.expand_dims(sender + tl.arange(0, SENDERS), COLUMNS)
    return (receivers < nodes) & (senders < nodes)


@triton.jit
def _addresses(
    matrix,
    row_stride,
    receiver,
    sender,
    RECEIVERS: tl.constexpr,
    SENDERS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The tile that begins at (receiver, sender): [RECEIVERS, SENDERS], or with COLUMNS [SENDERS, RECEIVERS]."""
    matrix += tl.cast(receiver, tl.int64) * row_stride + sender
    receivers = tl.expand_dims(tl.arange(0, RECEIVERS), 1 - COLUMNS)
    senders = tl.expand_dims(tl.arange(0, SENDERS), COLUMNS)
    return matrix + receivers * row_stride + senders


@triton.jit
def _neighbors(
    neighbors, row_stride, receiver, sender, inside,
    RECEIVERS: tl.constexpr, SENDERS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Who hears whom in the tile; without a mask every receiver every sender."""
    if neighbors is not None:
        address = _addresses(neighbors, row_stride, receiver, sender, RECEIVERS, SENDERS, COLUMNS)
        inside = inside & (tl.load(address, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _finite(rows, TYPE: tl.constexpr):
    """Rows for a product with weights of which some are 0, which would make NaN of NaN and of infinity.

    Returns:
        the rows, those that are not finite as zeros; by row 0, or NaN for those, to be added to where they are heard.
    """
    lost = tl.sum(rows.to(TYPE) * 0.0, 1)
    return tl.where((lost == 0.0)[:, None], rows, 0.0), lost[None, :]


@triton.jit(do_not_specialize=VARYING)
def _forward(
    query, key, value,  # [B, K, N, d], [B, K, N, d], [B, K, N, dv]
    edge, neighbors,  # [B or 1, K or 1, N, N] each; neighbors may be None
    factor, new_edge,  # [B, K, N] and [B, K, N, N], or None both
    output, saved,  # [B, K, N, dv] and, for the backward, [2, B, K, N]: receivers' maximum and one over their sum
    plane, resolutions, nodes,
    query_batch, query_head, query_row, value_batch, value_head, value_row, output_batch, output_head, output_row,
    edge_batch, edge_head, edge_row, neighbors_batch, neighbors_head, neighbors_row,
    scale_bits: tl.int64, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_DIM: tl.constexpr, TILE_VALUE: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK receivers of one (b, k), over all senders, STEP at a time."""
    blocks = tl.cdiv(nodes, BLOCK)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK
    batch, head = pair // resolutions, pair % resolutions
    key += (batch * query_batch + head * query_head) * VECTOR
    value += (batch * value_batch + head * value_head) * VECTOR
    edge += batch * edge_batch + head * edge_head
    if neighbors is not None:
        neighbors += batch * neighbors_batch + head * neighbors_head
    if new_edge is not None:
        new_edge += pair * nodes * nodes

    row = first + tl.arange(0, BLOCK)
    exists = row < nodes
    node = tl.minimum(row, nodes - 1)  # rows past the last one repeat it, and are not stored
    query += (batch * query_batch + head * query_head) * VECTOR
    q = load_rows(query, node, query_row * VECTOR, DIM, TILE_DIM, PRECISION)
    number: tl.constexpr = saved.dtype.element_ty
    scale = number_of(scale_bits, number)
    if factor is not None:
        f = tl.load(factor + pair * nodes + node)[:, None]
    maximum = tl.full([BLOCK], float("-inf"), number)
    normalizer = tl.zeros([BLOCK], number)
    total = tl.zeros([BLOCK, TILE_VALUE], number)
    hears = tl.zeros([BLOCK], tl.int32)
    for start in range(0, nodes, STEP):
        sender = tl.minimum(start + tl.arange(0, STEP), nodes - 1)
        k = load_rows(key, sender, query_row * VECTOR, DIM, TILE_DIM, PRECISION)
        v = load_rows(value, sender, value_row * VECTOR, VALUE_DIM, TILE_VALUE, PRECISION)
        inside = _inside(first, start, nodes, BLOCK, STEP, False)
        heard = _neighbors(neighbors, neighbors_row, first, start, inside, BLOCK, STEP, False)
        hears = tl.maximum(hears, tl.max(heard.to(tl.int32), 1))
        weight = tl.load(_addresses(edge, edge_row, first, start, BLOCK, STEP, False), mask=heard, other=0.0)
        weight = weight.to(number)
        score = scale * row_products(q, k, None, PRECISION)
        if new_edge is not None:
            address = _addresses(new_edge, nodes, first, start, BLOCK, STEP, False)
            tl.store(address, tl.where(heard, f * (weight + score * weight), 0.0), mask=inside)
        x = tl.where(heard, exponent(score * weight), float("-inf"))
        larger = tl.maximum(maximum, tl.max(x, 1))
        offset = tl.where(larger == float("-inf"), 0.0, larger)  # no neighbour so far, or all overflowed
        p = tl.exp2(x - offset[:, None])
        shrink = tl.exp2(maximum - offset)
        normalizer = normalizer * shrink + tl.sum(p, 1)
        if neighbors is not None:
            v, lost = _finite(v, number)
            p = tl.where(heard, p + lost, 0.0)
        total = total * shrink[:, None] + tl.dot(
            rounded(p.to(v.dtype), PRECISION), v, input_precision=PRECISION
        )
        maximum = larger
    # No neighbour at all: the output is 0. Scores that all overflowed to -infinity give NaN, as a softmax does.
    lonely = hears == 0
    inverse = 1.0 / tl.where(lonely, 1.0, normalizer)
    output += (batch * output_batch + head * output_head) * VECTOR
    store_rows(output, node, output_row * VECTOR, total * inverse[:, None], exists, VALUE_DIM, TILE_VALUE)
    saved += pair * nodes
    tl.store(saved + row, tl.where(lonely, 0.0, maximum), mask=exists)
    tl.store(saved + plane + row, inverse, mask=exists)


@triton.jit
def _attention(score, weight, heard, maximum, inverse):
    """Attention of a tile as the forward had it, of the scores, E, and its receivers' maximum and inverse."""
    return tl.where(heard, tl.exp2(exponent(score * weight) - maximum) * inverse, 0.0)


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
    q = load_rows(query, node, query_row, DIM, TILE_DIM, PRECISION)
    do = load_rows(grad_output, node, output_row, VALUE_DIM, TILE_VALUE, PRECISION)
    maximum = tl.load(saved + node)[:, None]
    inverse = tl.load(saved + plane + node)[:, None]
    delta = tl.zeros([BLOCK], number)
    for start in range(0, nodes, STEP):
        sender = tl.minimum(start + tl.arange(0, STEP), nodes - 1)
        k = load_rows(key, sender, query_row, DIM, TILE_DIM, PRECISION)
        v = load_rows(value, sender, value_row, VALUE_DIM, TILE_VALUE, PRECISION)
        inside = _inside(first, start, nodes, BLOCK, STEP, False)
        heard = _neighbors(neighbors, neighbors_row, first, start, inside, BLOCK, STEP, False)
        weight = tl.load(_addresses(edge, edge_row, first, start, BLOCK, STEP, False), mask=heard, other=0.0)
        score = scale * row_products(q, k, None, PRECISION)
        attention = _attention(score, weight.to(number), heard, maximum, inverse)
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
            grad_tile = tl.zeros([BLOCK, SHARED_STEP], number)
            heads = resolutions // edge_resolutions
            for share in range(0, heads * (batches // edge_batches)):
                batch, head = edge_of + share // heads, edge_for + share % heads
                pair = batch * resolutions + head
                # Else the addresses of all tiles are worked out before the loop, and wait in registers.
                first += share * zero
                start += share * zero
                node = tl.minimum(first + tl.arange(0, BLOCK), nodes - 1)
                sender = tl.minimum(start + tl.arange(0, SHARED_STEP), nodes - 1)
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
                v = load_rows(value_of, sender, value_row, VALUE_DIM, TILE_VALUE, PRECISION)
                passed = row_products(do, v, None, PRECISION) - delta
                q = load_rows(query + query_offset, node, query_row, DIM, TILE_DIM, PRECISION)
                k = load_rows(key + query_offset, sender, query_row, DIM, TILE_DIM, PRECISION)
                maximum = tl.load(saved + pair * nodes + node)[:, None]
                inverse = tl.load(saved + plane + pair * nodes + node)[:, None]
                heard = _inside(first, start, nodes, BLOCK, SHARED_STEP, False)
                if neighbors is not None:
                    mask = neighbors + batch * neighbors_batch + head * neighbors_head
                    heard = _neighbors(mask, neighbors_row, first, start, heard, BLOCK, SHARED_STEP, False)
                weight = tl.load(
                    _addresses(edge, edge_row, first, start, BLOCK, SHARED_STEP, False), mask=heard, other=0.0
                ).to(number)
                score = scale * row_products(q, k, None, PRECISION)
                grad_x = _attention(score, weight, heard, maximum, inverse) * passed
                if grad_new_edge is not None:
                    gradient = grad_new_edge + batch * grad_new_edge_batch + head * grad_new_edge_head
                    address = _addresses(gradient, grad_new_edge_row, first, start, BLOCK, SHARED_STEP, False)
                    f = tl.load(factor + pair * nodes + node)[:, None]
                    through_edge = tl.where(heard, f * tl.load(address, mask=heard, other=0.0), 0.0)
                    grad_x += through_edge
                    grad_tile += through_edge
                grad_tile += tl.where(heard, grad_x * score, 0.0)  # what is not heard may be NaN
            grad_edge += matrix * nodes * nodes
            address = _addresses(grad_edge, nodes, first, start, BLOCK, SHARED_STEP, False)
            inside = _inside(first, start, nodes, BLOCK, SHARED_STEP, False)
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
            q = load_rows(query, node, query_row, DIM, TILE_DIM, PRECISION)
            do = load_rows(grad_output, node, output_row, VALUE_DIM, TILE_VALUE, PRECISION)
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
            grad_q = tl.zeros([BLOCK, TILE_DIM], number)
            for start in range(0, nodes, STEP):
                if RELOAD:
                    again = node + start * zero
                    q = load_rows(query, again, query_row, DIM, TILE_DIM, PRECISION)
                    do = load_rows(grad_output, again, output_row, VALUE_DIM, TILE_VALUE, PRECISION)
                sender = tl.minimum(start + tl.arange(0, STEP), nodes - 1)
                k = load_rows(key, sender, query_row, DIM, TILE_DIM, PRECISION)
                v = load_rows(value, sender, value_row, VALUE_DIM, TILE_VALUE, PRECISION)
                inside = _inside(first, start, nodes, BLOCK, STEP, False)
                heard = _neighbors(neighbors, neighbors_row, first, start, inside, BLOCK, STEP, False)
                weight = tl.load(
                    _addresses(edge, edge_row, first, start, BLOCK, STEP, False), mask=heard, other=0.0
                )
                weight = weight.to(number)
                if neighbors is not None:
                    k, lost = _finite(k, number)
                score = scale * row_products(q, k, None, PRECISION)
                if neighbors is not None:
                    score += lost
                attention = _attention(score, weight, heard, maximum, inverse)
                grad_x = attention * (row_products(do, v, None, PRECISION) - delta)
                if grad_new_edge is not None:
                    address = _addresses(grad_new_edge, grad_new_edge_row, first, start, BLOCK, STEP, False)
                    gradient = tl.load(address, mask=heard, other=0.0)
                    through_edge = tl.where(heard, f * gradient, 0.0)
                    grad_x += through_edge
                    if grad_factor is not None:
                        grad_f += tl.sum(tl.where(heard, gradient * (weight + score * weight), 0.0), 1)
                if grad_query is not None:
                    grad_score = tl.where(heard, grad_x * weight, 0.0)  # what is not heard may be NaN
                    grad_q += tl.dot(rounded(grad_score.to(k.dtype), PRECISION), k, input_precision=PRECISION)
                if grad_edge is not None and not SHARED_EDGE:
                    address = _addresses(grad_edge, nodes, first, start, BLOCK, STEP, False)
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
        k = load_rows(key, node, query_row, DIM, TILE_DIM, PRECISION)
        v = load_rows(value, node, value_row, VALUE_DIM, TILE_VALUE, PRECISION)
        grad_k = tl.zeros([BLOCK, TILE_DIM], number)
        grad_v = tl.zeros([BLOCK, TILE_VALUE], number)
        for start in range(0, nodes, STEP):
            if RELOAD:
                again = node + start * zero
                k = load_rows(key, again, query_row, DIM, TILE_DIM, PRECISION)
                v = load_rows(value, again, value_row, VALUE_DIM, TILE_VALUE, PRECISION)
            receiver = tl.minimum(start + tl.arange(0, STEP), nodes - 1)
            q = load_rows(query, receiver, query_row, DIM, TILE_DIM, PRECISION)
            do = load_rows(grad_output, receiver, output_row, VALUE_DIM, TILE_VALUE, PRECISION)
            maximum = tl.load(saved + receiver)[None, :]
            inverse = tl.load(saved + plane + receiver)[None, :]
            inside = _inside(start, first, nodes, STEP, BLOCK, True)
            heard = _neighbors(neighbors, neighbors_row, start, first, inside, STEP, BLOCK, True)
            weight = tl.load(
                _addresses(edge, edge_row, start, first, STEP, BLOCK, True), mask=heard, other=0.0
            )
            weight = weight.to(number)
            if neighbors is not None:
                q, lost = _finite(q, number)
                do, lost_gradient = _finite(do, number)
            score = scale * row_products(k, q, None, PRECISION)
            if neighbors is not None:
                score += lost
            attention = _attention(score, weight, heard, maximum, inverse)
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
                grad_x = attention * (row_products(v, do, None, PRECISION) - delta)
                if grad_new_edge is not None:
                    address = _addresses(grad_new_edge, grad_new_edge_row, start, first, STEP, BLOCK, True)
                    f = tl.load(factor + receiver)[None, :]
                    grad_x += tl.where(heard, f * tl.load(address, mask=heard, other=0.0), 0.0)
                grad_score = tl.where(heard, grad_x * weight, 0.0)
                grad_k += tl.dot(rounded(grad_score.to(q.dtype), PRECISION), q, input_precision=PRECISION)
        if grad_key is not None:
            store_rows(grad_key + gradient_offset, node, gradient_row, grad_k * scale, exists, DIM, TILE_DIM)
        if grad_value is not None:
            grad_value += (batch * value_gradient_batch + head * value_gradient_head) * VECTOR
            store_rows(grad_value, node, value_gradient_row * VECTOR, grad_v, exists, VALUE_DIM, TILE_VALUE)


def _setting(query: Tensor, value: Tensor, precision: str, direction: str):
    """What depends on types and head sizes alone: kernel constants and the compiler's options."""
    arithmetic = launch.arithmetic_of(query.dtype, precision)
    dim, value_dim = query.shape[3], value.shape[3]
    tile_dim, tile_value = launch.padded(dim), launch.padded(value_dim)
    constants, options = launch.configuration(
        f"edge_attention_{direction}",
        arithmetic,
        max(tile_dim, tile_value),
        0,
        launch.architecture(query.device),
    )
    tiles = {"DIM": dim, "VALUE_DIM": value_dim, "TILE_DIM": tile_dim, "TILE_VALUE": tile_value}
    return {**tiles, "PRECISION": launch.dot_precision(arithmetic), **constants}, options


def _mask(neighbors: Tensor | None, query: Tensor) -> Tensor | None:
    """The neighbours as the kernels load them: where the rest is float64, not as bytes.

    The compiler packs the operands of a product as tightly as the narrowest load that they depend on, and does not
    compile for sm_80 and sm_90 when it takes four numbers of 64 bits for as many bytes.
    """
    return neighbors.to(torch.int32) if neighbors is not None and query.dtype is torch.float64 else neighbors


def _matrices(name: str, tensor: Tensor | None) -> dict[str, Tensor | int | None]:
    """Kernel arguments: [B or 1, K or 1, N, N] and its strides; copied unless a row lies side by side."""
    if tensor is None:
        return {name: None, f"{name}_batch": 0, f"{name}_head": 0, f"{name}_row": 0}
    if tensor.shape[3] > 1 and tensor.stride(3) != 1:
        tensor = tensor.contiguous()
    batch, head = (0 if tensor.shape[i] == 1 else tensor.stride(i) for i in (0, 1))
    return {name: tensor, f"{name}_batch": batch, f"{name}_head": head, f"{name}_row": tensor.stride(2)}


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor,
    neighbors: Tensor | None,
    factor: Tensor | None,
    scale: float,
    precision: str,
    results: Sequence[Tensor],
) -> None:
    """Launch the forward kernel."""
    batch, resolutions, nodes, _ = query.shape
    output, new_edge, saved = results
    query, value = dense_rows(query), dense_rows(value)
    key = laid_out_like(key, query)
    constants, options = _setting(query, value, precision, "forward")
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        **_matrices("edge", edge),
        **_matrices("neighbors", _mask(neighbors, query)),
        "factor": None if factor is None else factor.to(saved.dtype).contiguous(),
        "new_edge": None if factor is None else new_edge,
        "output": output,
        "saved": saved,
        "plane": batch * resolutions * nodes,
        "resolutions": resolutions,
        "nodes": nodes,
        **launch.strides(query=query, value=value, output=output),
        "scale_bits": launch.bits(scale),
        **constants,
    }
    programs = batch * resolutions * triton.cdiv(nodes, constants["BLOCK"])
    launch.launch(_forward, (programs,), arguments, options, query.device)


def backward(
    grad_output: Tensor,
    grad_new_edge: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor,
    neighbors: Tensor | None,
    factor: Tensor | None,
    output: Tensor,
    saved: Tensor,
    scale: float,
    needs: list[bool],
    precision: str,
    results: Sequence[Tensor | None],
) -> None:
    """Launch the backward kernel."""
    batch, resolutions, nodes, _ = query.shape
    grad_query, grad_key, grad_value, grad_edge, grad_factor = results
    query, value = dense_rows(query), dense_rows(value)
    key = laid_out_like(key, query)
    grad_output = laid_out_like(grad_output, output)
    if grad_factor is not None and grad_new_edge is None:
        grad_factor.zero_()
        grad_factor = None
    shared_edge = grad_edge is not None and edge.shape[:2] != query.shape[:2]
    of_receivers = any(x is not None for x in (grad_query, grad_factor, None if shared_edge else grad_edge))
    of_senders = grad_key is not None or grad_value is not None
    # Tensor cores' operands have lost more than a plain sum of dO O does.
    by_itself = launch.arithmetic_of(query.dtype, precision) in ("ieee", "float64")
    needs_deltas = by_itself and any(x is not None for x in (grad_query, grad_key, grad_edge))
    constants, options = _setting(query, value, precision, "backward")
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        **_matrices("edge", edge),
        **_matrices("neighbors", _mask(neighbors, query)),
        "factor": None if grad_new_edge is None or factor is None else factor.to(saved.dtype).contiguous(),
        "output": output,
        "grad_output": grad_output,
        **_matrices("grad_new_edge", grad_new_edge),
        "saved": saved,
        "deltas": torch.empty_like(saved[0]) if needs_deltas else None,
        "grad_query": grad_query,
        "grad_key": grad_key,
        "grad_value": grad_value,
        "grad_edge": grad_edge,
        "grad_factor": grad_factor,
        "plane": batch * resolutions * nodes,
        "batches": batch,
        "resolutions": resolutions,
        "nodes": nodes,
        "edge_batches": edge.shape[0],
        "edge_resolutions": edge.shape[1],
        "zero": 0,
        **launch.strides(
            query=query,
            value=value,
            output=output,
            gradient=next((x for x in (grad_query, grad_key) if x is not None), query),
            value_gradient=value if grad_value is None else grad_value,
        ),
        "scale_bits": launch.bits(scale),
        "SHARED_EDGE": shared_edge,
        "RECEIVERS": of_receivers,
        "SENDERS": of_senders,
        **constants,
    }
    blocks = triton.cdiv(nodes, constants["BLOCK"])
    if needs_deltas:
        programs = batch * resolutions * blocks
        launch.launch(_sum_deltas, (programs,), launch.taken(_sum_deltas, arguments), options, query.device)
    programs = (of_receivers + of_senders) * batch * resolutions * blocks
    if shared_edge:
        programs += edge.shape[0] * edge.shape[1] * blocks * triton.cdiv(nodes, constants["SHARED_STEP"])
    if programs:
        launch.launch(_backward, (programs,), arguments, options, query.device)
