"""The interface of every model: it reads contexts, perceives their emotions, and answers word by word."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecore.config import WEIGHTS, ModelConfig
from ecore.data.batches import MAX_RESPONSE_WORDS, Split
from ecore.data.vocabulary import PAD
from ecore.data.word_tables import WordTables
from ecore.errors import InputError
from ecore.model.losses import Losses, correlation_loss, prior_loss, ranked_pairs_loss
from ecore.model.outputs import ECoreOutput, Scores
from ecore.model.perceiver import SOFT_RELEVANT, Context, EmotionHead, Perceiver, health
from ecore_kernels.tracing import replaced


class WordLosses(NamedTuple):
    """Losses of T response words.

    Attributes:
        smoothed: with label smoothing, summed over the words and scaled.
        nll: [T], without label smoothing.
        rows: int64 [T], the response of each word.
        encoding: of the contexts.
    """

    smoothed: Tensor
    nll: Tensor
    rows: Tensor
    encoding: Any


class EmpatheticModel(nn.Module, ABC):
    """A model around a perceiver: it reads, encodes, decodes step by step, and is trained and scored.

    A subclass has its own batches, encodings and caches. An encoding has ``memory`` [B, S, D], ``memory_mask`` [B, S]
    and ``perceived`` (:class:`ecore.model.perceiver.Perceived`, None without emotions); a cache has ``select``,
    ``branch`` and ``length`` as :class:`ecore.model.decoder.DecoderCache` has.

    Args:
        config: architecture and losses.
        vocabulary: ids, texts and emotions.
        tables: intensity and related words of every word of the prepared data.
        word_count: words that the tables must have.

    Raises:
        InputError: tables that do not fit the vocabulary.
    """

    perceiver: Perceiver | EmotionHead | None
    emotion_words: Tensor
    cooccurrence: Tensor
    """[P, P], what ``correlation_prior`` teaches R; training fills it in."""
    most_response = MAX_RESPONSE_WORDS
    """Words of a response that there are positions for (subwords with a backbone)."""
    blank: Tensor | None
    """[W] ids without text; an answer does not begin with one of them. None where every word has text."""

    def __init__(self, config: ModelConfig, vocabulary: Any, tables: WordTables, word_count: int) -> None:
        super().__init__()
        if len(tables.intensity) != word_count:
            raise InputError(
                f"word tables: expected {word_count} words as in the vocabulary, got {len(tables.intensity)}"
            )
        self.config = config
        self.vocabulary = vocabulary
        for name, value in tables._asdict().items():
            self.register_buffer(name, value.clone())
        emotions = len(vocabulary.emotions)
        self.register_buffer("cooccurrence", torch.zeros(emotions, emotions), persistent=False)
        self.register_buffer("blank", None, persistent=False)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.emotion_words.device

    @property
    def tables(self) -> WordTables:
        """Intensity and related words, as they travel with the weights."""
        return WordTables(*(getattr(self, name) for name in WordTables._fields))

    def quantize(self, weights: str) -> None:
        """Generate with the decoder's and the output layer's weights as int8, bfloat16 or the model's own float32.

        Everything else reads the model's own, losses among it.

        Args:
            weights: of :data:`ecore.config.WEIGHTS`.

        Raises:
            InputError: another name; or this model cannot, or not where it is.
        """
        if weights not in WEIGHTS:
            raise InputError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
        self._quantize(None if weights == "float32" else getattr(torch, weights))

    def _quantize(self, dtype: torch.dtype | None) -> None:
        if dtype is not None:
            raise InputError("weights: expected float32: with a pre-trained backbone there are no others")

    # Text to batches

    @abstractmethod
    def view(self, split: Split, progress: bool = True) -> Any:
        """Return ``split`` as this model reads it."""

    @abstractmethod
    def read(self, contexts: Sequence[Sequence[str]]) -> Any:
        """Return a batch of raw contexts, each a list of turns, the speaker's first."""

    @abstractmethod
    def context_intensity(self, batch: Any) -> Tensor:
        """Return c of every context word, [B, M]."""

    # Context to encoding

    def encode(self, batch: Any) -> Any:
        """Encode contexts, perceive their emotions and prepare what guides the response."""
        return self.perceive(*self.encode_words(batch))

    @abstractmethod
    def encode_words(self, batch: Any) -> tuple[Any, Context | None]:
        """Return the encoding of contexts without their emotions, and what the perceiver reads (None without one)."""

    def perceive(self, encoding: Any, context: Context | None) -> Any:
        """Return ``encoding`` with the emotions of ``context``."""
        if self.perceiver is None or context is None:
            return encoding
        return replaced(encoding, perceived=self.perceiver(context))

    # Encoding to words

    def check_length(self, max_length: int) -> None:
        """Check that responses may have ``max_length`` words.

        Raises:
            InputError: there are no positions for so many.
        """
        if max_length > self.most_response:
            raise InputError(
                f"max_length: expected at most {self.most_response}, got {max_length}; the model has no positions for "
                "more"
            )

    @abstractmethod
    def forward(self, batch: Any) -> ECoreOutput:
        """Return logits of every response word given the words before it."""

    @abstractmethod
    def start(self, encoding: Any, max_length: int) -> Any:
        """Return a cache for responses of at most ``max_length`` words; the first :meth:`step` takes BOS.

        Raises:
            InputError: there are no positions for so many.
        """

    @abstractmethod
    def step(self, words: Tensor, cache: Any) -> Tensor:
        """Return logits [B, V] of the next word after ``words`` [B], without dropout; the caller may change them."""

    # Losses

    @abstractmethod
    def word_losses(self, batch: Any, tokens: int | None, label_smoothing: float, scale: float) -> WordLosses:
        """Return the losses of every response word; ``tokens`` as in :meth:`loss`, ``scale`` for the smoothed one."""

    def loss(self, batch: Any, health: bool = False, tokens: int | None = None) -> Losses:
        """Return the joint loss (Eq. 19) of a batch.

        Args:
            batch: B samples.
            health: add what the log wants to know of the graph.
            tokens: words of the responses, or any number over that, where the caller knows it: on a GPU
                counting them would make the host wait for the device.
        """
        generation, nll, _, encoding = self.word_losses(
            batch, tokens, self.config.label_smoothing, 1.0 / len(batch.response)
        )
        total, perceived = generation, encoding.perceived
        if not isinstance(self.perceiver, Perceiver):
            emotion = correlation = correct = generation.new_zeros(())
        figures: dict[str, Tensor] = {}
        if self.perceiver is not None:
            emotion = F.cross_entropy(perceived.main_logits.float(), batch.emotion)
            correct = (perceived.main_logits.argmax(1) == batch.emotion).sum(dtype=torch.float32)
            total = torch.add(total, emotion, alpha=self.config.gamma_emotion)
        if isinstance(self.perceiver, Perceiver):
            weight = perceived.correlation[0]  # [P, P]
            if self.config.eco_form != "softmax":
                weight = self.perceiver.correlation.pair_weight(self.config.eco_form)
            if self.config.released:
                correlation = ranked_pairs_loss(weight, perceived.emotion_attention, SOFT_RELEVANT)
            else:
                correlation = correlation_loss(weight, perceived.relevant)
            if "co-loss" not in self.config.ablations:
                total = torch.add(total, correlation, alpha=self.config.gamma_correlation)
            if self.config.correlation_prior:
                prior = prior_loss(self.perceiver.correlation(), self.cooccurrence)
                total = total + self.config.correlation_prior * prior
                figures["correlation_prior"] = prior.detach()
        for name, value in self.own_losses(encoding).items():
            total = total + value
            figures[name] = value.detach()
        if health and perceived is not None:
            figures |= self._health(batch, encoding)
        return Losses(
            total,
            generation,
            emotion,
            correlation,
            nll.sum(),
            (batch.response != PAD).sum(dtype=torch.float32),
            correct,
            figures if health else {},
        )

    def own_losses(self, encoding: Any) -> dict[str, Tensor]:
        """Return losses that only this model has, by name: weighted, each averaged over the batch."""
        return {}

    def _health(self, batch: Any, encoding: Any) -> dict[str, Tensor]:
        return health(encoding.perceived, self.context_intensity(batch), batch.lengths)

    def score(self, batch: Any, tokens: int | None = None) -> Scores:
        """Return the negative log-likelihood of every response, for perplexities; ``tokens`` as in :meth:`loss`."""
        _, nll, rows, encoding = self.word_losses(batch, tokens, 0.0, 1.0)
        summed = nll.new_zeros(len(batch.response), dtype=torch.float64).index_add(0, rows, nll.double())
        return Scores(summed, (batch.response != PAD).sum(1), encoding)


def word_places(response: Tensor, tokens: int | None) -> Tensor:
    """Return where flattened responses [B, T] have words; with some padding at the end where ``tokens`` is more."""
    padding = (response == PAD).flatten()
    if tokens is None:
        return (~padding).nonzero().squeeze(1)
    return padding.to(torch.uint8).argsort(stable=True)[:tokens]
