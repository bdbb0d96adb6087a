"""The forward kernel of the readout of the edges' emotion columns."""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.edge_readout.edges import (
    VARYING,
    edge_values,
    factors,
    heard_by,
    load_all,
    rows_of_block,
    takes_part,
)
from ecore_kernels.triton_kernels.tiles import number_of


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
    """One program: BLOCK receivers and COLUMNS senders of one dialogue, over all resolutions.

    Shape tags: I = BLOCK receivers, J = COLUMNS senders.
    """
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
    emotional, row, node, exists = rows_of_block(block, words, emotions, BLOCK)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)  # [J]
    i, j = row[:, None], column[None, :]
    sends = takes_part(words + column, column < emotions, word_mask, emotion_mask, words)

    number: tl.constexpr = to_emotion.dtype.element_ty
    scale = number_of(scale_bits, number)
    total = tl.zeros([BLOCK, COLUMNS], number)  # [I, J]
    for head in range(0, resolutions):
        receives = takes_part(node, exists, word_mask + head * words, emotion_mask, words)
        factor = receives.to(number)
        if row_factor is not None:
            factor = tl.load(row_factor + head * nodes + node, mask=receives, other=0.0)
        offset = (batch * history_batch + head * history_head) * VECTOR
        # A layer of q: [I, d], of k: [J, d].
        q = load_all(history_query, offset, node, history_row * VECTOR, receives, DIM, TILE_DIM, PRECISION)
        k = load_all(
            history_key, offset, words + column, history_row * VECTOR, sends, DIM, TILE_DIM, PRECISION
        )
        u = factors(q, k, scale, PRECISION)  # a layer [I, J]
        heard = heard_by((node - words)[:, None], j, receives[:, None], sends[None, :])
        edge = factor[:, None] + tl.zeros([1, COLUMNS], number)
        for m in tl.static_range(len(u)):
            edge *= u[m]
        total += tl.where(heard, edge, 0.0)  # it may be NaN off the graph

    stored = exists[:, None] & (j < emotions)
    correlation += batch * correlation_batch
    initial = edge_values(
        emotion_weight + batch * emotions, 0, correlation, i, j, emotional, stored, emotions
    )
    # The weight of an emotion that no receiver hears may be NaN, so it is selected: 0 times NaN would be NaN.
    total = tl.where(total == 0.0, 0.0, total * initial)
    if emotional:
        tl.store(to_emotion + (batch * emotions + i) * emotions + j, total, mask=stored)
    elif PER_WORD:
        tl.store(to_word + (batch * words + i) * emotions + j, total, mask=stored)
    else:
        to_word += (batch * word_blocks + block) * emotions
        tl.store(to_word + column, tl.sum(total, 0), mask=column < emotions)
