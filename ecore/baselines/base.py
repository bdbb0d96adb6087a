"""What the baselines share: E-CORE's words in and words out, around another understanding of the context."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ecore.config import ModelConfig
from ecore.data.batches import Batch
from ecore.data.vocabulary import Vocabulary
from ecore.data.word_tables import WordTables
from ecore.model.ecore import ECore
from ecore.model.outputs import Encoding
from ecore.model.perceiver import Context, EmotionHead
from ecore.model.pointer import Copyable


class Words(NamedTuple):
    """A batch of contexts as a baseline reads them.

    Attributes:
        batch: the samples.
        vectors: [B, M, D], scaled word vectors alone.
        embedded: [B, M, D], with positions and dialogue states (Eq. 1 of E-CORE's paper).
        mask: [B, M] bool, where there are words.
        concepts: [B, C, D], scaled vectors of the related words.
    """

    batch: Batch
    vectors: Tensor
    embedded: Tensor
    mask: Tensor
    concepts: Tensor


class Understanding(NamedTuple):
    """A baseline's reading of a batch of contexts.

    Attributes:
        memory: [B, S, D], what the decoder attends to.
        memory_mask: [B, S] bool.
        signal: [B, D'], what the emotion head reads.
        ids: int64 [B, S], the words that can be copied from the places of ``memory``, PAD where none can.
        losses: of the encoding itself, by name: weighted batch averages.
    """

    memory: Tensor
    memory_mask: Tensor
    signal: Tensor
    ids: Tensor
    losses: dict[str, Tensor] | None = None


class Baseline(ECore):
    """An encoder-decoder without E-CORE's graph: a subclass says how it understands a context (:meth:`understand`).

    Args:
        config: :func:`ecore.config.for_model` makes it.
        vocabulary, tables, embeddings: as E-CORE's.

    Raises:
        InputError: tables or embeddings that do not fit the vocabulary or the config.
    """

    perceiver: EmotionHead

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: Vocabulary,
        tables: WordTables,
        embeddings: np.ndarray | None = None,
    ) -> None:
        super().__init__(config, vocabulary, tables, embeddings)
        # Their emotion classifiers are bare matrices, e_p = W_e c.
        self.perceiver = EmotionHead(config.dim, len(vocabulary.emotions), bias=False)

    @abstractmethod
    def understand(self, words: Words) -> Understanding:
        """Encode contexts for the decoder and for the emotion head."""

    def _encode_words(
        self, batch: Batch, context: Tensor, concepts: Tensor, emotions: Tensor
    ) -> tuple[Encoding, Context]:
        mask = torch.arange(batch.context.shape[1], device=context.device) < batch.lengths[:, None]  # [B, M]
        embedded = self.embedding.place(context, batch.state)  # [B, M, D]
        read = self.understand(Words(batch, context, embedded, mask, concepts))
        copyable = None if self.pointer is None else Copyable.of(read.ids)
        encoding = Encoding(read.memory, read.memory_mask, copyable=copyable, losses=read.losses)
        return encoding, Context(
            embedded,
            mask,
            batch.lengths,
            self.context_intensity(batch),
            emotions,
            read.memory,
            read.memory_mask,
            read.signal,
        )

    def own_losses(self, encoding: Any) -> dict[str, Tensor]:
        """Return the losses of the encoding."""
        return encoding.losses or {}
