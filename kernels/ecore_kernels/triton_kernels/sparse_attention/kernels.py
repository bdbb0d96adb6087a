"""Attention over a sparse graph: forward, and the backward of receivers, then of senders.

One program handles one head of one node and loops over its edges, some at a time: every number has one writer, and sums
have a fixed order. Shape tags: T = edges of a step (EDGES); D, V = head sizes of keys and values, padded to powers of
two.
Numbers of nodes, [N, H, d] in their own types, are converted as they are loaded; sums are in the type of ``weight``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.tiles import exponent, number_of

STRIDES = tuple(
    f"{name}_{dimension}"
    for name in ("query", "key", "value", "edge", "bias", "key_scale", "key_offset", "value_offset", "sent")
    for dimension in ("node", "head")
)
VARYING = ("heads", "scale_bits", *STRIDES)


@triton.jit
def _rows(
    base,
    node,
    inside,
    row_stride,
    head,
    head_stride,
    VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Rows of one head of some nodes or edges, [T, TILE], 0 where ``inside`` [T] is false; strides in VECTOR."""
    column = tl.arange(0, TILE)[None, :]
    at = (node * row_stride + head * head_stride) * VECTOR
    return tl.load(base + at[:, None] + column, mask=inside[:, None] & (column < WIDTH), other=0.0)


@triton.jit
def _row(
    base, node, row_stride, head, head_stride, VECTOR: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    """One head of one node, [1, TILE]."""
    column = tl.arange(0, TILE)[None, :]
    return tl.load(
        base + (node * row_stride + head * head_stride) * VECTOR + column, mask=column < WIDTH, other=0.0
    )


@triton.jit
def _edges_of(begins, by_node, node, start, EDGES: tl.constexpr):
    """Some edges of a node from its place ``start`` on: their numbers [T], and which of the T exist."""
    place = start + tl.arange(0, EDGES)
    inside = place < tl.load(begins + node + 1)
    return tl.load(by_node + place, mask=inside, other=0), inside


@triton.jit
def _whole_scale(
    edge, e, inside, row_stride, head, head_stride, scale_bits, EDGES: tl.constexpr, NUMBER: tl.constexpr
):
    """scale times the edges' factors, [T]: the factor on a query times a key."""
    scale = tl.zeros([EDGES], NUMBER) + number_of(scale_bits, NUMBER)
    if edge is not None:
        scale *= tl.load(edge + e * row_stride + head * head_stride, mask=inside, other=0.0).to(NUMBER)
    return scale


@triton.jit(do_not_specialize=VARYING)
def _forward(
    query, key, value,  # [N, H, d], [M, H, d], [M, H, dv]
    edge, bias,  # [E, H] or None
    key_scale, key_offset, value_offset,  # [E, H, d], [E, H, d], [E, H, dv] or None
    sender, receiver_begin, by_receiver,  # [E], [N + 1], [E]
    score,  # [E, H], written and read again
    weight, output,  # [E, H], [N, H, dv]
    heads, scale_bits: tl.int64,
    query_node, query_head, key_node, key_head, value_node, value_head, edge_node, edge_head, bias_node, bias_head,
    key_scale_node, key_scale_head, key_offset_node, key_offset_head, value_offset_node, value_offset_head,
    VECTOR: tl.constexpr, EDGES: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_TILE: tl.constexpr,
):  # fmt: skip
    """Scores and the sum of their exponentials, then weights and values."""
    number: tl.constexpr = weight.dtype.element_ty
    i, head = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0).to(tl.int64) % heads
    begin, end = tl.load(receiver_begin + i), tl.load(receiver_begin + i + 1)
    q = _row(query, i, query_node, head, query_head, VECTOR, DIM, TILE).to(number)  # [1, D]
    highest = tl.full([], float("-inf"), number)
    total = tl.zeros([], number)
    for start in range(begin, end, EDGES):
        e, inside = _edges_of(receiver_begin, by_receiver, i, start, EDGES)
        j = tl.load(sender + e, mask=inside, other=0)
        k = _rows(key, j, inside, key_node, head, key_head, VECTOR, DIM, TILE).to(number)  # [T, D]
        if key_scale is not None:
            k *= _rows(
                key_scale, e, inside, key_scale_node, head, key_scale_head, VECTOR, DIM, TILE
            ).to(number)  # fmt: skip
        if key_offset is not None:
            k += _rows(
                key_offset, e, inside, key_offset_node, head, key_offset_head, VECTOR, DIM, TILE
            ).to(number)  # fmt: skip
        x = tl.sum(q * k, 1) * _whole_scale(
            edge, e, inside, edge_node, head, edge_head, scale_bits, EDGES, number
        )  # [T]
        if bias is not None:
            x += tl.load(bias + e * bias_node + head * bias_head, mask=inside, other=0.0).to(number)
        x = tl.where(inside, exponent(x), float("-inf"))
        tl.store(score + e * heads + head, x, mask=inside)
        higher = tl.maximum(highest, tl.max(x, 0))
        offset = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(highest - offset) + tl.sum(tl.exp2(x - offset), 0)
        highest = higher
    tl.debug_barrier()  # what one thread wrote another one reads
    offset = tl.where(highest == float("-inf"), 0.0, highest)
    inverse = 1.0 / tl.where(begin < end, total, 1.0)
    heard = tl.zeros([EDGES, VALUE_TILE], number)
    for start in range(begin, end, EDGES):
        e, inside = _edges_of(receiver_begin, by_receiver, i, start, EDGES)
        x = tl.load(score + e * heads + head, mask=inside, other=float("-inf"))
        w = tl.where(inside, tl.exp2(x - offset) * inverse, 0.0)  # [T]
        tl.store(weight + e * heads + head, w, mask=inside)
        j = tl.load(sender + e, mask=inside, other=0)
        v = _rows(value, j, inside, value_node, head, value_head, VECTOR, VALUE_DIM, VALUE_TILE).to(
            number
        )  # [T, V]
        if value_offset is not None:
            v += _rows(
                value_offset, e, inside, value_offset_node, head, value_offset_head, VECTOR, VALUE_DIM, VALUE_TILE
            ).to(number)  # fmt: skip
        heard += w[:, None] * v
    column = tl.arange(0, VALUE_TILE)
    at = (i * heads + head) * VALUE_DIM + column
    tl.store(output + at, tl.sum(heard, 0).to(output.dtype.element_ty), mask=column < VALUE_DIM)


