"""Shared parts of the attention kernels: the order that the forward saves, and the weighted scores of a tile.

Tiles are [I, J], receivers by senders; the backward by columns has them [J, I]. Rows of nodes are tuples of tiles
[I or J, PIECE], d columns in all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.tiles import exponent, inner_product, load_pieces

# Sizes and strides differ from batch to batch: recompiling when one happens to be a multiple of 16 would cost more than
# it gains. VECTOR tells the compiler what it needs.
VARYING = [
    "plane", "resolutions", "words", "emotions", "correlation_batch", "zero", "scale_bits",
    *(
        f"{of}_{name}"
        for of in ("query", "value", "output", "gradient", "value_gradient")
        for name in ("batch", "head", "row")
    ),
]  # fmt: skip


@triton.jit
def saved_of(saved, plane, pair, nodes):
    """The addresses in a (b, k)'s planes of ``saved``, each plane of that many elements.

    Returns:
        for each place in the order, the receiver's maximum, one over its sum, and E0 of the edges that its node sends
        to words, [N] each; the order [N]; the counts of emotions and of nodes that take part.
    """
    plane = plane.to(tl.int64)
    order = (saved + 3 * plane).to(tl.pointer_type(tl.int32), bitcast=True)
    counts = (saved + 4 * plane).to(tl.pointer_type(tl.int32), bitcast=True)
    saved += pair * nodes
    return saved, saved + plane, saved + 2 * plane, order + pair * nodes, counts + pair * 2


@triton.jit
def end_of_senders(block, skipped, emotion_count, count, BLOCK: tl.constexpr):
    """The place after the last one that any receiver of the block hears: [CLS], in the first block, hears all."""
    end = tl.minimum(tl.maximum((block + 1) * BLOCK + skipped, emotion_count + 1), count)
    return tl.where(block == 0, count, end)


@triton.jit
def initial_edges(
    receiver,  # [I], places in the order
    sender,  # [J]
    receiver_node,  # [I]
    sender_node,  # [J]
    weight,  # [J], of the senders' edges to words
    correlation,  # [P, P]
    words,
    emotions,
    emotion_count,
    between_emotions,  # whether the tile may hold edges between emotions
    COLUMNS: tl.constexpr,
):
    """E0 of a tile: [I, J], or with COLUMNS [J, I]."""
    receiver = tl.expand_dims(receiver, 1 - COLUMNS)
    sender = tl.expand_dims(sender, COLUMNS)
    edge = tl.expand_dims(weight, COLUMNS) + tl.zeros_like(receiver).to(weight.dtype)
    if between_emotions:
        learned = (receiver > 0) & (receiver <= emotion_count) & (sender > 0) & (sender <= emotion_count)
        row = tl.expand_dims(receiver_node, 1 - COLUMNS).to(tl.int64) - words
        column = tl.expand_dims(sender_node, COLUMNS) - words
        entry = tl.load(correlation + row * emotions + column, mask=learned, other=0.0)
        edge = tl.where(learned, entry.to(edge.dtype), edge)
    return edge


@triton.jit
def load_all(bases, offset, node, stride, WIDTH: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr):
    """The rows of these nodes from every tensor of a tuple."""
    tiles = ()
    for m in tl.static_range(len(bases)):
        tiles += (load_pieces(bases[m] + offset, node, stride, WIDTH, PIECE, PRECISION),)
    return tiles


@triton.jit
def all_u(
    own, bases, offset, node, stride,
    scale, WIDTH: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u = 1 + scale * q . k of every earlier layer, between its loaded rows and the rows of these nodes."""
    u = ()
    for m in tl.static_range(len(own)):
        # Loaded right before its product: together the layers would fill the registers.
        rows = load_pieces(bases[m] + offset, node, stride, WIDTH, PIECE, PRECISION)
        u += (1.0 + scale * inner_product(own[m], rows, PRECISION),)  # [own rows, these nodes]
    return u


@triton.jit
def weighted(score, edge, factor, u):
    """Scores times their edges, multiplied in the same order in forward and backward."""
    x = score * edge
    if factor is not None:
        x *= factor
    for m in tl.static_range(len(u)):
        x *= u[m]
    return x


@triton.jit
def attention_of(x, heard, maximum, inverse):
    """The forward's attention of a tile, from its weighted scores and its receivers' maximum and inverse."""
    return tl.where(heard, tl.exp2(exponent(x) - maximum) * inverse, 0.0)
