"""The encoded contexts as a decoder's blocks read them: padded, packed, or packed and not projected."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ecore.model.packing import Packing, Padded
from ecore.model.transformer import (
    MultiHeadAttention,
    Projection,
    added_mask,
    attended,
    in_heads,
    mean_scores,
)
from ecore.precision import for_products
from ecore_kernels import varlen_attention


class Memory(ABC):
    """Encoded contexts as the blocks of a decoder read them."""

    @abstractmethod
    def attended(self, block: int, query: Tensor, layout: Packing | Padded) -> Tensor:
        """Return what the queries of responses' rows [R, width] hear in their contexts, [R, width]."""

    @abstractmethod
    def scores(self, block: int, query: Tensor, layout: Packing | Padded) -> Tensor:
        """Return the heads' mean scores of the contexts' places, [R, S]."""


class PaddedMemory(Memory):
    """Keys and values of every place, padding among them: for attention by text and position.

    Args:
        memory: [B, S, D]; mask [B, S] bool.
        projection: to the keys and values of all blocks.
        blocks, heads: how many.
    """

    def __init__(self, memory: Tensor, mask: Tensor, projection: Projection, blocks: int, heads: int) -> None:
        self._heads = heads
        self._mask = added_mask(mask, memory)
        self._parts = keys_values(memory, projection, blocks, heads)

    def attended(self, block: int, query: Tensor, layout: Packing | Padded) -> Tensor:
        keys, values = self._parts[block]  # [B, heads, S, d]
        return layout.pack(attended(self._queries(query, layout), keys, values, self._mask))

    def scores(self, block: int, query: Tensor, layout: Packing | Padded) -> Tensor:
        return layout.pack(mean_scores(self._queries(query, layout), self._parts[block][0]))

    def _queries(self, query: Tensor, layout: Packing | Padded) -> Tensor:
        """Return queries [B, heads, T, d] of rows [R, width]."""
        (queries,) = in_heads(layout.unpack(query), 1, self._heads)
        return queries


class PackedMemory(Memory):
    """Keys and values of words alone: for attention among rows. Arguments as for :class:`PaddedMemory`."""

    def __init__(
        self, memory: Tensor, layout: Packing, projection: Projection, blocks: int, heads: int
    ) -> None:
        self._heads, self._layout = heads, layout
        projected = F.linear(for_products(layout.pack(memory)), *projection)  # [Rc, blocks * 2 * width]
        self._parts = projected.unflatten(-1, (blocks, 2, heads, -1)).unbind(1)

    def attended(self, block: int, query: Tensor, layout: Packing | Padded) -> Tensor:
        assert layout.sequences is not None  # of both or of none
        queries = query.unflatten(-1, (self._heads, -1))  # [R, heads, d]
        rows = self._parts[block]  # [Rc, 2, heads, d]
        return varlen_attention(queries, rows, None, layout.sequences, self._layout.sequences).flatten(1)

    def scores(self, block: int, query: Tensor, layout: Packing | Padded) -> Tensor:
        keys = self._parts[block][:, 0].flatten(1)  # [Rc, width]
        (keys,) = in_heads(self._layout.unpack(keys), 1, self._heads)
        (queries,) = in_heads(layout.unpack(query), 1, self._heads)
        return layout.pack(mean_scores(queries, keys))


class UnprojectedMemory(Memory):
    """The contexts' rows as they are, which all blocks and heads share as keys and as values.

    A score is (W_q y) . (W_k x) = (W_k^T W_q y) . x, so a head's queries can be projected in place of its keys, and
    what it hears in place of its values. A batch's responses have fewer words than its contexts.

    Args:
        memory: [B, S, D].
        layout: of its rows.
        attention: of each block.
    """

    def __init__(self, memory: Tensor, layout: Packing, attention: Sequence[MultiHeadAttention]) -> None:
        self._memory, self._layout, self._attention = memory, layout, attention
        self._rows = layout.pack(memory)[:, None]  # [Rc, 1, D]

    @staticmethod
    def pays(rows: int, memory_rows: int, contexts: int, heads: int, width: int, dim: int) -> bool:
        """Return whether this takes less work, in products and attention, than projecting the memory."""
        heard = 2 * rows * memory_rows // contexts  # attention is about half as fast as a large product
        return rows * dim * width + heard * heads * dim < (memory_rows * dim + heard) * width

    def attended(self, block: int, query: Tensor, layout: Packing | Padded) -> Tensor:
        attention, heads = self._attention[block], self._attention[block].heads
        assert layout.sequences is not None  # of both or of none
        key, value = (
            x.weight.unflatten(0, (heads, -1)) for x in (attention.key, attention.value)
        )  # [heads, d, D]
        queries = torch.bmm(query.unflatten(-1, (heads, -1)).transpose(0, 1), key)  # [heads, R, D]
        heard = varlen_attention(
            queries.transpose(0, 1),
            self._rows,
            self._rows,
            layout.sequences,
            self._layout.sequences,
            scale=key.shape[1] ** -0.5,
        )  # [R, heads, D]
        # The keys' bias adds the same to all scores of a query, which a softmax does not see: it has a gradient of 0.
        bias = (attention.value.bias + 0.0 * attention.key.bias).view(heads, 1, -1)
        return torch.baddbmm(bias, heard.transpose(0, 1), value.mT).transpose(0, 1).flatten(1)

    def scores(self, block: int, query: Tensor, layout: Packing | Padded) -> Tensor:
        attention = self._attention[block]
        heads, (width, _) = attention.heads, attention.key.weight.shape
        query = query * ((width // heads) ** -0.5 / heads)
        queries = layout.unpack(query @ attention.key.weight)  # [B, T, D]
        return layout.pack(queries @ self._memory.mT) + (query @ attention.key.bias)[:, None]


def keys_values(memory: Tensor, projection: Projection, blocks: int, heads: int) -> list[tuple[Tensor, ...]]:
    """Return every block's keys and values of the memory [B, S, D], [B, heads, S, d] each."""
    parts = in_heads(F.linear(for_products(memory), *projection), 2 * blocks, heads)
    return [parts[2 * block : 2 * block + 2] for block in range(blocks)]
