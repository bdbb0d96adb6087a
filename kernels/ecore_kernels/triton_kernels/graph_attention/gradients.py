"""Gradients of one tile, and sums of them by layer: for receivers and for senders."""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.tiles import add_product, load_pieces, scaled, store_pieces, zero_pieces


@triton.jit
def _whole_edges(edge, factor, u):
    """The edges of a tile, of E0, r of the receivers (None for 1) and every layer's u."""
    if factor is not None:
        edge = edge * factor
    for m in tl.static_range(len(u)):
        edge *= u[m]
    return edge


@triton.jit
def gradients_of_tile(
    score, u, attention, grad_attention,  # of one tile [I, J] or [J, I]; the last is dO V^T
    edge, factor,  # E0 of the tile; r of its receivers, or None
    heard, delta,  # which pairs are neighbours; see ``_sum_deltas``
):  # fmt: skip
    """The backward of one tile, with G = A (dO V^T - delta) the gradient of the weighted scores.

    Returns:
        the gradients of the scores, of every layer's u, of E0, and of r before its sum over senders; 0 off the graph.
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
    # Values of senders that are not heard may be NaN, and so are their products with an attention of 0.
    grad_edge = tl.where(heard, grad_edge, 0.0)
    grad_factor = tl.where(heard, grad_factor, 0.0)
    return tl.where(heard, g * _whole_edges(edge, factor, u), 0.0), grad_u, grad_edge, grad_factor


@triton.jit
def add_all(
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
def zeros_like_all(like, ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr, TYPE: tl.constexpr):
    """Rows of zeros for every member of a tuple."""
    tiles = ()
    for _ in tl.static_range(len(like)):
        tiles += (zero_pieces(ROWS, WIDTH, PIECE, TYPE),)
    return tiles


@triton.jit
def store_all(bases, offset, node, stride, tiles, scale, stored, WIDTH: tl.constexpr, PIECE: tl.constexpr):
    for m in tl.static_range(len(bases)):
        store_pieces(bases[m] + offset, node, stride, scaled(tiles[m], scale), stored, WIDTH, PIECE)
