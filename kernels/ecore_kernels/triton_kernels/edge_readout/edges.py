"""Receivers, senders and edges of a tile: for the forward and the backward kernel of edge_readout."""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.tiles import rounded, rows_of

# Sizes and strides differ from batch to batch: recompiling when one happens to be a multiple of 16 would cost more than
# it gains. VECTOR tells the compiler what it needs.
VARYING = [
    "resolutions", "words", "emotions", "correlation_batch", "pairs", "scale_bits",
    *(f"{of}_{name}" for of in ("history", "gradient") for name in ("batch", "head", "row")),
]  # fmt: skip


@triton.jit
def rows_of_block(block, words, emotions, BLOCK: tl.constexpr):
    """The receivers of a block: blocks of words come first, then blocks of emotions.

    Returns:
        whether they are emotions; each one's index among its kind, its node, whether it exists.
    """
    word_blocks = tl.cdiv(words, BLOCK)
    emotional = block >= word_blocks
    row = tl.where(emotional, block - word_blocks, block) * BLOCK + tl.arange(0, BLOCK)
    return emotional, row, row + tl.where(emotional, words, 0), row < tl.where(emotional, emotions, words)


@triton.jit
def takes_part(node, exists, word_mask, emotion_mask, words):
    """The nodes that exist and take part in the (b, k) that the masks belong to."""
    screened = exists & (node > 0) & (node < words)
    part = exists & (tl.load(word_mask + node, mask=screened, other=1) != 0)
    if emotion_mask is not None:
        part = part & (tl.load(emotion_mask + node - words, mask=exists & (node >= words), other=1) != 0)
    # Triton lays out a dot's operands for the narrowest load that it can trace them to. For bytes it could not use
    # ldmatrix, and in float64 it has no product for that layout; it does not trace through a reduction.
    return tl.max(part.to(tl.int32)[:, None], 1) != 0


@triton.jit
def heard_by(receiver, sender, receives, sends):
    """The edges of a tile: an emotion does not hear itself. Nodes count from the first emotion."""
    return receives & sends & (receiver != sender)


@triton.jit
def edge_values(to_words, word_row, to_emotions, row, column, emotional, wanted, emotions):
    """The values of a tile's edges; 0 where they are not wanted.

    Args:
        to_words: [P] or, with a stride ``word_row`` over words that is not 0, [M, P].
        to_emotions: [P, P].
    """
    values = tl.where(emotional, to_emotions, to_words)
    return tl.load(values + row * tl.where(emotional, emotions, word_row) + column, mask=wanted, other=0.0)


@triton.jit
def load_all(
    bases, offset, node, stride, part, WIDTH: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr
):
    """The rows of these nodes from every tensor of a tuple, for a dot; zeros for those that take no part."""
    inside = (tl.arange(0, TILE) < WIDTH)[None, :] & part[:, None]
    tiles = ()
    for m in tl.static_range(len(bases)):
        rows = tl.load(rows_of(bases[m] + offset, node, stride, WIDTH, TILE), mask=inside, other=0.0)
        tiles += (rounded(rows, PRECISION),)
    return tiles


@triton.jit
def factors(staying, streaming, scale, PRECISION: tl.constexpr):
    """u of every layer, a tile [staying, streaming]."""
    u = ()
    for m in tl.static_range(len(staying)):
        u += (1.0 + scale * tl.dot(staying[m], tl.trans(streaming[m]), input_precision=PRECISION),)
    return u
