"""The kernel before the backward of attention on any dense graph: what is subtracted from gradients of weights."""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.edge_attention.edges import (
    VARYING,
    attention_of,
    clamped,
    gated,
    inside_graph,
    kept_in,
    logit,
    neighbors_in,
    tile_of,
)
from ecore_kernels.triton_kernels.tiles import load_rows, number_of, row_products


@triton.jit(do_not_specialize=VARYING)
def _sum_deltas(
    query, key, value, edge, neighbors, bias, sender_gate, seed, grad_output, grad_lse, saved,
    deltas,  # [B, H, Nq], written
    plane, heads, group, receivers, senders,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    output_batch, output_head, output_row, edge_batch, edge_head, edge_row,
    neighbors_batch, neighbors_head, neighbors_row, bias_batch, bias_head, bias_row,
    scale_bits: tl.int64, low_bits: tl.int64, high_bits: tl.int64, least_kept: tl.int64, kept_bits: tl.int64,
    CLAMP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_DIM: tl.constexpr, TILE_VALUE: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program: delta of BLOCK receivers of one (b, k), the sum of A (dO V^T) over the senders that they hear.

    It is computed from the backward's numbers and not as dO O: see ``_sum_deltas`` of ``graph_attention``.
    Shape tags: I = BLOCK receivers, J = STEP senders.
    """
    blocks = tl.cdiv(receivers, BLOCK)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK
    batch, head = pair // heads, pair % heads
    query += (batch * query_batch + head * query_head) * VECTOR
    key += (batch * key_batch + head // group * key_head) * VECTOR
    value += (batch * value_batch + head // group * value_head) * VECTOR
    grad_output += (batch * output_batch + head * output_head) * VECTOR
    query_row *= VECTOR
    key_row *= VECTOR
    value_row *= VECTOR
    output_row *= VECTOR
    if edge is not None:
        edge += batch * edge_batch + head * edge_head
    if bias is not None:
        bias += batch * bias_batch + head * bias_head
    if sender_gate is not None:
        sender_gate += pair * senders
    if neighbors is not None:
        neighbors += batch * neighbors_batch + head * neighbors_head
    saved += pair * receivers

    number: tl.constexpr = saved.dtype.element_ty
    scale, low, high = (
        number_of(scale_bits, number),
        number_of(low_bits, number),
        number_of(high_bits, number),
    )
    row = first + tl.arange(0, BLOCK)
    node = tl.minimum(row, receivers - 1)
    q = load_rows(query, node, query_row, DIM, TILE_DIM, PRECISION)  # [I, d]
    do = load_rows(grad_output, node, output_row, VALUE_DIM, TILE_VALUE, PRECISION)  # [I, dv]
    maximum = tl.load(saved + node)[:, None]
    inverse = tl.load(saved + plane + node)[:, None]
    delta = tl.zeros([BLOCK], number)
    for start in range(0, senders, STEP):
        sender = tl.minimum(start + tl.arange(0, STEP), senders - 1)  # [J]
        k = load_rows(key, sender, key_row, DIM, TILE_DIM, PRECISION)  # [J, d]
        v = load_rows(value, sender, value_row, VALUE_DIM, TILE_VALUE, PRECISION)  # [J, dv]
        inside = inside_graph(first, start, receivers, senders, BLOCK, STEP, False)
        heard = neighbors_in(neighbors, neighbors_row, first, start, inside, BLOCK, STEP, False)
        weight = tile_of(edge, edge_row, first, start, heard, 1.0, number, BLOCK, STEP, False)
        score = clamped(scale * row_products(q, k, None, PRECISION), low, high, CLAMP)  # [I, J]
        score = gated(score, sender_gate, sender, False)
        exponents = logit(score, weight, bias, bias_row, first, start, heard, BLOCK, STEP, False)
        attention = attention_of(exponents, heard, maximum, inverse)
        passed = row_products(do, v, None, PRECISION)
        if seed is not None:
            passed *= kept_in(seed, pair, first, start, least_kept, kept_bits, number, BLOCK, STEP, False)
        # Values of senders that are not heard may be NaN, and an attention of 0 times NaN is NaN.
        delta += tl.sum(tl.where(heard, attention * passed, 0.0), 1)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + pair * receivers + node)
    tl.store(deltas + pair * receivers + row, delta, mask=row < receivers)