@triton.jit(do_not_specialize=VARYING)
def _receivers(
    query, key, value, edge, bias, key_scale, key_offset, value_offset,  # as in _forward
    sent,  # [N, H, dv], the gradient of the output
    sender, receiver_begin, by_receiver,
    weight, grad_weight, grad_score,  # [E, H]; the latter two are written, grad_weight for this program only
    grad_query, grad_edge, grad_bias, grad_key_scale, grad_key_offset, grad_value_offset,  # contiguous, or None
    heads, scale_bits: tl.int64,
    query_node, query_head, key_node, key_head, value_node, value_head, edge_node, edge_head, bias_node, bias_head,
    key_scale_node, key_scale_head, key_offset_node, key_offset_head, value_offset_node, value_offset_head,
    sent_node, sent_head,
    VECTOR: tl.constexpr, EDGES: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of weights, of scores, and of all that belongs to a receiver or an edge."""
    number: tl.constexpr = weight.dtype.element_ty
    i, head = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0).to(tl.int64) % heads
    begin, end = tl.load(receiver_begin + i), tl.load(receiver_begin + i + 1)
    column, value_column = tl.arange(0, TILE)[None, :], tl.arange(0, VALUE_TILE)[None, :]
    upstream = _row(sent, i, sent_node, head, sent_head, VECTOR, VALUE_DIM, VALUE_TILE).to(number)  # [1, V]
    mean = tl.zeros([], number)
    for start in range(begin, end, EDGES):
        e, inside = _edges_of(receiver_begin, by_receiver, i, start, EDGES)
        j = tl.load(sender + e, mask=inside, other=0)
        v = _rows(value, j, inside, value_node, head, value_head, VECTOR, VALUE_DIM, VALUE_TILE).to(
            number
        )  # [T, V]
        if value_offset is not None:
            v += _rows(
                value_offset, e, inside, value_offset_node, head, value_offset_head, VECTOR, VALUE_DIM, VALUE_TILE
            ).to(number)  # fmt: skip
        w = tl.load(weight + e * heads + head, mask=inside, other=0.0)  # [T]
        of_weight = tl.sum(upstream * v, 1)
        tl.store(grad_weight + e * heads + head, of_weight, mask=inside)
        mean += tl.sum(w * of_weight, 0)
        if grad_value_offset is not None:
            tl.store(
                grad_value_offset + ((e * heads + head) * VALUE_DIM)[:, None] + value_column,
                (w[:, None] * upstream).to(grad_value_offset.dtype.element_ty),
                mask=inside[:, None] & (value_column < VALUE_DIM),
            )
    tl.debug_barrier()  # what one thread wrote another one reads
    q = _row(query, i, query_node, head, query_head, VECTOR, DIM, TILE).to(number)  # [1, D]
    of_query = tl.zeros([EDGES, TILE], number)
    for start in range(begin, end, EDGES):
        e, inside = _edges_of(receiver_begin, by_receiver, i, start, EDGES)
        w = tl.load(weight + e * heads + head, mask=inside, other=0.0)  # [T]
        of_score = w * (tl.load(grad_weight + e * heads + head, mask=inside, other=0.0) - mean)
        of_score = tl.where(inside, of_score, 0.0)  # 0 times a mean that is not finite
        tl.store(grad_score + e * heads + head, of_score, mask=inside)
        if grad_bias is not None:
            tl.store(grad_bias + e * heads + head, of_score.to(grad_bias.dtype.element_ty), mask=inside)
        factor = of_score * _whole_scale(
            edge, e, inside, edge_node, head, edge_head, scale_bits, EDGES, number
        )  # [T]
        row = ((e * heads + head) * DIM)[:, None] + column  # [T, D]
        stored = inside[:, None] & (column < DIM)
        if grad_key_offset is not None:
            of_offset = factor[:, None] * q
            tl.store(grad_key_offset + row, of_offset.to(grad_key_offset.dtype.element_ty), mask=stored)
        j = tl.load(sender + e, mask=inside, other=0)
        k = _rows(key, j, inside, key_node, head, key_head, VECTOR, DIM, TILE).to(number)  # [T, D]
        if grad_key_scale is not None:
            of_scale = factor[:, None] * q * k
            tl.store(grad_key_scale + row, of_scale.to(grad_key_scale.dtype.element_ty), mask=stored)
        if key_scale is not None:
            k *= _rows(
                key_scale, e, inside, key_scale_node, head, key_scale_head, VECTOR, DIM, TILE
            ).to(number)  # fmt: skip
        if key_offset is not None:
            k += _rows(
                key_offset, e, inside, key_offset_node, head, key_offset_head, VECTOR, DIM, TILE
            ).to(number)  # fmt: skip
        if grad_edge is not None:
            of_edge = of_score * (number_of(scale_bits, number) * tl.sum(q * k, 1))
            tl.store(grad_edge + e * heads + head, of_edge.to(grad_edge.dtype.element_ty), mask=inside)
        of_query += factor[:, None] * k
    if grad_query is not None:
        at = (i * heads + head) * DIM + tl.arange(0, TILE)
        gradient = tl.sum(of_query, 0).to(grad_query.dtype.element_ty)
        tl.store(grad_query + at, gradient, mask=tl.arange(0, TILE) < DIM)


@triton.jit(do_not_specialize=VARYING)
def _senders(
    query, edge, key_scale,  # as in _forward
    sent,  # [N, H, dv], the gradient of the output
    receiver, sender_begin, by_sender,
    weight, grad_score,  # [E, H]
    grad_key, grad_value,  # contiguous, or None
    heads, scale_bits: tl.int64,
    query_node, query_head, edge_node, edge_head, key_scale_node, key_scale_head, sent_node, sent_head,
    VECTOR: tl.constexpr, EDGES: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of a sender's key and value."""
    number: tl.constexpr = weight.dtype.element_ty
    j, head = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0).to(tl.int64) % heads
    of_key = tl.zeros([EDGES, TILE], number)
    of_value = tl.zeros([EDGES, VALUE_TILE], number)
    for start in range(tl.load(sender_begin + j), tl.load(sender_begin + j + 1), EDGES):
        e, inside = _edges_of(sender_begin, by_sender, j, start, EDGES)
        i = tl.load(receiver + e, mask=inside, other=0)
        if grad_key is not None:
            factor = tl.load(grad_score + e * heads + head, mask=inside, other=0.0)  # [T]
            factor *= _whole_scale(edge, e, inside, edge_node, head, edge_head, scale_bits, EDGES, number)
            q = _rows(query, i, inside, query_node, head, query_head, VECTOR, DIM, TILE).to(number)  # [T, D]
            if key_scale is not None:
                q *= _rows(
                    key_scale, e, inside, key_scale_node, head, key_scale_head, VECTOR, DIM, TILE
                ).to(number)  # fmt: skip
            of_key += factor[:, None] * q
        if grad_value is not None:
            w = tl.load(weight + e * heads + head, mask=inside, other=0.0)  # [T]
            g = _rows(sent, i, inside, sent_node, head, sent_head, VECTOR, VALUE_DIM, VALUE_TILE).to(number)
            of_value += w[:, None] * g
    row = j * heads + head
    if grad_key is not None:
        column = tl.arange(0, TILE)
        gradient = tl.sum(of_key, 0).to(grad_key.dtype.element_ty)
        tl.store(grad_key + row * DIM + column, gradient, mask=column < DIM)
    if grad_value is not None:
        column = tl.arange(0, VALUE_TILE)
        gradient = tl.sum(of_value, 0).to(grad_value.dtype.element_ty)
        tl.store(grad_value + row * VALUE_DIM + column, gradient, mask=column < VALUE_DIM)
