"""The modified transformer decoder (Appendix C) and its key/value cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ecore.config import ModelConfig
from ecore.model.dropout import Dropout
from ecore.model.transformer import FeedForward, MultiHeadAttention


class DecoderCache:
    """What the decoder keeps of B responses in the making.

    Attributes:
        length: words decoded so far.
        self_keys, self_values: per block [B, heads, max_length, d]; the first ``length`` positions are filled.
        cross_keys, cross_values: per block [B, heads, S, d], of the encoded context.
        guidance: per block [B, 1, D], W_d's share of the node sum; None without one.
        mask: [B, 1, 1, S] bool, where the context has words.
    """

    def __init__(
        self,
        cross: list[tuple[Tensor, Tensor]],
        guidance: list[Tensor] | None,
        mask: Tensor,
        max_length: int,
    ) -> None:
        self.length = 0
        self.cross_keys = [keys for keys, _ in cross]
        self.cross_values = [values for _, values in cross]
        batch, heads, _, width = self.cross_keys[0].shape
        self.self_keys = [keys.new_empty(batch, heads, max_length, width) for keys in self.cross_keys]
        self.self_values = [torch.empty_like(keys) for keys in self.self_keys]
        self.guidance = guidance
        self.mask = mask

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or duplicate rows: int64 [B'] indices into the present ones."""
        for tensors in (
            self.self_keys,
            self.self_values,
            self.cross_keys,
            self.cross_values,
            self.guidance or [],
        ):
            for i, tensor in enumerate(tensors):
                tensors[i] = tensor.index_select(0, rows)
        self.mask = self.mask.index_select(0, rows)


class DecoderBlock(nn.Module):
    """Pre-norm causal self-attention, cross-attention joined with the node sum (Eqs. 23 to 25), feed-forward."""

    def __init__(self, config: ModelConfig, guided: bool) -> None:
        super().__init__()
        width = config.attention_dim or config.dim
        self.self_norm = nn.LayerNorm(config.dim)
        self.self_attention = MultiHeadAttention(config.dim, config.heads, width)
        self.cross_norm = nn.LayerNorm(config.dim)
        self.cross_attention = MultiHeadAttention(config.dim, config.heads, width)
        # W_d of Eq. 25 in two halves, so that the node sum's half is computed once and not once a word.
        self.join_context = nn.Linear(config.dim, config.dim)
        self.join_guidance = nn.Linear(config.dim, config.dim, bias=False) if guided else None
        self.feed_forward_norm = nn.LayerNorm(config.dim)
        self.feed_forward = FeedForward(config.dim, config.feed_forward or 4 * config.dim)
        self.dropout = Dropout(config.dropout)

    def rest(
        self,
        y: Tensor,
        cross_keys: Tensor,
        cross_values: Tensor,
        mask: Tensor,
        guidance: Tensor | None,
    ) -> Tensor:
        """All after self-attention."""
        attended = self.cross_attention(self.cross_norm(y), cross_keys, cross_values, mask)
        joined = self.join_context(attended)
        y = y + self.dropout(joined if guidance is None else joined + guidance)
        return y + self.dropout(self.feed_forward(self.feed_forward_norm(y)))


class Decoder(nn.Module):
    """Decoder blocks and a final LayerNorm."""

    def __init__(self, config: ModelConfig, guided: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DecoderBlock(config, guided) for _ in range(config.decoder_blocks))
        # Eq. 24 is a sum over words: without a norm it grows with the context's length.
        self.guidance_norm = nn.LayerNorm(config.dim) if guided else None
        self.norm = nn.LayerNorm(config.dim)

    def _guidance(self, guidance: Tensor | None) -> list[Tensor] | None:
        if guidance is None:
            return None
        normed = self.guidance_norm(guidance)[:, None]
        return [block.join_guidance(normed) for block in self.blocks]

    def forward(self, y: Tensor, memory: Tensor, mask: Tensor, guidance: Tensor | None) -> Tensor:
        """Decode whole responses at once.

        Args:
            y: [B, T, D], embedded responses, shifted right.
            memory: [B, S, D], h_X.
            mask: [B, S] bool.
            guidance: [B, D], the node sum of Eq. 24, or None.

        Returns:
            [B, T, D], s_t of Eq. 15.
        """
        joins = self._guidance(guidance)
        mask = mask[:, None, None, :]
        for i, block in enumerate(self.blocks):
            normed = block.self_norm(y)
            keys_values = block.self_attention.keys_values(normed)
            y = y + block.dropout(block.self_attention(normed, *keys_values, causal=True))
            cross = block.cross_attention.keys_values(memory)
            y = block.rest(y, *cross, mask, None if joins is None else joins[i])
        return self.norm(y)

    def start(self, memory: Tensor, mask: Tensor, guidance: Tensor | None, max_length: int) -> DecoderCache:
        """The cache of responses of at most ``max_length`` words, none decoded yet."""
        cross = [block.cross_attention.keys_values(memory) for block in self.blocks]
        return DecoderCache(cross, self._guidance(guidance), mask[:, None, None, :], max_length)

    def step(self, y: Tensor, cache: DecoderCache) -> Tensor:
        """Decode one more word: y [B, D] embedded -> s_t [B, D]; the cache grows by it."""
        y = y[:, None]
        position = cache.length
        for i, block in enumerate(self.blocks):
            normed = block.self_norm(y)
            keys, values = block.self_attention.keys_values(normed)
            cache.self_keys[i][:, :, position] = keys[:, :, 0]
            cache.self_values[i][:, :, position] = values[:, :, 0]
            seen = slice(0, position + 1)
            y = y + block.dropout(
                block.self_attention(normed, cache.self_keys[i][:, :, seen], cache.self_values[i][:, :, seen])
            )
            join = None if cache.guidance is None else cache.guidance[i]
            y = block.rest(y, cache.cross_keys[i], cache.cross_values[i], cache.mask, join)
        cache.length += 1
        return self.norm(y[:, 0])
