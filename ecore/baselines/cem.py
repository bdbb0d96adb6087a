"""CEM: commonsense-aware empathetic response generation (Sabour et al., AAAI 2022).

Inferences about the last utterance refine the context: what the speaker feels (xReact) gives the emotion, and with it
what they intend, need, want and what comes of it give the decoder's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecore.baselines.base import Baseline, Understanding, Words, encode
from ecore.baselines.inferences import (
    RELATIONS,
    InferenceBatch,
    Inferences,
    InferenceSplit,
    padded_ids,
    with_inferences,
)
from ecore.baselines.joined import JoinedEncoder
from ecore.config import ModelConfig
from ecore.data.batches import Split, context_batch
from ecore.data.vocabulary import EOS, PAD, Vocabulary
from ecore.data.word_tables import WordTables
from ecore.errors import InputError
from ecore.model.encoder import Encoder
from ecore.model.pointer import Copying

DIVERSITY_WEIGHT = 1.5
"""Weight of the diversity loss."""


class CEM(Baseline):
    """Affective and cognitive refinement of the context by commonsense inferences.

    Args:
        config, vocabulary, tables, embeddings: as of every baseline.
        inferences: of utterances; of one that they lack nothing is inferred.
    """

    predicted: Tensor
    """int64 [V], how often each word was predicted in training."""

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: Vocabulary,
        tables: WordTables,
        embeddings: np.ndarray | None = None,
        inferences: Inferences | None = None,
    ) -> None:
        if config.copy:
            raise InputError("copy: model cem has no words to copy; expected it to be off")
        super().__init__(config, vocabulary, tables, embeddings)
        self.inferences = inferences or Inferences({}, "no file")
        dim, cognitive = config.dim, len(RELATIONS) - 1
        self.affective_encoder, self.cognitive_encoder = Encoder(config), Encoder(config)
        self.affective_refiner, self.cognitive_refiner = JoinedEncoder(config), JoinedEncoder(config)
        self.selection = nn.Sequential(
            nn.Linear((cognitive + 1) * dim, 3 * dim, bias=False),
            nn.ReLU(),
            nn.Linear(3 * dim, dim, bias=False),
        )
        self.register_buffer("predicted", torch.zeros(len(vocabulary), dtype=torch.int64))

    def view(self, split: Split, progress: bool = True) -> Any:
        """Return ``split`` with inferences, and print how many of its contexts have some."""
        viewed = InferenceSplit(split, self.inferences, self.vocabulary)
        if progress and viewed.known < len(split):
            print(f"{split.name}: inferences for {viewed.known:,} of {len(split):,} contexts", flush=True)
        return viewed

    def read(self, contexts: Sequence[Sequence[str]]) -> Any:
        """Return a batch of raw contexts, with the inferences that are known of their last utterances."""
        batch = context_batch(contexts, self.vocabulary, self.tables)
        rows = [self.inferences.ids(turns[-1], self.vocabulary) for turns in contexts]
        return with_inferences(batch, padded_ids(rows))

    def understand(self, words: Words) -> Understanding:
        """Encode the words, refine them by each relation, and select what counts of all."""
        batch: Any = words.batch
        memory = encode(self.encoder, words.embedded, words.mask)  # [B, M, D]
        positions = self.embedding.position[: memory.shape[1]]
        affective, cognitive = self.relations(batch)  # [B, D], [B, 4, D]
        felt = self.affective_refiner(memory, affective, positions, words.mask)  # [B, M, D]
        count = cognitive.shape[1]
        understood = self.cognitive_refiner(
            memory.repeat_interleave(count, 0),
            cognitive.flatten(0, 1),
            positions,
            words.mask.repeat_interleave(count, 0),
        )  # [B * 4, M, D]
        by_relation = understood.unflatten(0, (-1, count)).unbind(1)  # 4 of [B, M, D]
        both = torch.cat([*by_relation, felt], dim=-1)  # [B, M, 5 D]
        return Understanding(
            self.selection(torch.sigmoid(both) * both), words.mask, felt[:, 0], batch.context
        )

    def relations(self, batch: InferenceBatch) -> tuple[Tensor, Tensor]:
        """Return the mean of xReact's words [B, D], and the [CLS] of each other relation [B, 4, D]."""
        mask = batch.inferences != PAD  # [B, 5, L]
        vectors = self.embedding.look_up(batch.inferences)[0]  # [B, 5, L, D]
        embedded = self.embedding.place(vectors.flatten(0, 1)).view_as(vectors)
        cognitive = encode(self.cognitive_encoder, embedded[:, :-1].flatten(0, 1), mask[:, :-1].flatten(0, 1))
        affective = encode(self.affective_encoder, embedded[:, -1], mask[:, -1])  # [B, L, D]
        seen = mask[:, -1, :, None]
        return (affective * seen).sum(1) / seen.sum(1), cognitive[:, 0].unflatten(0, (len(mask), -1))

    def losses_of_words(
        self, states: Tensor, targets: Tensor, label_smoothing: float, scale: float, copying: Copying | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor] | None]:
        """Return the losses of every response word; in training with the diversity loss."""
        if not self.training:
            return super().losses_of_words(states, targets, label_smoothing, scale, copying)
        logits = self.output(states).float()  # [T, V]: the most likely words are counted
        options: dict[str, Any] = {"ignore_index": PAD, "reduction": "none"}
        nll = F.cross_entropy(logits, targets, **options)  # [T]
        smoothed = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, **options)
        self._count(logits.detach().argmax(-1), targets)
        diversity = (diversity_weight(self.predicted)[targets] * nll).sum() * scale
        return smoothed.sum() * scale, nll.detach(), {"diversity": DIVERSITY_WEIGHT * diversity}

    @torch.no_grad()
    def _count(self, words: Tensor, targets: Tensor) -> None:
        counted = (targets != PAD) & (words != EOS)
        self.predicted.index_add_(0, words, counted.to(self.predicted.dtype))


def diversity_weight(predicted: Tensor) -> Tensor:
    """Return the weight of each word, [V]: 1 - frequency / the greatest one, scaled to a mean of 1.

    Args:
        predicted: int64 [V], how often each word was predicted; where none was, all weights are 1.
    """
    count = predicted.float()
    weight = 1.0 - count / count.max().clamp(min=1.0)
    return weight * (len(weight) / weight.sum())
