"""The forward kernel of attention on any dense graph."""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.edge_attention.edges import (
    VARYING,
    addresses,
    clamped,
    finite,
    gated,
    inside_graph,
    kept_in,
    logit,
    neighbors_in,
    tile_of,
)
from ecore_kernels.triton_kernels.tiles import (
    load_rows,
    number_of,
    rounded,
    row_products,
    store_rows,
)


@triton.jit(do_not_specialize=VARYING)
def _forward(
    query, key, value,  # [B, H, Nq, d], [B, Hk, Nk, d], [B, Hk, Nk, dv]
    edge, neighbors, bias,  # [B or 1, H or 1, Nq, Nk] each, or None
    sender_gate, edge_bias, seed,  # [B, H, Nk], [], int64 []; or None
    factor, new_edge,  # [B, H, Nq] and [B, H, Nq, Nk], or None both
    output, saved,  # [B, H, Nq, dv] and, for the backward, [2, B, H, Nq]: receivers' maximum and one over their sum
    plane, heads, group, receivers, senders,  # H heads, of which a group shares keys and values
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    output_batch, output_head, output_row, edge_batch, edge_head, edge_row,
    neighbors_batch, neighbors_head, neighbors_row, bias_batch, bias_head, bias_row,
    scale_bits: tl.int64, low_bits: tl.int64, high_bits: tl.int64, least_kept: tl.int64, kept_bits: tl.int64,
    CLAMP: tl.constexpr, ALL_PAIRS: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_DIM: tl.constexpr, TILE_VALUE: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK receivers of one (b, k), over all senders, STEP at a time.

    Shape tags: I = BLOCK receivers, J = STEP senders.
    """
    blocks = tl.cdiv(receivers, BLOCK)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK
    batch, head = pair // heads, pair % heads
    key += (batch * key_batch + head // group * key_head) * VECTOR
    value += (batch * value_batch + head // group * value_head) * VECTOR
    if edge is not None:
        edge += batch * edge_batch + head * edge_head
    if bias is not None:
        bias += batch * bias_batch + head * bias_head
    if sender_gate is not None:
        sender_gate += pair * senders
    if neighbors is not None:
        neighbors += batch * neighbors_batch + head * neighbors_head
    if new_edge is not None:
        new_edge += pair * receivers * senders

    row = first + tl.arange(0, BLOCK)  # [I]
    exists = row < receivers
    node = tl.minimum(row, receivers - 1)  # rows past the last one repeat it, and are not stored
    query += (batch * query_batch + head * query_head) * VECTOR
    q = load_rows(query, node, query_row * VECTOR, DIM, TILE_DIM, PRECISION)  # [I, d]
    number: tl.constexpr = saved.dtype.element_ty
    scale, low, high = (
        number_of(scale_bits, number),
        number_of(low_bits, number),
        number_of(high_bits, number),
    )
    if factor is not None:
        f = tl.load(factor + pair * receivers + node)[:, None]  # [I, 1]
    maximum = tl.full([BLOCK], float("-inf"), number)
    normalizer = tl.zeros([BLOCK], number)
    total = tl.zeros([BLOCK, TILE_VALUE], number)  # [I, dv]
    hears = tl.zeros([BLOCK], tl.int32)
    for start in range(0, senders, STEP):
        sender = tl.minimum(start + tl.arange(0, STEP), senders - 1)  # [J]
        k = load_rows(key, sender, key_row * VECTOR, DIM, TILE_DIM, PRECISION)  # [J, d]
        v = load_rows(value, sender, value_row * VECTOR, VALUE_DIM, TILE_VALUE, PRECISION)  # [J, dv]
        inside = inside_graph(first, start, receivers, senders, BLOCK, STEP, False)
        heard = neighbors_in(neighbors, neighbors_row, first, start, inside, BLOCK, STEP, False)
        hears = tl.maximum(hears, tl.max(heard.to(tl.int32), 1))
        read = inside if ALL_PAIRS else heard
        weight = tile_of(edge, edge_row, first, start, read, 1.0, number, BLOCK, STEP, False)
        score = clamped(scale * row_products(q, k, None, PRECISION), low, high, CLAMP)  # [I, J]
        score = gated(score, sender_gate, sender, False)
        if new_edge is not None:
            updated = f * (weight + score * weight)
            if edge_bias is not None:
                updated += tl.load(edge_bias)
            address = addresses(new_edge, senders, first, start, BLOCK, STEP, False)
            tl.store(address, tl.where(read, updated, 0.0), mask=inside)
        exponents = logit(score, weight, bias, bias_row, first, start, heard, BLOCK, STEP, False)
        x = tl.where(heard, exponents, float("-inf"))
        larger = tl.maximum(maximum, tl.max(x, 1))
        offset = tl.where(larger == float("-inf"), 0.0, larger)  # no neighbour so far, or all overflowed
        p = tl.exp2(x - offset[:, None])  # [I, J]
        shrink = tl.exp2(maximum - offset)
        normalizer = normalizer * shrink + tl.sum(p, 1)
        if seed is not None:
            p *= kept_in(seed, pair, first, start, least_kept, kept_bits, number, BLOCK, STEP, False)
        if neighbors is not None:
            v, lost = finite(v, number)
            p = tl.where(heard, p + lost, 0.0)
        total = total * shrink[:, None] + tl.dot(
            rounded(p.to(v.dtype), PRECISION), v, input_precision=PRECISION
        )
        maximum = larger
    # Without a neighbour the output is 0. If all scores overflowed to -infinity it is NaN, as with a softmax.
    lonely = hears == 0
    inverse = tl.where(lonely, 0.0, 1.0 / tl.where(lonely, 1.0, normalizer))
    output += (batch * output_batch + head * output_head) * VECTOR
    store_rows(output, node, output_row * VECTOR, total * inverse[:, None], exists, VALUE_DIM, TILE_VALUE)
    saved += pair * receivers
    tl.store(saved + row, tl.where(lonely, 0.0, maximum), mask=exists)
    tl.store(saved + plane + row, inverse, mask=exists)
