"""The modified transformer decoder (Appendix C), over whole responses and word by word with a key/value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecore.config import ModelConfig
from ecore.model.dropout import Dropout
from ecore.model.memory import Memory, PackedMemory, PaddedMemory, UnprojectedMemory, keys_values
from ecore.model.packing import Packing, Padded
from ecore.model.pointer import Copyable
from ecore.model.transformer import (
    FeedForward,
    MultiHeadAttention,
    Projection,
    SublayerEnds,
    attend,
    mean_scores,
    project,
    stacked,
)
from ecore.precision import for_products
from ecore_kernels import QuantizedLinear

Affine = tuple[Any, Tensor]
"""Weight, a tensor or in few bits a :class:`ecore_kernels.QuantizedLinear`, and bias."""


class BlockWeights(NamedTuple):
    """A block's weights as a step takes them: queries, keys and values are one projection."""

    self_norm: Affine
    query_key_value: Affine
    self_output: Affine
    cross_norm: Affine
    cross_query: Affine
    cross_output: Affine
    join: Affine
    feed_forward_norm: Affine
    expand: Affine
    contract: Affine


class Decoded(NamedTuple):
    """Of the words before each word of a response: s_t of Eq. 15, [..., D], and what copying scores the context's
    places with, [..., S] (:mod:`ecore.model.pointer`); None where it is not requested."""

    states: Tensor
    scores: Tensor | None


