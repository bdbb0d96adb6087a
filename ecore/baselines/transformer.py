"""Multi-task Transformer (Rashkin et al., 2019): it generates and, from ``[CLS]``, classifies the emotion."""

from __future__ import annotations

from ecore.baselines.base import Baseline, Understanding, Words, encode


class MultitaskTransformer(Baseline):
    """A transformer encoder and decoder; e_p = W_e h_[CLS]."""

    def understand(self, words: Words) -> Understanding:
        """Encode the words alone."""
        memory = encode(self.encoder, words.embedded, words.mask)  # [B, M, D]
        return Understanding(memory, words.mask, memory[:, 0], words.batch.context)
