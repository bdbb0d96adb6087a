"""Shared parts of all kernels: the order of a graph's nodes and which of them each one hears, loads, stores."""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels import INTERPRETED

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
ON_A_CPU: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def number_of(bits, TYPE: tl.constexpr):
    """A number from the bits of a float64: a Python float would reach a kernel as a float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(TYPE)


@triton.jit
def exponent(x):
    """Weighted scores, for base 2.

    Forward and backward both compute them here, and compilers may not fuse the last product with a subtraction (see
    ``launch.COMPILER``): if a softmax is saturated, a single rounding can be as large as the result.
    """
    return x * LOG2E


@triton.jit
def write_order(
    word_mask,  # [M] of this (b, k)
    emotion_mask,  # [P] of this b, or None
    word_weight,  # [M] of this b
    emotion_weight,  # [P] of this b
    order,  # [N] int32, written: node ids
    weight,  # [N], written: E0 of the edges that the node sends to words
    words,
    emotions,
    CHUNK: tl.constexpr,
):
    """List the nodes that take part: [CLS], then the emotions, then the words in their order.

    In this order every receiver hears a prefix of the list (see ``last_heard``), so whole tiles can be skipped.
    Every program of one (b, k) writes the same values to the same places, and reads them only after its own writes.

    Returns:
        (emotions that take part, nodes that take part).
    """
    tl.store(order, 0)
    tl.store(weight, 1.0)
    count = 1
    for start in range(0, emotions, CHUNK):
        j = start + tl.arange(0, CHUNK)
        takes_part = j < emotions
        if emotion_mask is not None:
            takes_part = takes_part & (tl.load(emotion_mask + j, mask=takes_part, other=0) != 0)
        place = count - 1 + tl.cumsum(takes_part.to(tl.int32), 0)
        tl.store(order + place, words + j, mask=takes_part)
        tl.store(weight + place, tl.load(emotion_weight + j, mask=takes_part, other=0.0), mask=takes_part)
        count += tl.sum(takes_part.to(tl.int32), 0)
    emotion_count = count - 1
    for start in range(0, words, CHUNK):
        j = start + tl.arange(0, CHUNK)
        takes_part = (j > 0) & (j < words)
        takes_part = takes_part & (tl.load(word_mask + j, mask=takes_part, other=0) != 0)
        place = count - 1 + tl.cumsum(takes_part.to(tl.int32), 0)
        tl.store(order + place, j, mask=takes_part)
        tl.store(weight + place, tl.load(word_weight + j, mask=takes_part, other=0.0), mask=takes_part)
        count += tl.sum(takes_part.to(tl.int32), 0)
    tl.debug_barrier()  # what one thread wrote another one reads
    return emotion_count, count


@triton.jit
def last_heard(place, emotion_count, count):
    """The last place that the receiver at ``place`` hears; it hears all before it, but an emotion not itself.

    [CLS] hears all nodes, an emotion hears [CLS] and the emotions, a word hears those and the words up to itself.
    """
    return tl.where(place == 0, count - 1, tl.where(place <= emotion_count, emotion_count, place))


@triton.jit
def place_of_receiver(row, skipped, count):
    """The place of the receiver in this row, if ``skipped`` emotions are left out after [CLS].

    Rows past the last receiver repeat it: their loads are in bounds, and their results are not stored.
    """
    row = tl.minimum(row, count - skipped - 1)
    return tl.where(row > 0, row + skipped, 0)


@triton.jit
def unheard_self(place, emotion_count):
    """The place of the receiver itself if it is an emotion, which does not hear itself; else -1."""
    return tl.where((place > 0) & (place <= emotion_count), place, -1)


@triton.jit
def takes_no_part(node, word_mask, emotion_mask, words, nodes):
    """Mark the nodes that exist but take no part in the (b, k) of the masks."""
    is_word = (node > 0) & (node < words)
    out = is_word & (tl.load(word_mask + node, mask=is_word, other=1) == 0)
    if emotion_mask is not None:
        is_emotion = (node >= words) & (node < nodes)
        out = out | (is_emotion & (tl.load(emotion_mask + node - words, mask=is_emotion, other=1) == 0))
    return out


@triton.jit
def rounded(tile, PRECISION: tl.constexpr):
    """Return a dot's operand as the dot must read it: under tf32 rounded to 10 bits of mantissa, else unchanged.

    Tensor cores drop the 13 low bits of a float32. cuBLAS first rounds to nearest, with ties away from zero, and so
    does this. NaN stays NaN: adding half a unit to its bits could make it -0, and dropping its payload infinity.
    """
    if PRECISION == "tf32":
        bits = tile.to(tl.int32, bitcast=True)
        bits = tl.where(tile == tile, (bits + 0x1000) & -0x2000, 0x7FC00000)
        tile = bits.to(tl.float32, bitcast=True)
    return tile


@triton.jit
def wanted(members, WANTED: tl.constexpr):
    """The members of a tuple whose bits are set."""
    kept = ()
    for m in tl.static_range(len(members)):
        if (WANTED >> m) & 1:
            kept += (members[m],)
    return kept


@triton.jit
def rows_of(base, node, stride, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Addresses of the rows of these nodes, [nodes, TILE]; columns from WIDTH on are padding."""
    return base + node[:, None] * stride + tl.arange(0, TILE)[None, :]


