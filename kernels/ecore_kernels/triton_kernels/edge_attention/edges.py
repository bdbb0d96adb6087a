"""Edges that lie in memory, tile by tile: for the forward and the backward kernels of edge_attention."""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.tiles import exponent

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
def inside_graph(
    receiver, sender, nodes, RECEIVERS: tl.constexpr, SENDERS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The part of the tile from (receiver, sender) on that lies in the [N, N]; see ``addresses`` for its shape."""
    receivers = tl.expand_dims(receiver + tl.arange(0, RECEIVERS), 1 - COLUMNS)
    senders = tl.expand_dims(sender + tl.arange(0, SENDERS), COLUMNS)
    return (receivers < nodes) & (senders < nodes)


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
    """The pairs of the tile that hear each other; without a mask every receiver hears every sender."""
    if neighbors is not None:
        address = addresses(neighbors, row_stride, receiver, sender, RECEIVERS, SENDERS, COLUMNS)
        inside = inside & (tl.load(address, mask=inside, other=0) != 0)
    return inside


@triton.jit
def finite(rows, TYPE: tl.constexpr):
    """Rows for a product with weights of which some are 0, which would make NaN of NaN and of infinity.

    Returns:
        the rows, those that are not finite as zeros; by row 0, or NaN for those, to be added to where they are heard.
    """
    lost = tl.sum(rows.to(TYPE) * 0.0, 1)
    return tl.where((lost == 0.0)[:, None], rows, 0.0), lost[None, :]


@triton.jit
def attention_of(score, weight, heard, maximum, inverse):
    """Attention of a tile as the forward had it, of the scores, E, and its receivers' maximum and inverse."""
    return tl.where(heard, tl.exp2(exponent(score * weight) - maximum) * inverse, 0.0)
