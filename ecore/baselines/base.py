"""Base class of the rival systems: E-CORE's embedding and decoder around another encoding of the context."""

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
from ecore.model.base import WordLosses
from ecore.model.decoder import Decoded
from ecore.model.ecore import ECore
from ecore.model.encoder import Encoder
from ecore.model.losses import vocabulary_losses
from ecore.model.outputs import Encoding
from ecore.model.packing import ResponseRows, layout_of
from ecore.model.perceiver import Context, EmotionHead
from ecore.model.pointer import Copyable, Copying
from ecore_kernels.tracing import replaced


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
    """An encoder-decoder without E-CORE's graph.

    A subclass says which modules it has beside E-CORE's (:meth:`add_parts`), and how it understands a context
    (:meth:`understand`).

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
        self.add_parts()

    def add_parts(self) -> None:  # the multi-task Transformer has none
        """Make the modules of its own; all that E-CORE has is there.

        Raises:
            InputError: a config, a vocabulary or tables that it cannot work with.
        """

    @abstractmethod
    def understand(self, words: Words) -> Understanding:
        """Encode contexts for the decoder and for the emotion head."""

    def encode_words(self, batch: Batch) -> tuple[Encoding, Context | None]:
        """Return the encoding of contexts without their emotions, and what the emotion head reads."""
        return self._understood(batch, *self.embedding.look_up(batch.context, batch.concepts))

    def _understood(self, batch: Batch, context: Tensor, concepts: Tensor) -> tuple[Encoding, Context]:
        """Do it from the vectors of the context [B, M, D] and of the related words [B, C, D]."""
        mask = torch.arange(batch.context.shape[1], device=context.device) < batch.lengths[:, None]  # [B, M]
        embedded = self.embedding.place(context, batch.state)  # [B, M, D]
        read = self.understand(Words(batch, context, embedded, mask, concepts))
        copyable = None if self.pointer is None else Copyable.of(read.ids)
        layout = layout_of(read.memory_mask)
        encoding = Encoding(
            read.memory, read.memory_mask, copyable=copyable, losses=read.losses, layout=layout
        )
        return encoding, Context(
            embedded,
            mask,
            batch.lengths,
            self.context_intensity(batch),
            self.perceiver.main.weight,
            read.memory,
            read.memory_mask,
            read.signal,
        )

    def word_losses(
        self, batch: Batch, tokens: int | None, label_smoothing: float, scale: float
    ) -> WordLosses:
        """Return the losses of every response word."""
        rows = ResponseRows.of(batch.response, tokens)
        context, concepts, said = self.embedding.look_up(batch.context, batch.concepts, rows.before)
        encoding = self.perceive(*self._understood(batch, context, concepts))
        decoded, copying = self._decode_rows(said, encoding, rows)
        encoding = replaced(encoding, losses=self.decoding_losses(batch, encoding, decoded, rows))
        smoothed, nll, further = self.losses_of_words(
            decoded.states, rows.targets, label_smoothing, scale, copying
        )
        if further is not None:
            encoding = replaced(encoding, losses=(encoding.losses or {}) | further)
        return WordLosses(smoothed, nll, rows.contexts, encoding)

    def decoding_losses(
        self, batch: Batch, encoding: Encoding, decoded: Decoded, rows: ResponseRows
    ) -> dict[str, Tensor] | None:
        """Return the encoding's own losses, and what the decoder's attention adds; ``decoded`` has rows."""
        return encoding.losses

    def losses_of_words(
        self, states: Tensor, targets: Tensor, label_smoothing: float, scale: float, copying: Copying | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor] | None]:
        """Return the scaled loss of T words, their negative log-likelihoods [T], and further losses of them.

        Args:
            states: [T, D].
            targets: int64 [T], PAD where there is no word.
        """
        weight, bias = self.output.weight, self.output.bias
        smoothed, nll = vocabulary_losses(states, weight, bias, targets, label_smoothing, scale, copying)
        return smoothed, nll, None

    def own_losses(self, encoding: Any) -> dict[str, Tensor]:
        """Return the losses of the encoding."""
        return encoding.losses or {}


def encode(encoder: Encoder, x: Tensor, mask: Tensor) -> Tensor:
    """Return the encoder's output [B, S, D] for embedded words x [B, S, D], before their dropout; mask [B, S] bool."""
    return encoder(x, mask, layout_of(mask))[0]
