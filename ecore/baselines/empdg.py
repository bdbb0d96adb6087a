"""EmpDG: multi-resolution interactive empathetic dialogue generation (Li et al., COLING 2020), its generator.

One encoder reads all words of a context, another its emotional words alone; both give the emotion and the decoder's
memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ecore.baselines.base import Baseline, Understanding, Words, encode
from ecore.data.batches import Batch
from ecore.data.vocabulary import PAD, UNK
from ecore.model.encoder import Encoder
from ecore.model.perceiver import EmotionHead


class EmpDG(Baseline):
    """Sentence-level and word-level emotion: e_p = W [g_[CLS]; h_[CLS]]."""

    def add_parts(self) -> None:
        """Make the encoder of emotional words, and a head for both encoders."""
        self.emotion_encoder = Encoder(self.config)
        self.perceiver = EmotionHead(2 * self.config.dim, len(self.vocabulary.emotions), bias=False)

    def understand(self, words: Words) -> Understanding:
        """Encode all words, and the emotional ones alone."""
        batch = words.batch
        semantic = encode(self.encoder, words.embedded, words.mask)  # [B, M, D]
        emotional = self.emotional(batch, words.mask)  # [B, M]
        # Positions count emotional words alone: the others are in the tensor, and nobody hears them.
        place = (emotional.cumsum(1) - 1).clamp(min=0)  # [B, M]
        positioned = words.vectors + self.embedding.position[place]
        emotion = encode(self.emotion_encoder, positioned, emotional)  # [B, M, D]
        return Understanding(
            torch.cat([semantic, emotion], dim=1),
            torch.cat([words.mask, emotional], dim=1),
            torch.cat([emotion[:, 0], semantic[:, 0]], dim=1),
            torch.cat([batch.context, batch.context.masked_fill(~emotional, PAD)], dim=1),
        )

    def emotional(self, batch: Batch, mask: Tensor) -> Tensor:
        """Return where a context has ``[CLS]`` or a word of more intensity than an unknown one, bool [B, M]."""
        marked = self.intensity[batch.context] > self.intensity[UNK]
        marked[:, 0] = True
        return marked & mask