class DecoderCache:
    """The decoder's state of unfinished responses: C contexts, ``width`` responses (rows) each.

    Attributes:
        length: words decoded so far.
        contexts, width: C and the responses of each; those of one context lie side by side.
        keys_values: [blocks, 2, C * width, heads, max_length, d], of the words decoded so far; the first ``length``
            positions are filled.
        memory: [blocks, 2, C, heads, S, d], keys and values of the encoded contexts.
        mask: [C, heads, 1, S], 0 where the context has words and minus infinity elsewhere; None where it has
            words everywhere.
        guidance: [blocks, C * width, D], W_d's share of the node sum; None without one.
        weights: of each block.
        output: the layer to the vocabulary, in few bits or for few rows; None: the model's own.
        copyable: of the contexts, [C, S]; None without copying.
        bos_embedding: [C, D], what the first step reads in place of BOS's own; None without such.
    """

    def __init__(
        self,
        memory: Tensor,
        mask: Tensor | None,
        guidance: Tensor | None,
        weights: list[BlockWeights],
        max_length: int,
        copyable: Copyable | None = None,
        bos_embedding: Tensor | None = None,
        output: QuantizedLinear | None = None,
    ) -> None:
        blocks, _, self.contexts, heads, _, width = memory.shape
        self.width = 1
        self.length = 0
        self.keys_values = memory.new_empty(blocks, 2, self.contexts, heads, max_length, width)
        self.memory, self.mask, self.guidance, self.weights = memory, mask, guidance, weights
        self.copyable, self.bos_embedding = copyable, bos_embedding
        self.output = output

    @property
    def position(self) -> int:
        """Index of the word that the next step reads."""
        return self.length

    @property
    def chooses(self) -> bool:
        """True where the next word can be chosen without writing the vocabulary's logits, which copying needs."""
        return self.output is not None and self.copyable is None

    def append(self, block: int, keys_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take in the present word's [2, rows, heads, d]; the keys, values and mask to attend with."""
        self.keys_values[block, ..., self.length, :] = keys_values
        keys, values = self.keys_values[block, ..., : self.length + 1, :].unbind(0)
        return keys, values, None

    def advance(self) -> None:
        """The present word is in every block's cache."""
        self.length += 1

    def select(self, contexts: Tensor) -> None:
        """Keep, reorder or duplicate contexts with their responses: int64 [C'] indices into the present ones."""
        rows = contexts
        if self.width > 1:
            rows = (contexts[:, None] * self.width + torch.arange(self.width, device=rows.device)).flatten()
        self._take(rows)
        self.guidance = None if self.guidance is None else self.guidance.index_select(1, rows)
        self.memory = self.memory.index_select(2, contexts)
        self.mask = None if self.mask is None else self.mask.index_select(0, contexts)
        self.copyable = None if self.copyable is None else self.copyable.rows(contexts)
        self.bos_embedding = (
            None if self.bos_embedding is None else self.bos_embedding.index_select(0, contexts)
        )
        self.contexts = len(contexts)

    def branch(self, parents: Tensor) -> None:
        """Go on from other responses to the same contexts: int64 [C, width'], which of its present ones."""
        first = torch.arange(self.contexts, device=parents.device)[:, None] * self.width
        rows = (first + parents).flatten()
        self._take(rows)
        if self.guidance is not None and parents.shape[1] != self.width:
            self.guidance = self.guidance.index_select(1, rows)
        self.width = parents.shape[1]

    def _take(self, rows: Tensor) -> None:
        filled = self.keys_values[..., : self.length, :].index_select(2, rows)
        if len(rows) != self.keys_values.shape[2]:
            blocks, two, _, heads, room, width = self.keys_values.shape
            self.keys_values = self.keys_values.new_empty(blocks, two, len(rows), heads, room, width)
        self.keys_values[..., : self.length, :] = filled


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

    def forward(
        self,
        y: Tensor,
        normed: Tensor,
        projection: Projection,
        layout: Packing | Padded,
        memory: Memory,
        number: int,
        joint: tuple[Tensor, Tensor],
        end: SublayerEnds,
        following: nn.LayerNorm,
        copies: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Decode rows of words, R in all.

        Args:
            y, normed: [R, D], and under the block's first norm.
            projection: to queries, keys and values of the rows.
            layout: of the rows.
            memory: what it reads of the contexts, being the block of this ``number``.
            joint: from what the heads of cross-attention heard to W_d's result: a weight [D, width], and what is
                added, [D] or [R, D].
            end: of the sublayers.
            following: the norm after the block.
            copies: return scores.

        Returns:
            [R, D] states under the norm that follows, and themselves; and scores [R, S] if it copies.
        """
        own, cross = self.self_attention, self.cross_attention
        heard = own.of_itself(for_products(normed), projection, layout, causal=True)
        normed, y = end(heard, y, self.cross_norm)
        query = cross.query(normed)  # [R, width]
        found = memory.attended(number, query, layout)  # [R, width]
        weight, added = joint
        normed, y = end(torch.addmm(added, found, weight.mT), y, self.feed_forward_norm)
        normed, y = end(self.feed_forward(normed), y, following)
        return normed, y, memory.scores(number, query, layout) if copies else None

    def weights(self) -> BlockWeights:
        """Return the weights for :meth:`Decoder.step`; queries, keys and values are copied, the rest is shared."""
        own, cross = self.self_attention, self.cross_attention
        parts = (own.query, own.key, own.value)
        return BlockWeights(
            _affine(self.self_norm),
            (torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])),
            _affine(own.output),
            _affine(self.cross_norm),
            _affine(cross.query),
            _affine(cross.output),
            _affine(self.join_context),
            _affine(self.feed_forward_norm),
            _affine(self.feed_forward[0]),
            _affine(self.feed_forward[2]),
        )


def _among_rows(layout: Packing | Padded | None) -> TypeGuard[Packing]:
    """Return whether attention takes a layout's rows as they are."""
    return layout is not None and layout.sequences is not None


def _affine(layer: nn.Module) -> Affine:
    """Return the weight and the bias of an nn.Linear or nn.LayerNorm."""
    assert isinstance(layer, (nn.Linear, nn.LayerNorm))
    return layer.weight, layer.bias


class Decoder(nn.Module):
    """Decoder blocks and a final LayerNorm."""

    blocks: list[DecoderBlock]

    def __init__(self, config: ModelConfig, guided: bool) -> None:
        super().__init__()
        self.copies = config.copy
        blocks = nn.ModuleList(DecoderBlock(config, guided) for _ in range(config.decoder_blocks))
        self.blocks = blocks  # type: ignore[assignment]  # indexed and iterated like one
        # Eq. 24 is a sum over words: without a norm it grows with the context's length, as in the released code.
        self.guidance_norm: nn.Module | None = None
        if guided:
            self.guidance_norm = nn.Identity() if config.released else nn.LayerNorm(config.dim)
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = Dropout(config.dropout)

    def _joins(self) -> list[nn.Linear]:
        """Return W_d's halves for the node sum, one a block; none without guidance."""
        return [block.join_guidance for block in self.blocks if block.join_guidance is not None]

    def _guidance(self, guidance: Tensor | None, projection: Projection | None = None) -> Tensor | None:
        """Return every block's share of the node sum [B, D], in turn: [B, blocks, D]; None without one.

        ``projection``: to all of them, which may have W_d's bias in it; without one, they come without it.
        """
        if guidance is None or self.guidance_norm is None:
            return None
        weight, bias = projection or (torch.cat([join.weight for join in self._joins()]), None)
        shares = F.linear(for_products(self.guidance_norm(guidance)), weight, bias)  # [B, blocks * D]
        return shares.unflatten(1, (len(self.blocks), -1))

    def _memory_layers(self) -> list[nn.Linear]:
        """Return every block's projections of the memory to keys and values, in turn."""
        cross = [block.cross_attention for block in self.blocks]
        return [layer for attention in cross for layer in (attention.key, attention.value)]

    def _joints(
        self,
        layout: Packing | Padded,
        join_context: Projection,
        guidance: Tensor | None,
        join_guidance: Projection | None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Return each block's ``joint``: the heads' output layer and W_d in one, and W_d's share of the node sum.

        There is nothing between these two layers, so their product is taken once and not for each word.
        """
        count = len(self.blocks)
        ((output, output_bias),) = stacked([[block.cross_attention.output for block in self.blocks]])
        join, bias = join_context
        assert bias is not None
        assert output_bias is not None
        join = join.unflatten(0, (count, -1))  # [blocks, D, D]
        weights = torch.bmm(join, output.unflatten(0, (count, -1)))  # [blocks, D, width]
        added = torch.baddbmm(bias.view(count, -1, 1), join, output_bias.view(count, -1, 1))  # [blocks, D, 1]
        if guidance is None or join_guidance is None:
            return list(zip(weights.unbind(), added[..., 0].unbind(), strict=True))
        shares = self._guidance(guidance, (join_guidance[0], added.flatten()))  # [B, blocks, D]
        assert shares is not None
        rows = layout.spread(shares.flatten(1)).unflatten(1, (count, -1))  # [R, blocks, D]
        return list(zip(weights.unbind(), rows.unbind(1), strict=True))

    def _unprojected(
        self, rows: int, memory: Tensor, layout: Packing | Padded, of_memory: Packing | Padded | None
    ) -> UnprojectedMemory | None:
        """Return the memory [B, S, D] as it is, for ``rows`` of words, where that takes less; None elsewhere."""
        if layout.sequences is None or not _among_rows(of_memory) or for_products(memory) is not memory:
            return None
        cross = [block.cross_attention for block in self.blocks]
        heads, (width, dim) = cross[0].heads, cross[0].key.weight.shape
        if not UnprojectedMemory.pays(rows, len(of_memory.places), len(memory), heads, width, dim):
            return None
        return UnprojectedMemory(memory, of_memory, cross)

    def _projected(
        self,
        memory: Tensor,
        mask: Tensor,
        layout: Packing | Padded,
        of_memory: Packing | Padded | None,
        projection: Projection,
    ) -> Memory:
        """Return keys and values of the memory [B, S, D]; ``projection`` to those of all blocks."""
        blocks, heads = len(self.blocks), self.blocks[0].cross_attention.heads
        if layout.sequences is not None and _among_rows(of_memory):
            return PackedMemory(memory, of_memory, projection, blocks, heads)
        return PaddedMemory(memory, mask, projection, blocks, heads)

    def forward(
        self,
        y: Tensor,
        memory: Tensor,
        mask: Tensor,
        guidance: Tensor | None,
        packing: Packing | None = None,
        memory_layout: Packing | Padded | None = None,
    ) -> Decoded:
        """Decode whole responses at once.

        Args:
            y: [B, T, D], embedded responses, shifted right; with ``packing`` its rows, [R, D].
            memory: [B, S, D], h_X.
            mask: [B, S] bool.
            guidance: [B, D], the node sum of Eq. 24, or None.
            packing: of the responses; None where y has padding.
            memory_layout: of the memory's rows; None where they are not known.

        Returns:
            States like y, and the last block's scores [B, T, S] or [R, S] where the model copies.
        """
        layout: Packing | Padded
        if packing is None:
            layout = Padded(*y.shape[:2])
            y = layout.pack(y)
        else:
            layout = packing
        blocks = len(self.blocks)
        groups: list[Sequence[nn.Linear]] = [block.self_attention.own_layers for block in self.blocks]
        groups.append([block.join_context for block in self.blocks])
        guided = guidance is not None and self.guidance_norm is not None
        groups += [self._joins()] if guided else []
        shared = self._unprojected(len(y), memory, layout, memory_layout)
        groups += [self._memory_layers()] if shared is None else []
        projections = stacked(groups)
        join_guidance = projections[blocks + 1] if guided else None
        joints = self._joints(layout, projections[blocks], guidance, join_guidance)
        of_memory = shared or self._projected(memory, mask, layout, memory_layout, projections[-1])
        scores: Tensor | None = None
        first, *others = [*(block.self_norm for block in self.blocks), self.norm]
        end = SublayerEnds(1 + 3 * len(self.blocks), self.dropout, y)
        states, y = end.begin(y, first)
        for i, block in enumerate(self.blocks):
            copies = self.copies and block is self.blocks[-1]
            states, y, scores = block(
                y, states, projections[i], layout, of_memory, i, joints[i], end, others[i], copies
            )
        if packing is None:
            states = layout.unpack(states)
            scores = None if scores is None else layout.unpack(scores)
        return Decoded(states, scores)

    def start(
        self,
        memory: Tensor,
        mask: Tensor,
        guidance: Tensor | None,
        max_length: int,
        copyable: Copyable | None = None,
        bos_embedding: Tensor | None = None,
        weights: list[BlockWeights] | None = None,
        output: QuantizedLinear | None = None,
    ) -> DecoderCache:
        """The cache of responses of at most ``max_length`` words, none decoded yet; arguments as for forward and for
        the cache. ``weights``: of the blocks, to take instead of the model's."""
        (projection,) = stacked([self._memory_layers()])
        heads = self.blocks[0].cross_attention.heads
        cross = [part for pair in keys_values(memory, projection, len(self.blocks), heads) for part in pair]
        guided = self._guidance(guidance)
        added: Tensor | None = None
        if memory.is_cuda or not mask.all():  # on GPU looking would wait for it
            added = torch.zeros_like(mask, dtype=cross[0].dtype).masked_fill_(~mask, -torch.inf)
            added = added[:, None, None, :].repeat(1, cross[0].shape[1], 1, 1)
        return DecoderCache(
            torch.stack(cross).unflatten(0, (-1, 2)),
            added,
            None if guided is None else guided.transpose(0, 1).contiguous(),
            weights or [block.weights() for block in self.blocks],
            max_length,
            copyable,
            bos_embedding,
            output,
        )

    def step(self, y: Tensor, cache: DecoderCache) -> Decoded:
        """Decode one more word, without dropout: y [C * width, D] embedded -> rows' states; the cache grows by it."""
        heads, size = cache.keys_values.shape[3], y.shape[1:]
        for i, w in enumerate(cache.weights):
            projected = project(F.layer_norm(y, size, *w.self_norm), *w.query_key_value)
            projected = projected.unflatten(1, (3, heads, -1))
            own = cache.append(i, projected[:, 1:].transpose(0, 1))
            attended = attend(projected[:, 0, :, None], *own).flatten(0, 1)
            y = y + project(attended, *w.self_output)

            query = project(F.layer_norm(y, size, *w.cross_norm), *w.cross_query)
            query = query.view(cache.contexts, cache.width, heads, -1).transpose(1, 2)
            keys, values = cache.memory[i].unbind(0)  # [C, heads, S, d]
            attended = attend(query, keys, values, cache.mask).flatten(0, 1)
            y = y + project(project(attended, *w.cross_output), *w.join)
            if cache.guidance is not None:
                y = y + cache.guidance[i]

            hidden = F.relu_(project(F.layer_norm(y, size, *w.feed_forward_norm), *w.expand))
            y = y + project(hidden, *w.contract)
        cache.advance()
        scores = mean_scores(query, cache.memory[-1][0]).flatten(0, 1) if self.copies else None
        return Decoded(self.norm(y), scores)
