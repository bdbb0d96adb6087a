"""What the model reads out of the last edges, their emotion columns (Eq. 8), forward and backward.

An edge is recomputed, tile by tile, from what determines it: E_ij = E0_ij * r_i * prod_m u^m_ij, where u^m_ij = 1 +
scale * q^m_i . k^m_j comes from an earlier layer m (Eqs. 5 and 7 unrolled). The readout is linear in it: with D the
gradient of whatever the edge is added to, the same at every resolution, dE0 = D r prod_m u^m, dr_i = sum_j D E0 prod_m
u^m, and du^m = D E0 r prod_{l != m} u^l.

Receivers are rows and senders columns. Rows stand in their natural order, words and emotions in blocks of their own;
those that do not take part in a resolution are not loaded for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecore_kernels.layout import dense_rows, laid_out_like, sum_resolutions
from ecore_kernels.triton_kernels import launch
from ecore_kernels.triton_kernels.tiles import number_of, rounded, rows_of, store_rows, wanted

# Sizes and strides differ from batch to batch: compiling anew where one happens to be a multiple of 16 would cost more
# than it gains. VECTOR tells the compiler what it needs.
VARYING = [
    "resolutions", "words", "emotions", "correlation_batch", "pairs", "scale_bits",
    *(f"{of}_{name}" for of in ("history", "gradient") for name in ("batch", "head", "row")),
]  # fmt: skip


@triton.jit
def _rows_of_block(block, words, emotions, BLOCK: tl.constexpr):
    """The receivers of a block: blocks of words come first, then blocks of emotions.

    Returns:
        whether they are emotions; each one's index among its kind, its node, whether it exists.
    """
    word_blocks = tl.cdiv(words, BLOCK)
    emotional = block >= word_blocks
    row = tl.where(emotional, block - word_blocks, block) * BLOCK + tl.arange(0, BLOCK)
    return emotional, row, row + tl.where(emotional, words, 0), row < tl.where(emotional, emotions, words)


@triton.jit
def _takes_part(node, exists, word_mask, emotion_mask, words):
    """Which of the nodes that exist take part in the (b, k) that the masks belong to."""
    screened = exists & (node > 0) & (node < words)
    part = exists & (tl.load(word_mask + node, mask=screened, other=1) != 0)
    if emotion_mask is not None:
        part = part & (tl.load(emotion_mask + node - words, mask=exists & (node >= words), other=1) != 0)
    # Triton lays a dot's operands out for the narrowest load that it can trace them to. Bytes would cost it ldmatrix,
    # and in float64 it has no product for that layout; it does not look behind a reduction.
    return tl.max(part.to(tl.int32)[:, None], 1) != 0


@triton.jit
def _heard(receiver, sender, receives, sends):
    """Which edges there are in a tile: an emotion does not hear itself. Nodes count from the first emotion."""
    return receives & sends & (receiver != sender)


@triton.jit
def _edge_values(to_words, word_row, to_emotions, row, column, emotional, wanted, emotions):
    """What belongs to the edges of a tile; 0 where it is not wanted.

    Args:
        to_words: [P] or, with a stride ``word_row`` over words that is not 0, [M, P].
        to_emotions: [P, P].
    """
    values = tl.where(emotional, to_emotions, to_words)
    return tl.load(values + row * tl.where(emotional, emotions, word_row) + column, mask=wanted, other=0.0)


@triton.jit
def _load_all(
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
def _store_all(bases, offset, node, stride, tiles, scale, stored, WIDTH: tl.constexpr, TILE: tl.constexpr):
    for m in tl.static_range(len(bases)):
        store_rows(bases[m] + offset, node, stride, tiles[m] * scale, stored, WIDTH, TILE)


@triton.jit
def _factors(staying, streaming, scale, PRECISION: tl.constexpr):
    """u of every layer, a tile [staying, streaming]."""
    u = ()
    for m in tl.static_range(len(staying)):
        u += (1.0 + scale * tl.dot(staying[m], tl.trans(streaming[m]), input_precision=PRECISION),)
    return u


@triton.jit(do_not_specialize=VARYING)
def _forward(
    history_query, history_key,  # tuples of [B, K, N, d]
    word_mask, emotion_mask,  # [B, K, M], [B, P] or None
    emotion_weight, correlation,  # [B, P], [P, P] or [B, P, P]
    row_factor,  # [B, K, N] or None
    to_word, to_emotion,  # written: [B, M, P], or [B, blocks of words, P] without PER_WORD; [B, P, P]
    resolutions, words, emotions, correlation_batch,
    history_batch, history_head, history_row,
    scale_bits: tl.int64, DIM: tl.constexpr, TILE_DIM: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
    PER_WORD: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK receivers and COLUMNS senders of one dialogue, over all resolutions."""
    nodes = words + emotions
    word_blocks = tl.cdiv(words, BLOCK)
    blocks = word_blocks + tl.cdiv(emotions, BLOCK)
    column_blocks = tl.cdiv(emotions, COLUMNS)
    column_block = tl.program_id(0) % column_blocks
    block = tl.program_id(0) // column_blocks % blocks
    batch = (tl.program_id(0) // column_blocks // blocks).to(tl.int64)

    word_mask += batch * resolutions * words
    if emotion_mask is not None:
        emotion_mask += batch * emotions
    if row_factor is not None:
        row_factor += batch * resolutions * nodes
    emotional, row, node, exists = _rows_of_block(block, words, emotions, BLOCK)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    i, j = row[:, None], column[None, :]
    sends = _takes_part(words + column, column < emotions, word_mask, emotion_mask, words)

    number: tl.constexpr = to_emotion.dtype.element_ty
    scale = number_of(scale_bits, number)
    total = tl.zeros([BLOCK, COLUMNS], number)
    for head in range(0, resolutions):
        receives = _takes_part(node, exists, word_mask + head * words, emotion_mask, words)
        factor = receives.to(number)
        if row_factor is not None:
            factor = tl.load(row_factor + head * nodes + node, mask=receives, other=0.0)
        offset = (batch * history_batch + head * history_head) * VECTOR
        q = _load_all(history_query, offset, node, history_row * VECTOR, receives, DIM, TILE_DIM, PRECISION)
        k = _load_all(
            history_key, offset, words + column, history_row * VECTOR, sends, DIM, TILE_DIM, PRECISION
        )
        u = _factors(q, k, scale, PRECISION)
        heard = _heard((node - words)[:, None], j, receives[:, None], sends[None, :])
        edge = factor[:, None] + tl.zeros([1, COLUMNS], number)
        for m in tl.static_range(len(u)):
            edge *= u[m]
        total += tl.where(heard, edge, 0.0)  # what is not heard may be NaN

    stored = exists[:, None] & (j < emotions)
    correlation += batch * correlation_batch
    initial = _edge_values(
        emotion_weight + batch * emotions, 0, correlation, i, j, emotional, stored, emotions
    )
    # Of an emotion that nobody hears the weight may be anything: select, where 0 times it would be NaN.
    total = tl.where(total == 0.0, 0.0, total * initial)
    if emotional:
        tl.store(to_emotion + (batch * emotions + i) * emotions + j, total, mask=stored)
    elif PER_WORD:
        tl.store(to_word + (batch * words + i) * emotions + j, total, mask=stored)
    else:
        to_word += (batch * word_blocks + block) * emotions
        tl.store(to_word + column, tl.sum(total, 0), mask=column < emotions)


@triton.jit
def _gradients(u, upstream, initial, factor, heard):
    """The gradients of every layer's u, of E0, and of r before its sum over senders, on a tile.

    They are 0 where nothing is heard.

    Args:
        upstream, initial: D and E0.
        factor: r of the receivers.
    """
    grad_initial = upstream * factor
    grad_factor = upstream * initial
    scaled = grad_factor * factor
    grad_u = ()
    for m in tl.static_range(len(u)):
        others = scaled  # the product over the other factors: u may be 0, so never divide
        for n in tl.static_range(len(u)):
            if n != m:
                others *= u[n]
        grad_u += (tl.where(heard, others, 0.0),)  # what is not heard may be NaN
        grad_initial *= u[m]
        grad_factor *= u[m]
    return grad_u, tl.where(heard, grad_initial, 0.0), tl.where(heard, grad_factor, 0.0)


@triton.jit
def _accumulate(totals, tiles, others, PRECISION: tl.constexpr):
    """Every total plus its tile's product with the streaming rows."""
    sums = ()
    for m in tl.static_range(len(totals)):
        sums += (
            totals[m]
            + tl.dot(rounded(tiles[m].to(others[m].dtype), PRECISION), others[m], input_precision=PRECISION),
        )
    return sums


@triton.jit
def _zeros(LIKE, ROWS: tl.constexpr, TILE: tl.constexpr, TYPE: tl.constexpr):
    """A tile of zeros for every member of a tuple."""
    tiles = ()
    for _ in tl.static_range(len(LIKE)):
        tiles += (tl.zeros([ROWS, TILE], TYPE),)
    return tiles


@triton.jit(do_not_specialize=VARYING)
def _backward(
    history_query, history_key, word_mask, emotion_mask, emotion_weight, correlation, row_factor,
    grad_to_word, grad_to_emotion,  # [B, P], or [B, M, P] with PER_WORD; [B, P, P]
    grad_history_query, grad_history_key,  # of the layers that are wanted
    grad_row_factor, grad_emotion_weight, grad_correlation,  # [B, K, N], [B, K, P], [B, K, P, P]; None where not wanted
    resolutions, words, emotions, correlation_batch, pairs,
    history_batch, history_head, history_row, gradient_batch, gradient_head, gradient_row,
    scale_bits: tl.int64, DIM: tl.constexpr, TILE_DIM: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
    PER_WORD: tl.constexpr, RECEIVERS: tl.constexpr, SENDERS: tl.constexpr,  # whether anything is wanted of the two
    HISTORY_QUERY: tl.constexpr, HISTORY_KEY: tl.constexpr,  # layers whose gradients are wanted, a bit each
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: in one (b, k), gradients of COLUMNS emotions as senders or, later programs, of BLOCK receivers."""
    nodes = words + emotions
    blocks = tl.cdiv(words, BLOCK) + tl.cdiv(emotions, BLOCK)
    column_blocks = tl.cdiv(emotions, COLUMNS)
    # The senders' programs come first: theirs are the longer loops.
    sending = pairs * column_blocks * SENDERS
    by_column = tl.program_id(0) < sending
    within = tl.where(by_column, tl.program_id(0), tl.program_id(0) - sending)
    parts = tl.where(by_column, column_blocks, blocks)
    pair = (within // parts).to(tl.int64)
    part = within % parts
    batch, head = pair // resolutions, pair % resolutions

    history_offset = (batch * history_batch + head * history_head) * VECTOR
    gradient_offset = (batch * gradient_batch + head * gradient_head) * VECTOR
    history_row *= VECTOR
    gradient_row *= VECTOR
    word_mask += pair * words
    if emotion_mask is not None:
        emotion_mask += batch * emotions
    if row_factor is not None:
        row_factor += pair * nodes
    emotion_weight += batch * emotions
    correlation += batch * correlation_batch
    grad_to_emotion += batch * emotions * emotions
    if PER_WORD:
        grad_to_word += batch * words * emotions
        word_row = emotions
    else:
        grad_to_word += batch * emotions
        word_row = 0
    number: tl.constexpr = grad_to_emotion.dtype.element_ty
    scale = number_of(scale_bits, number)

    if SENDERS:  # noqa: SIM102, settled when compiling
        if by_column:
            column = part * COLUMNS + tl.arange(0, COLUMNS)
            sends = _takes_part(words + column, column < emotions, word_mask, emotion_mask, words)
            k = _load_all(
                history_key, history_offset, words + column, history_row, sends, DIM, TILE_DIM, PRECISION
            )
            grad_k = _zeros(grad_history_key, COLUMNS, TILE_DIM, number)
            grad_weight = tl.zeros([COLUMNS], number)
            for block in range(0, blocks):
                emotional, row, node, exists = _rows_of_block(block, words, emotions, BLOCK)
                receives = _takes_part(node, exists, word_mask, emotion_mask, words)
                q = _load_all(
                    history_query, history_offset, node, history_row, receives, DIM, TILE_DIM, PRECISION
                )
                factor = receives.to(number)
                if row_factor is not None:
                    factor = tl.load(row_factor + node, mask=receives, other=0.0)
                i, j = row[None, :], column[:, None]
                heard = _heard((node - words)[None, :], j, receives[None, :], sends[:, None])
                initial = _edge_values(emotion_weight, 0, correlation, i, j, emotional, heard, emotions)
                upstream = _edge_values(
                    grad_to_word, word_row, grad_to_emotion, i, j, emotional, heard, emotions
                )
                u = _factors(k, q, scale, PRECISION)
                grad_u, grad_initial, _grad_r = _gradients(u, upstream, initial, factor[None, :], heard)
                if len(grad_k) > 0:
                    grad_k = _accumulate(
                        grad_k, wanted(grad_u, HISTORY_KEY), wanted(q, HISTORY_KEY), PRECISION
                    )
                if grad_emotion_weight is not None:
                    grad_weight += tl.where(emotional, 0.0, tl.sum(grad_initial, 1))
            _store_all(
                grad_history_key, gradient_offset, words + column, gradient_row, grad_k, scale, column < emotions,
                DIM, TILE_DIM,
            )  # fmt: skip
            if grad_emotion_weight is not None:
                tl.store(grad_emotion_weight + pair * emotions + column, grad_weight, mask=column < emotions)
            return

    if RECEIVERS:
        emotional, row, node, exists = _rows_of_block(part, words, emotions, BLOCK)
        receives = _takes_part(node, exists, word_mask, emotion_mask, words)
        q = _load_all(history_query, history_offset, node, history_row, receives, DIM, TILE_DIM, PRECISION)
        factor = receives.to(number)
        if row_factor is not None:
            factor = tl.load(row_factor + node, mask=receives, other=0.0)
        grad_q = _zeros(grad_history_query, BLOCK, TILE_DIM, number)
        grad_factor = tl.zeros([BLOCK], number)
        # Emotions' rows are gone through even if none takes part, for the zeros of grad_correlation.
        end = tl.where((tl.max(receives.to(tl.int32), 0) > 0) | emotional, emotions, 0)
        for start in range(0, end, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            sends = _takes_part(words + column, column < emotions, word_mask, emotion_mask, words)
            k = _load_all(
                history_key, history_offset, words + column, history_row, sends, DIM, TILE_DIM, PRECISION
            )
            i, j = row[:, None], column[None, :]
            heard = _heard((node - words)[:, None], j, receives[:, None], sends[None, :])
            initial = _edge_values(emotion_weight, 0, correlation, i, j, emotional, heard, emotions)
            upstream = _edge_values(grad_to_word, word_row, grad_to_emotion, i, j, emotional, heard, emotions)
            u = _factors(q, k, scale, PRECISION)
            grad_u, grad_initial, grad_r = _gradients(u, upstream, initial, factor[:, None], heard)
            if len(grad_q) > 0:  # Triton 3.3 fails on a loop that carries an empty tuple and nothing else
                grad_q = _accumulate(
                    grad_q, wanted(grad_u, HISTORY_QUERY), wanted(k, HISTORY_QUERY), PRECISION
                )
            if grad_row_factor is not None:
                grad_factor += tl.sum(grad_r, 1)
            if grad_correlation is not None:
                entry = grad_correlation + (pair * emotions + i) * emotions + j
                tl.store(entry, grad_initial, mask=(exists & (node >= words))[:, None] & (j < emotions))
        _store_all(
            grad_history_query, gradient_offset, node, gradient_row, grad_q, scale, exists, DIM, TILE_DIM
        )
        if grad_row_factor is not None:
            tl.store(grad_row_factor + pair * nodes + node, grad_factor, mask=exists)
        # Nothing reads the words' keys.
        nothing = _zeros(grad_history_key, BLOCK, TILE_DIM, number)
        of_word = exists & (node < words)
        _store_all(
            grad_history_key, gradient_offset, node, gradient_row, nothing, 1.0, of_word, DIM, TILE_DIM
        )


def _setting(
    history: Sequence[Tensor], emotion_weight: Tensor, precision: str, direction: str
) -> tuple[dict[str, object], dict[str, int]]:
    """What depends on types and sizes of the model alone: kernel constants and the compiler's options."""
    dim = history[0].shape[3] if history else 1
    arithmetic = launch.arithmetic_of(history[0].dtype if history else emotion_weight.dtype, precision)
    constants, options = launch.configuration(
        f"edge_readout_{direction}", arithmetic, launch.padded(dim), len(history),
        launch.architecture(emotion_weight.device),
    )  # fmt: skip
    columns = min(constants["COLUMNS"], launch.padded(emotion_weight.shape[1]))
    tile = {"DIM": dim, "TILE_DIM": launch.padded(dim), "PRECISION": launch.dot_precision(arithmetic)}
    return {**tile, **constants, "COLUMNS": columns}, options


def _inputs(
    word_mask: Tensor,
    emotion_weight: Tensor,
    correlation: Tensor,
    emotion_mask: Tensor | None,
    history_query: Sequence[Tensor],
    history_key: Sequence[Tensor],
    row_factor: Tensor | None,
) -> dict[str, Any]:
    """The arguments that both kernels share, laid out as they expect them."""
    _, resolutions, words = word_mask.shape
    emotions = emotion_weight.shape[1]
    if history_query:
        model = dense_rows(history_query[0])
        history_query = [laid_out_like(x, model) for x in history_query]
        history_key = [laid_out_like(x, model) for x in history_key]
    double = (*history_query, emotion_weight)[0].dtype is torch.float64
    number = torch.float64 if double else torch.float32
    return {
        "history_query": tuple(history_query),
        "history_key": tuple(history_key),
        "word_mask": word_mask.contiguous(),
        "emotion_mask": None if emotion_mask is None else emotion_mask.contiguous(),
        "emotion_weight": emotion_weight.to(number).contiguous(),
        "correlation": correlation.to(number).contiguous(),
        "row_factor": None if row_factor is None else row_factor.to(number).contiguous(),
        "resolutions": resolutions,
        "words": words,
        "emotions": emotions,
        "correlation_batch": 0 if correlation.dim() == 2 else emotions * emotions,
    }


def _strides(**tensors: Sequence[Tensor]) -> dict[str, int]:
    """Strides as kernel arguments; without history they do not matter."""
    if all(tensors.values()):
        return launch.strides(**{name: of[0] for name, of in tensors.items()})
    return {"VECTOR": 1} | {f"{name}_{of}": 0 for name in tensors for of in ("batch", "head", "row")}


def forward(
    word_mask: Tensor,
    emotion_weight: Tensor,
    correlation: Tensor,
    emotion_mask: Tensor | None,
    history_query: Sequence[Tensor],
    history_key: Sequence[Tensor],
    row_factor: Tensor | None,
    scale: float,
    per_word: bool,
    precision: str,
    results: Sequence[Tensor],
) -> None:
    """Launch the forward kernel, and add up what it leaves per block of words where there are several."""
    batch, _, words = word_mask.shape
    emotions = emotion_weight.shape[1]
    arguments = _inputs(
        word_mask, emotion_weight, correlation, emotion_mask, history_query, history_key, row_factor
    )
    history_query = arguments["history_query"]
    constants, options = _setting(history_query, emotion_weight, precision, "forward")
    to_word, to_emotion = results
    word_blocks = triton.cdiv(words, constants["BLOCK"])
    by_block = None if per_word or word_blocks == 1 else to_word.new_empty((batch, word_blocks, emotions))
    arguments.update(
        to_word=to_word if by_block is None else by_block,
        to_emotion=to_emotion,
        **_strides(history=history_query),
        scale_bits=launch.bits(scale),
        PER_WORD=per_word,
        **constants,
    )
    blocks = word_blocks + triton.cdiv(emotions, constants["BLOCK"])
    programs = batch * blocks * triton.cdiv(emotions, constants["COLUMNS"])
    launch.launch(_forward, (programs,), arguments, options, emotion_weight.device)
    if by_block is not None:
        torch.sum(by_block, 1, out=to_word)


def backward(
    grad_word_to_emotion: Tensor,
    grad_emotion_to_emotion: Tensor,
    word_mask: Tensor,
    emotion_weight: Tensor,
    correlation: Tensor,
    emotion_mask: Tensor | None,
    history_query: Sequence[Tensor],
    history_key: Sequence[Tensor],
    row_factor: Tensor | None,
    scale: float,
    per_word: bool,
    needs: list[bool],
    precision: str,
    results: Sequence[Tensor | None],
) -> None:
    """Launch the backward kernel, and add up what it leaves per resolution."""
    batch, resolutions, words = word_mask.shape
    emotions, depth = emotion_weight.shape[1], len(history_query)
    arguments = _inputs(
        word_mask, emotion_weight, correlation, emotion_mask, history_query, history_key, row_factor
    )
    history_query = arguments["history_query"]
    constants, options = _setting(history_query, emotion_weight, precision, "backward")
    *of_past, grad_row_factor, grad_emotion_weight, grad_correlation = results
    grad_query, grad_key = of_past[:depth], of_past[depth:]
    wanted_past = [tuple(x for x in past if x is not None) for past in (grad_query, grad_key)]
    of_receivers = any(x is not None for x in (*grad_query, grad_row_factor, grad_correlation))
    of_senders = any(x is not None for x in (*grad_key, grad_emotion_weight))
    if not of_receivers:  # whose programs write the zeros of the words' keys: nobody reads those
        for gradient in wanted_past[1]:
            gradient.zero_()

    def apart(gradient: Tensor | None, *shape: int) -> Tensor | None:
        return None if gradient is None else gradient.new_empty((batch, resolutions, *shape))

    by_weight, by_correlation = (
        apart(grad_emotion_weight, emotions),
        apart(grad_correlation, emotions, emotions),
    )
    number = arguments["emotion_weight"].dtype
    arguments.update(
        grad_to_word=grad_word_to_emotion.to(number).contiguous(),
        grad_to_emotion=grad_emotion_to_emotion.to(number).contiguous(),
        grad_history_query=wanted_past[0],
        grad_history_key=wanted_past[1],
        grad_row_factor=grad_row_factor,
        grad_emotion_weight=by_weight,
        grad_correlation=by_correlation,
        pairs=batch * resolutions,
        **_strides(history=history_query, gradient=[*wanted_past[0], *wanted_past[1], *history_query][:1]),
        scale_bits=launch.bits(scale),
        PER_WORD=per_word,
        RECEIVERS=of_receivers,
        SENDERS=of_senders,
        HISTORY_QUERY=launch.present(grad_query),
        HISTORY_KEY=launch.present(grad_key),
        **constants,
    )
    blocks = (
        triton.cdiv(words, constants["BLOCK"]) + triton.cdiv(emotions, constants["BLOCK"])
    ) * of_receivers
    programs = batch * resolutions * (triton.cdiv(emotions, constants["COLUMNS"]) * of_senders + blocks)
    if programs:
        launch.launch(_backward, (programs,), arguments, options, emotion_weight.device)
    sum_resolutions(by_weight, grad_emotion_weight)
    sum_resolutions(by_correlation, grad_correlation)
