"""The forward kernel of attention on any dense graph."""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.edge_attention.edges import (
    VARYING,
    addresses,
    finite,
    inside_graph,
    neighbors_in,
)
from ecore_kernels.triton_kernels.tiles import (
    exponent,
    load_rows,
    number_of,
    rounded,
    row_products,
    store_rows,
)


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
    """One program: BLOCK receivers of one (b, k), over all senders, STEP at a time.

    Shape tags: I = BLOCK receivers, J = STEP senders.
    """
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

    row = first + tl.arange(0, BLOCK)  # [I]
    exists = row < nodes
    node = tl.minimum(row, nodes - 1)  # rows past the last one repeat it, and are not stored
    query += (batch * query_batch + head * query_head) * VECTOR
    q = load_rows(query, node, query_row * VECTOR, DIM, TILE_DIM, PRECISION)  # [I, d]
    number: tl.constexpr = saved.dtype.element_ty
    scale = number_of(scale_bits, number)
    if factor is not None:
        f = tl.load(factor + pair * nodes + node)[:, None]  # [I, 1]
    maximum = tl.full([BLOCK], float("-inf"), number)
    normalizer = tl.zeros([BLOCK], number)
    total = tl.zeros([BLOCK, TILE_VALUE], number)  # [I, dv]
    hears = tl.zeros([BLOCK], tl.int32)
    for start in range(0, nodes, STEP):
        sender = tl.minimum(start + tl.arange(0, STEP), nodes - 1)  # [J]
        k = load_rows(key, sender, query_row * VECTOR, DIM, TILE_DIM, PRECISION)  # [J, d]
        v = load_rows(value, sender, value_row * VECTOR, VALUE_DIM, TILE_VALUE, PRECISION)  # [J, dv]
        inside = inside_graph(first, start, nodes, BLOCK, STEP, False)
        heard = neighbors_in(neighbors, neighbors_row, first, start, inside, BLOCK, STEP, False)
        hears = tl.maximum(hears, tl.max(heard.to(tl.int32), 1))
        weight = tl.load(addresses(edge, edge_row, first, start, BLOCK, STEP, False), mask=heard, other=0.0)
        weight = weight.to(number)
        score = scale * row_products(q, k, None, PRECISION)  # [I, J]
        if new_edge is not None:
            address = addresses(new_edge, nodes, first, start, BLOCK, STEP, False)
            tl.store(address, tl.where(heard, f * (weight + score * weight), 0.0), mask=inside)
        x = tl.where(heard, exponent(score * weight), float("-inf"))
        larger = tl.maximum(maximum, tl.max(x, 1))
        offset = tl.where(larger == float("-inf"), 0.0, larger)  # no neighbour so far, or all overflowed
        p = tl.exp2(x - offset[:, None])  # [I, J]
        shrink = tl.exp2(maximum - offset)
        normalizer = normalizer * shrink + tl.sum(p, 1)
        if neighbors is not None:
            v, lost = finite(v, number)
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
