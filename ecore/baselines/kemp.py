"""KEMP: knowledge bridging for empathetic dialogue generation (Li et al., AAAI 2022).

Context words and related words form a graph. Its words are updated by their neighbors before they are encoded; each
node's emotional intensity weighs it in the emotion signal, which starts the response and joins the decoder's
cross-attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecore.baselines.base import Baseline, Understanding, Words, encode
from ecore.config import ModelConfig
from ecore.data.batches import RELATED_STATE, Batch
from ecore.data.vocabulary import PAD
from ecore.errors import InputError
from ecore.model.decoder import Decoded, Decoder
from ecore.model.dropout import Dropout
from ecore.model.outputs import Encoding
from ecore.model.packing import ResponseRows
from ecore.model.perceiver import Context
from ecore_kernels.tracing import replaced

ATTENTION_WEIGHT = 0.1
"""Weight of the emotional attention loss (gamma 3)."""


class ConceptGraph(nn.Module):
    """The update of words by their neighbors: LayerNorm(v_i + W_o sum over j in A_i of a_ij W_v v_j)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.dropout = Dropout(config.graph_dropout)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, words: Tensor, concepts: Tensor, neighbors: Tensor) -> Tensor:
        """Return the words' new features, [B, M, D].

        Args:
            words: [B, M, D].
            concepts: [B, C, D].
            neighbors: [B, M, M + C] bool, of words among words and concepts; each has one at least.
        """
        nodes = torch.cat([words, concepts], dim=1)  # [B, M + C, D]
        heard = F.scaled_dot_product_attention(
            self.query(words), self.key(nodes), self.value(nodes), attn_mask=neighbors
        )
        return self.norm(words + self.dropout(self.output(heard)))


class KEMP(Baseline):
    """Emotional context graph, emotion signal and emotional cross-attention.

    Raises:
        InputError: there are no related words, or the config leaves them or copying out.
    """

    related: Tensor

    def add_parts(self) -> None:
        """Make the graph of words and concepts, and a decoder that it guides."""
        config = self.config
        if not config.commonsense or not config.copy:
            part = "copy" if config.commonsense else "commonsense"
            raise InputError(f"{part}: model kemp is not without it; expected it to be on")
        if not self.related.shape[1]:
            raise InputError(
                "model: kemp needs related words; expected data from `ecore prepare --relations FILE`"
            )
        self.concept_graph = ConceptGraph(config)
        self.decoder = Decoder(config, guided=True)  # W [attended; c_e], as E-CORE joins its node sum

    def understand(self, words: Words) -> Understanding:
        """Update the words, encode them with the related words, and weigh all of them by intensity."""
        batch = words.batch
        neighbors, node_mask = self.neighbors(batch, words.mask)
        # A set of words of a state of their own, without positions.
        concepts = words.concepts + self.embedding.state.weight[RELATED_STATE]
        updated = self.concept_graph(words.embedded, concepts, neighbors)  # [B, M, D]
        memory = encode(self.encoder, torch.cat([updated, concepts], dim=1), node_mask)  # [B, M + C, D]
        weight = self.intensity_weight(batch, node_mask).to(memory.dtype)
        signal = (weight[..., None] * memory).sum(1)  # [B, D], c_e
        return Understanding(memory, node_mask, signal, torch.cat([batch.context, batch.concepts], dim=1))

    def neighbors(self, batch: Batch, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return who hears whom, bool [B, M, M + C], and which nodes there are, bool [B, M + C].

        ``[CLS]`` hears all; a word hears ``[CLS]``, the word before it and the words related to it.
        """
        columns = torch.arange(mask.shape[1], device=mask.device)
        before = columns == columns[:, None] - 1  # [M, M]
        of_words = before | (columns == 0) | (columns[:, None] == 0)  # [M, M]
        related = self.related[batch.context]  # [B, M, R]
        own = (related[..., None] == batch.concepts[:, None, None]).any(2)  # [B, M, C]
        of_concepts = own | (columns == 0)[:, None]  # [B, M, C]
        node_mask = torch.cat([mask, batch.concepts != PAD], dim=1)  # [B, M + C]
        both = torch.cat([of_words.expand(len(mask), -1, -1), of_concepts], dim=2)
        return both & node_mask[:, None], node_mask

    def intensity_weight(self, batch: Batch, node_mask: Tensor) -> Tensor:
        """Return Softmax(eta) over a context's nodes, [B, M + C]; eta = 2 sqrt(c), from 0 to 1."""
        ids = torch.cat([batch.context, batch.concepts], dim=1)
        eta = 2.0 * self.intensity[ids].sqrt()
        return eta.masked_fill(~node_mask, -torch.inf).softmax(-1)

    def perceive(self, encoding: Encoding, context: Context | None) -> Encoding:
        """Return ``encoding`` with its emotions, guided by the emotion signal."""
        assert context is not None
        return replaced(encoding, perceived=replaced(self.perceiver(context), guidance=context.mean))

    def decoding_losses(
        self, batch: Batch, encoding: Encoding, decoded: Decoded, rows: ResponseRows
    ) -> dict[str, Tensor] | None:
        """Return the loss of the response's attention to the nodes."""
        assert decoded.scores is not None  # it copies
        weight = self.intensity_weight(batch, encoding.memory_mask)
        scores = rows.layout.unpack(decoded.scores)  # [B, T, S]
        attention = attention_loss(scores, batch.response != PAD, weight, encoding.memory_mask)
        return {"emotional_attention": ATTENTION_WEIGHT * attention}


def attention_loss(scores: Tensor, words: Tensor, weight: Tensor, node_mask: Tensor) -> Tensor:
    """Return the mean over a context's nodes of (eta_i - a_i)^2, batch average.

    Args:
        scores: [B, T, S], of the last block's cross-attention; a is their softmax, averaged over the response.
        words: [B, T] bool, where the response has words.
        weight: [B, S], eta.
        node_mask: [B, S] bool.
    """
    attention = scores.float().masked_fill(~node_mask[:, None], -torch.inf).softmax(-1)  # [B, T, S]
    mean = (attention * words[..., None]).sum(1) / words.sum(1, keepdim=True)  # [B, S]
    squares = (mean - weight).square() * node_mask
    return (squares.sum(1) / node_mask.sum(1)).mean()
