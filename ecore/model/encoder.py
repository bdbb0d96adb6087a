"""Context encoding: embeddings (Eq. 1) and the transformer encoder (Eq. 2)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecore.config import ModelConfig
from ecore.data.batches import MAX_RESPONSE_WORDS, NO_STATE, RELATED_STATE
from ecore.data.vocabulary import PAD
from ecore.model.dropout import Dropout
from ecore.model.packing import Packing, Padded
from ecore.model.transformer import (
    FeedForward,
    MultiHeadAttention,
    Projection,
    SublayerEnds,
    added_mask,
    sinusoidal_positions,
    stacked,
)
from ecore.precision import for_products

_POSITIONS = MAX_RESPONSE_WORDS + 1  # contexts are shorter
_UNKNOWN_VECTOR_STD = (
    0.1  # times sqrt(D) as large as the sinusoids; much smaller and positions drown the words
)


class Embedding(nn.Module):
    """Word (scaled by sqrt(D)) + sinusoidal position + dialogue state (Eq. 1); their dropout is the reader's."""

    position: Tensor

    def __init__(self, config: ModelConfig, words: int, vectors: np.ndarray | None) -> None:
        """``vectors`` [V, G <= D]: pre-trained vectors, NaN where a word has none."""
        super().__init__()
        self.word = nn.Embedding(words, config.dim, padding_idx=PAD)
        nn.init.normal_(self.word.weight, std=_UNKNOWN_VECTOR_STD)
        if vectors is not None:
            known = torch.from_numpy(np.array(vectors, dtype=np.float32))
            with torch.no_grad():
                part = self.word.weight[:, : known.shape[1]]
                part.copy_(torch.where(known.isnan(), part, known))
        with torch.no_grad():
            self.word.weight[PAD].zero_()
        # Unit variance, like the sines and cosines that it is added to.
        self.state = nn.Embedding(RELATED_STATE + 1, config.dim, padding_idx=NO_STATE)
        self.register_buffer("position", sinusoidal_positions(_POSITIONS, config.dim), persistent=False)
        self.scale = config.dim**0.5

    def look_up(self, *words: Tensor) -> list[Tensor]:
        """Scaled word vectors alone: ids, each of any shape [...] -> for each [..., D].

        One look-up for all of them, because the gradient of each is as large as the whole vocabulary's table.
        """
        vectors = self.word(torch.cat([ids.flatten() for ids in words])) * self.scale
        parts = vectors.split([ids.numel() for ids in words])
        return [part.view(*ids.shape, part.shape[-1]) for part, ids in zip(parts, words, strict=True)]

    def place(
        self, vectors: Tensor, state: Tensor | None = None, start: int = 0, columns: Tensor | None = None
    ) -> Tensor:
        """Add positions and dialogue states.

        Args:
            vectors: [B, T, D], or rows [R, D].
            state: [B, T], dialogue states.
            start: the first word's position.
            columns: [R], the position of each row.

        Returns:
            Like ``vectors``.
        """
        if columns is None:
            embedded = vectors + self.position[start : start + vectors.shape[1]]
        else:
            embedded = vectors + self.position.index_select(0, columns)
        if state is not None:
            embedded = embedded + self.state(state)
        return embedded

    def forward(self, words: Tensor, state: Tensor | None = None, start: int = 0) -> Tensor:
        """ids and states [B, T] -> [B, T, D]; ``start`` is the first word's position."""
        return self.place(self.look_up(words)[0], state, start)

    def with_related(self, vectors: Tensor, state: Tensor) -> Tensor:
        """Add to contexts' words and the related words behind them; those are a set, so without positions.

        Args:
            vectors: [B, M + C, D].
            state: [B, M], of the contexts' words.
        """
        words, related = state.shape[1], vectors.shape[1] - state.shape[1]
        position = F.pad(self.position[:words], (0, 0, 0, related))  # [M + C, D]
        states = F.pad(state, (0, related), value=RELATED_STATE)  # [B, M + C]
        return vectors + position + self.state(states)


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.attention_dim or config.dim
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = MultiHeadAttention(config.dim, config.heads, width)
        self.feed_forward_norm = nn.LayerNorm(config.dim)
        self.feed_forward = FeedForward(config.dim, config.feed_forward or 4 * config.dim)

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        projection: Projection,
        layout: Packing | Padded,
        mask: Tensor | None,
        end: SublayerEnds,
        following: nn.LayerNorm,
    ) -> tuple[Tensor, Tensor]:
        """Return the block's output [R, D] under the norm that follows, and itself; x comes likewise."""
        attended = self.attention.of_itself(for_products(normed), projection, layout, mask)
        normed, x = end(attended, x, self.feed_forward_norm)
        return end(self.feed_forward(normed), x, following)


class Encoder(nn.Module):
    """Pre-norm transformer blocks and a final LayerNorm (Eq. 2)."""

    blocks: list[EncoderBlock]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_blocks))
        self.blocks = blocks  # type: ignore[assignment]  # indexed and iterated like one
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x: Tensor, mask: Tensor, layout: Packing | Padded | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode embedded words.

        Args:
            x: [B, S, D].
            mask: [B, S] bool, True where there is a word.
            layout: of the rows to compute; None for all.

        Returns:
            h_X, and x after its dropout; [B, S, D] each.
        """
        layout = layout or Padded(*mask.shape)
        added = added_mask(mask, x) if layout.sequences is None else None
        first, *others = [*(block.attention_norm for block in self.blocks), self.norm]
        rows = layout.pack(x)  # [R, D]
        end = SublayerEnds(1 + 2 * len(self.blocks), self.dropout, rows)
        normed, embedded = end.begin(rows, first)
        projections = stacked([block.attention.own_layers for block in self.blocks])
        rows = embedded
        for block, projection, following in zip(self.blocks, projections, others, strict=True):
            normed, rows = block(rows, normed, projection, layout, added, end, following)
        return layout.unpack(normed), layout.unpack(embedded)
