"""Edges in memory, tile by tile: for the forward and the backward kernels of edge_attention."""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.tiles import exponent, number_of

# Sizes and strides differ from batch to batch: recompiling when one happens to be a multiple of 16 would cost more than
# it gains. VECTOR tells the compiler what it needs.
VARYING = [
    "plane", "batches", "heads", "group", "receivers", "senders", "edge_batches", "edge_heads", "zero", "scale_bits",
    "low_bits", "high_bits", "least_kept", "kept_bits",
    *(
        f"{of}_{name}"
        for of in (
            "query", "key", "value", "output", "gradient", "key_gradient", "value_gradient", "edge", "neighbors",
            "bias", "grad_new_edge",
        )
        for name in ("batch", "head", "row")
    ),
]  # fmt: skip


@triton.jit
def inside_graph(
    receiver, sender, receivers, senders,
    RECEIVERS: tl.constexpr, SENDERS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The part of the tile from (receiver, sender) on that is inside of [Nq, Nk]; see ``addresses`` for its shape."""
    row = tl.expand_dims(receiver + tl.arange(0, RECEIVERS), 1 - COLUMNS)
    column = tl.expand_dims(sender + tl.arange(0, SENDERS), COLUMNS)
    return (row < receivers) & (column < senders)


@triton.jit
def addresses(
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
def neighbors_in(
    neighbors, row_stride, receiver, sender, inside,
    RECEIVERS: tl.constexpr, SENDERS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The pairs of the tile that are neighbours; without a mask all are."""
    if neighbors is not None:
        address = addresses(neighbors, row_stride, receiver, sender, RECEIVERS, SENDERS, COLUMNS)
        inside = inside & (tl.load(address, mask=inside, other=0) != 0)
    return inside


@triton.jit
def finite(rows, TYPE: tl.constexpr):
    """Make rows finite for a product with weights that may be 0, because 0 times NaN or infinity is NaN.

    Returns:
        the rows, with zeros for those that are not finite; and for each row 0, or NaN if it was not finite, which the
        caller adds to the receivers that hear it.
    """
    lost = tl.sum(rows.to(TYPE) * 0.0, 1)
    return tl.where((lost == 0.0)[:, None], rows, 0.0), lost[None, :]


@triton.jit
def tile_of(
    matrix, row_stride, receiver, sender, inside, ABSENT: tl.constexpr, TYPE: tl.constexpr,
    RECEIVERS: tl.constexpr, SENDERS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile of a matrix, 0 outside of it; without a matrix, ABSENT everywhere."""
    if matrix is None:
        tile = tl.full([SENDERS, RECEIVERS] if COLUMNS else [RECEIVERS, SENDERS], ABSENT, TYPE)
    else:
        address = addresses(matrix, row_stride, receiver, sender, RECEIVERS, SENDERS, COLUMNS)
        tile = tl.load(address, mask=inside, other=0.0).to(TYPE)
    return tile


@triton.jit
def clamped(score, low, high, CLAMP: tl.constexpr):
    """Scores clamped to the bounds; NaN stays NaN."""
    if CLAMP:
        score = tl.where(score < low, low, score)
        score = tl.where(score > high, high, score)
    return score


@triton.jit
def through_clamp(gradient, score, low, high, CLAMP: tl.constexpr):
    """The gradient of a score before :func:`clamped`, from that of the result."""
    if CLAMP:
        gradient = tl.where((score >= low) & (score <= high), gradient, 0.0)
    return gradient


@triton.jit
def gated(score, sender_gate, sender, COLUMNS: tl.constexpr):
    """Scores times the gates of these senders, if there are any."""
    if sender_gate is not None:
        score = score * tl.expand_dims(tl.load(sender_gate + sender).to(score.dtype), COLUMNS)
    return score


@triton.jit
def logit(
    score, weight, bias, row_stride, receiver, sender, heard,
    RECEIVERS: tl.constexpr, SENDERS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Weighted scores of a tile plus its biases, if there are any, for base 2; both directions use this function."""
    weighted = score * weight
    if bias is not None:
        weighted += tile_of(
            bias, row_stride, receiver, sender, heard, 0.0, score.dtype, RECEIVERS, SENDERS, COLUMNS
        )
    return exponent(weighted)


@triton.jit
def kept_in(
    seed, pair, receiver, sender, least_kept, kept_bits, TYPE: tl.constexpr,
    RECEIVERS: tl.constexpr, SENDERS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Factors of a tile's weights under dropout: see ``reference.kept_weights``."""
    row = tl.expand_dims(receiver + tl.arange(0, RECEIVERS), 1 - COLUMNS)
    column = tl.expand_dims(sender + tl.arange(0, SENDERS), COLUMNS)
    row, column = tl.broadcast(row.to(tl.int32), column.to(tl.int32))
    zero = row * 0
    word, _, _, _ = tl.philox(tl.load(seed), column, row, zero + pair.to(tl.int32), zero)
    kept = word.to(tl.uint32, bitcast=True).to(tl.int64) >= least_kept
    return tl.where(kept, number_of(kept_bits, TYPE), 0.0)


@triton.jit
def attention_of(exponents, heard, maximum, inverse):
    """The forward's attention of a tile, from :func:`logit` and its receivers' maximum and inverse."""
    return tl.where(heard, tl.exp2(exponents - maximum) * inverse, 0.0)