@triton.jit
def load_rows(base, node, stride, WIDTH: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr):
    """Rows of nodes that exist, [nodes, TILE], padded with zeros on the right, :func:`rounded` for a dot."""
    inside = (tl.arange(0, TILE) < WIDTH)[None, :]
    return rounded(tl.load(rows_of(base, node, stride, WIDTH, TILE), mask=inside, other=0.0), PRECISION)


@triton.jit
def store_rows(base, node, stride, rows, stored, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Store those rows for which ``stored`` holds, in the type of ``base``."""
    inside = (tl.arange(0, TILE) < WIDTH)[None, :] & stored[:, None]
    tl.store(rows_of(base, node, stride, WIDTH, TILE), rows.to(base.dtype.element_ty), mask=inside)


# Rows in pieces of PIECE columns, as tuples of tiles: a dot of wide tiles needs more registers than there are.


@triton.jit
def load_pieces(base, node, stride, WIDTH: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr):
    """Rows of nodes that exist, as a tuple of [nodes, PIECE], the last one padded with zeros, for a dot."""
    tiles = ()
    row = base + node[:, None] * stride
    for p in tl.static_range((WIDTH + PIECE - 1) // PIECE):
        column = p * PIECE + tl.arange(0, PIECE)[None, :]
        tiles += (rounded(tl.load(row + column, mask=column < WIDTH, other=0.0), PRECISION),)
    return tiles


@triton.jit
def store_pieces(base, node, stride, tiles, stored, WIDTH: tl.constexpr, PIECE: tl.constexpr):
    """Store those rows for which ``stored`` holds, in the type of ``base``."""
    row = base + node[:, None] * stride
    for p in tl.static_range((WIDTH + PIECE - 1) // PIECE):
        column = p * PIECE + tl.arange(0, PIECE)[None, :]
        tl.store(row + column, tiles[p].to(base.dtype.element_ty), mask=(column < WIDTH) & stored[:, None])


@triton.jit
def zero_pieces(ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr, TYPE: tl.constexpr):
    """A tuple of tiles of zeros for rows of that width."""
    tiles = ()
    for _ in tl.static_range((WIDTH + PIECE - 1) // PIECE):
        tiles += (tl.zeros([ROWS, PIECE], TYPE),)
    return tiles


@triton.jit
def row_products(a, b, total, PRECISION: tl.constexpr):
    """total + a b^T, every row of a with every row of b; total None is 0.

    Forward and backward must agree on every bit of a score. A GPU sums along the rows, whatever the tiles. The
    interpreter's dot is NumPy's BLAS, whose sums depend on the tile's sizes, on the place in it and on which operand is
    transposed: there the products of ieee and float64 are summed separately.
    """
    if (ON_A_CPU and PRECISION == "ieee") and a.dtype.primitive_bitwidth >= 32:  # Triton 3.3 chains two
        products = tl.sum(a[:, None, :] * b[None, :, :], 2)
        if total is not None:
            products += total
    elif total is None:
        products = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        products = tl.dot(a, tl.trans(b), total, input_precision=PRECISION, out_dtype=total.dtype)
    return products


@triton.jit
def inner_product(a, b, PRECISION: tl.constexpr):
    """a b^T of rows in pieces, both rounded where they were loaded.

    Computed as (b a^T)^T: Triton does not see a transposed dot as chained to the dots that follow, and then spreads the
    warps over both sides of the tile. Along one side only, every warp would hold all of a in registers.
    """
    total = row_products(b[0], a[0], None, PRECISION)
    for p in tl.static_range(1, len(a)):
        total = row_products(b[p], a[p], total, PRECISION)
    return tl.trans(total)


@triton.jit
def inner_sums(a, b, COLUMNS: tl.constexpr):
    """Every row of a times its row of b, in pieces, in float32: [rows, 1], or with COLUMNS [1, rows]."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for p in tl.static_range(1, len(a)):
        total += tl.sum(a[p].to(tl.float32) * b[p].to(tl.float32), 1)
    return tl.expand_dims(total, 1 - COLUMNS)


@triton.jit
def add_product(total, tile, rows, PRECISION: tl.constexpr):
    """total + tile rows, of rows in pieces; the tile is rounded here, the rows where they were loaded."""
    sums = ()
    for p in tl.static_range(len(rows)):
        left = rounded(tile.to(rows[p].dtype), PRECISION)
        sums += (tl.dot(left, rows[p], total[p], input_precision=PRECISION, out_dtype=total[p].dtype),)
    return sums


@triton.jit
def scaled(tiles, factor):
    """Every piece times a factor."""
    products = ()
    for p in tl.static_range(len(tiles)):
        products += (tiles[p] * factor,)
    return products
