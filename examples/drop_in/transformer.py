"""A small encoder and decoder for dialogue, in the shapes of MoEL and KEMP; it knows its layers by three imports."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A line each, so that each can be changed alone.
# isort: off
from examples.drop_in.layers import AddNorm
from examples.drop_in.layers import MultiHeadAttention
from examples.drop_in.layers import VocabularyLoss
# isort: on

PAD, START = 1, 3


def timing_signal(length: int, width: int) -> Tensor:
    """[length, width] sines and cosines."""
    rate = torch.exp(torch.arange(width // 2) * (-math.log(1e4) / max(1, width // 2 - 1)))
    angle = torch.arange(length)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], 1)


class FeedForward(nn.Module):
    """Two convolutions over words, or over words so far."""

    def __init__(self, width: int, filters: int, causal: bool) -> None:
        super().__init__()
        self.padding = (2, 0) if causal else (1, 1)
        self.first, self.second = nn.Conv1d(width, filters, 3), nn.Conv1d(filters, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(F.pad(x.transpose(1, 2), self.padding)).relu()
        return self.second(F.pad(x, self.padding)).transpose(1, 2)


class Block(nn.Module):
    """Attention to oneself, with ``crossing`` to a memory, and a feed-forward; each ends in the norm of the next."""

    def __init__(
        self, width: int, depth: int, heads: int, filters: int, dropout: float, crossing: bool
    ) -> None:
        super().__init__()
        count = 3 if crossing else 2
        self.attentions = nn.ModuleList(
            MultiHeadAttention(width, depth, heads, dropout) for _ in range(count - 1)
        )
        self.feed_forward = FeedForward(width, filters, causal=crossing)
        self.ends = nn.ModuleList(AddNorm(width, dropout) for _ in range(count))

    def forward(
        self, normed: Tensor, x: Tensor, *heard: tuple[Tensor | None, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """``heard``: for each attention its memory (None: the words themselves) and mask."""
        for attention, end, (memory, mask) in zip(self.attentions, self.ends, heard, strict=False):
            source = normed if memory is None else memory
            normed, x = end(x, attention(normed, source, source, mask))
        return self.ends[-1](x, self.feed_forward(normed))


class Dialogue(nn.Module):
    """Loss of a response to a context, and of the context's emotion."""

    def __init__(
        self,
        words: int,
        emotions: int = 32,
        width: int = 300,
        depth: int = 40,
        heads: int = 2,
        filters: int = 50,
        layers: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=PAD)
        self.starts = nn.ModuleList(AddNorm(width, dropout) for _ in range(2))
        sizes = (width, depth, heads, filters, dropout)
        self.encoder = nn.ModuleList(Block(*sizes, crossing=False) for _ in range(layers))
        self.decoder = nn.ModuleList(Block(*sizes, crossing=True) for _ in range(layers))
        self.emotion = nn.Linear(width, emotions)
        self.output = VocabularyLoss(width, words)

    def embed(self, ids: Tensor, start: nn.Module) -> tuple[Tensor, Tensor]:
        signal = timing_signal(ids.shape[1], self.embedding.embedding_dim).to(self.embedding.weight)
        return start(signal.expand(*ids.shape, -1), self.embedding(ids) * math.sqrt(signal.shape[1]))

    def forward(self, context: Tensor, response: Tensor, emotion: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of all, and the mean NLL of the response's words."""
        hidden = (context == PAD)[:, None]  # [B, 1, M]
        normed, x = self.embed(context, self.starts[0])
        for block in self.encoder:
            normed, x = block(normed, x, (None, hidden))
        memory = normed
        said = F.pad(response[:, :-1], (1, 0), value=START)
        later = torch.ones((said.shape[1], said.shape[1]), dtype=torch.bool, device=said.device).triu(1)
        normed, x = self.embed(said, self.starts[1])
        for block in self.decoder:
            normed, x = block(normed, x, (None, later | (said == PAD)[:, None]), (memory, hidden))
        loss, nll = self.output(normed, response)
        return loss + F.cross_entropy(self.emotion(memory[:, 0]), emotion), nll
