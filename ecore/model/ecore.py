"""E-CORE: emotion-correlation-enhanced empathetic dialogue generation (Fu et al., EMNLP 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecore.config import ModelConfig
from ecore.data.batches import Batch, Split, context_batch
from ecore.data.vocabulary import PAD, Vocabulary
from ecore.data.word_tables import WordTables
from ecore.errors import InputError
from ecore.model.base import EmpatheticModel, WordLosses
from ecore.model.decoder import Decoded, Decoder, DecoderCache
from ecore.model.encoder import Embedding, Encoder
from ecore.model.losses import vocabulary_losses
from ecore.model.outputs import ECoreOutput, Encoding
from ecore.model.packing import Packing, ResponseRows, layout_of, shifted
from ecore.model.perceiver import Context, EmotionHead, Perceiver
from ecore.model.pointer import Copyable, Copying, Pointer, mixed
from ecore.model.quantized import QuantizedWeights
from ecore.model.transformer import FEWER_ROWS, project
from ecore_kernels import QuantizedLinear, native, quantized_linear_argmax


class ECore(EmpatheticModel):
    """The model, words in and words out.

    Args:
        config: architecture and losses.
        vocabulary: words and emotions.
        tables: intensity and related words of every word of the vocabulary.
        embeddings: [V, G <= D] pre-trained vectors, NaN where a word has none.

    Raises:
        InputError: tables or embeddings that do not fit the vocabulary or the config.
    """

    vocabulary: Vocabulary
    intensity: Tensor

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: Vocabulary,
        tables: WordTables,
        embeddings: np.ndarray | None = None,
    ) -> None:
        vocab_size, emotion_count = len(vocabulary), len(vocabulary.emotions)
        super().__init__(config, vocabulary, tables, vocab_size)
        if embeddings is not None:
            _check_embeddings(embeddings, config.dim, vocab_size)
        self.register_buffer("emotion_words", torch.tensor(vocabulary.emotion_words), persistent=False)
        graph = config.strategy != "none"
        self.embedding = Embedding(config, vocab_size, embeddings)
        self.encoder = Encoder(config)
        self.perceiver = None
        if config.perceives:
            self.perceiver = (
                Perceiver(config, emotion_count) if graph else EmotionHead(config.dim, emotion_count)
            )
        self.emotion_table: nn.Parameter | None = None
        if graph and config.own_emotions:
            self.emotion_table = nn.Parameter(nn.init.xavier_uniform_(torch.empty(emotion_count, config.dim)))
        self.decoder = Decoder(config, guided=graph and "graph" not in config.ablations)
        self.output = nn.Linear(config.dim, vocab_size)
        self.pointer = Pointer(config.dim) if config.copy else None
        self.start_word = nn.Linear(emotion_count, config.dim) if config.emotion_start else None
        self.quantized: QuantizedWeights | None = None
        if config.tie_embeddings:
            self.output.weight = self.embedding.word.weight

    def _quantize(self, dtype: torch.dtype | None) -> None:
        if dtype is not None and self.device.type != "cpu":
            raise InputError(
                f"weights: expected float32 on {self.device.type}; int8 and bfloat16 are for CPUs, where a word takes "
                "as long as reading the weights"
            )
        self.quantized = None if dtype is None else QuantizedWeights(self.decoder, self.output, dtype)

    # Text to batches

    def view(self, split: Split, progress: bool = True) -> Split:
        """Return ``split`` as this model reads it, which is as it is."""
        return split

    def read(self, contexts: Sequence[Sequence[str]]) -> Batch:
        """Return a batch of raw contexts, each a list of turns, the speaker's first."""
        return context_batch(contexts, self.vocabulary, self.tables)

    def context_intensity(self, batch: Batch) -> Tensor:
        """Return c of every context word, [B, M]."""
        return self.intensity[batch.context]

    # Context to encoding

    def encode_words(self, batch: Batch) -> tuple[Encoding, Context | None]:
        """Return the encoding of contexts without their emotions, and what the perceiver reads."""
        words = self._memory_words(batch)  # [B, S]
        return self._encode_words(batch, words, *self.embedding.look_up(words, self.emotion_words))

    def _memory_words(self, batch: Batch) -> Tensor:
        """Return what the encoder reads, [B, S]: contexts, and related words behind them."""
        if self.config.commonsense and batch.concepts.shape[1]:
            return torch.cat([batch.context, batch.concepts], dim=1)
        return batch.context

    def _encode_words(
        self, batch: Batch, words: Tensor, vectors: Tensor, emotions: Tensor
    ) -> tuple[Encoding, Context | None]:
        """Do it from what the encoder reads [B, S], its words' vectors [B, S, D], and the emotions' [P, D]."""
        context_length = batch.context.shape[1]
        memory_mask = words != PAD  # [B, S]
        mask = memory_mask[:, :context_length]  # [B, M]
        memory_input = self.embedding.with_related(vectors, batch.state)  # [B, S, D]
        layout = layout_of(memory_mask)
        memory, embedded = self.encoder(memory_input, memory_mask, layout)  # [B, S, D]
        context, embedded = vectors[:, :context_length], embedded[:, :context_length]  # [B, M, D]
        copyable: Copyable | None = None
        if self.pointer is not None:
            padding = (0, memory.shape[1] - context_length)
            copyable = Copyable.of(F.pad(batch.context, padding, value=PAD))
        encoding = Encoding(memory, memory_mask, copyable=copyable, layout=layout)
        if self.perceiver is None:
            return encoding, None
        # Related words are left out: with them it would not be the context's.
        mean = (memory[:, :context_length] * mask[..., None]).sum(1) / batch.lengths[:, None]  # [B, D]
        if self.emotion_table is not None:
            emotions = self.emotion_table
        return encoding, Context(
            context if self.config.released else embedded,
            mask,
            batch.lengths,
            self.context_intensity(batch),
            emotions,
            memory[:, :context_length],
            mask,
            mean,
        )

    # Encoding to words

    def _bos_embedding(self, encoding: Encoding) -> Tensor | None:
        """Return what replaces BOS's vector, [B, D] from the emotions' logits; None where BOS has its own."""
        if self.start_word is None or encoding.perceived is None:
            return None
        logits = encoding.perceived.main_logits
        return self.start_word(logits.detach() if "gen-loss" in self.config.ablations else logits)

    def _decode(self, said: Tensor, encoding: Encoding, packing: Packing | None = None) -> Decoded:
        """Return states under teacher forcing.

        Args:
            said: [B, T, D], vectors of the words before each; with ``packing`` its rows, [R, D].

        Returns:
            States like ``said``.
        """
        bos_embedding = self._bos_embedding(encoding)  # [B, D]
        columns = None if packing is None else packing.columns
        if bos_embedding is not None:
            if packing is None:
                said = torch.cat([bos_embedding[:, None], said[:, 1:]], dim=1)
            else:
                said = torch.where(packing.columns[:, None] == 0, packing.spread(bos_embedding), said)
        embedded = self.embedding.place(said, columns=columns)
        return self.decoder(
            embedded, encoding.memory, encoding.memory_mask, encoding.guidance, packing, encoding.layout
        )

    def forward(self, batch: Batch) -> ECoreOutput:
        """Return logits of every response word given the words before it."""
        encoding = self.encode(batch)
        said = self.embedding.look_up(shifted(batch.response))[0]  # [B, T, D]
        return ECoreOutput(self._logits(self._decode(said, encoding), encoding), encoding)

    def _logits(self, decoded: Decoded, encoding: Encoding) -> Tensor:
        """Return logits [B, T, V] of states [B, T, D] and scores [B, T, S]; with copying log-probabilities."""
        states, scores = decoded
        logits = self.output(states)
        copyable = encoding.copyable
        if self.pointer is None or copyable is None or scores is None:
            return logits
        count, length = logits.shape[:2]
        contexts = torch.arange(count, device=logits.device).repeat_interleave(length)  # [B T]
        copying = self.pointer(states.flatten(0, 1), scores.flatten(0, 1), copyable.rows(contexts))
        return mixed(logits.flatten(0, 1), copying).unflatten(0, (count, length))

    def word_losses(
        self, batch: Batch, tokens: int | None, label_smoothing: float, scale: float
    ) -> WordLosses:
        """Return the losses of every response word."""
        rows = ResponseRows.of(batch.response, tokens)
        words = self._memory_words(batch)  # [B, S]
        # [B, S, D], [P, D] and [B, T, D], or [R, D] of packed rows:
        vectors, emotions, said = self.embedding.look_up(words, self.emotion_words, rows.before)
        encoding = self.perceive(*self._encode_words(batch, words, vectors, emotions))
        decoded, copying = self._decode_rows(said, encoding, rows)
        weight, bias = self.output.weight, self.output.bias
        smoothed, nll = vocabulary_losses(
            decoded.states, weight, bias, rows.targets, label_smoothing, scale, copying
        )
        return WordLosses(smoothed, nll, rows.contexts, encoding)

    def _decode_rows(
        self, said: Tensor, encoding: Encoding, rows: ResponseRows
    ) -> tuple[Decoded, Copying | None]:
        """Return states [R, D] and scores [R, S] under teacher forcing, and the inputs of copying.

        Args:
            said: vectors of the words before each, ``rows.before``.
        """
        states, scores = self._decode(said, encoding, rows.packing)
        if rows.packing is None:
            states = rows.layout.pack(states)
            scores = None if scores is None else rows.layout.pack(scores)
        copying: Copying | None = None
        copyable = encoding.copyable
        if self.pointer is not None and copyable is not None and scores is not None:
            copying = self.pointer(states, scores, copyable.rows(rows.contexts))
        return Decoded(states, scores), copying

    def start(self, encoding: Encoding, max_length: int) -> DecoderCache:
        """Return a cache for responses of at most ``max_length`` words; the first :meth:`step` takes BOS.

        Raises:
            InputError: there are no positions for so many.
        """
        self.check_length(max_length)
        weights, output = (None, self._output_of_few(len(encoding.memory)))
        if self.quantized is not None:
            weights, output = self.quantized.present()
        return self.decoder.start(
            encoding.memory,
            encoding.memory_mask,
            encoding.guidance,
            max_length,
            encoding.copyable,
            self._bos_embedding(encoding),
            weights,
            output,
        )

    def _output_of_few(self, rows: int) -> QuantizedLinear | None:
        """Return the output layer for ``quantized_linear_argmax`` in float32; None except for few rows on a CPU."""
        weight, bias = self.output.weight, self.output.bias
        if not (
            weight.is_cpu and weight.dtype is torch.float32 and rows <= FEWER_ROWS and native.available()
        ):
            return None
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        return QuantizedLinear(weight.detach(), None, bias.detach())

    def _next(self, words: Tensor, cache: DecoderCache) -> Decoded:
        """Decode ``words`` [B], without dropout: states [B, D] of the next."""
        position = self.embedding.position[cache.position]
        if cache.length == 0 and cache.bos_embedding is not None:
            embedded = position + cache.bos_embedding
        else:
            embedded = torch.add(position, self.embedding.word(words), alpha=self.embedding.scale)
        return self.decoder.step(embedded, cache)

    def step(self, words: Tensor, cache: DecoderCache) -> Tensor:
        """Return logits [B, V] of the next word after ``words`` [B], without dropout; the caller may change them.

        With copying they are log-probabilities.
        """
        states, scores = self._next(words, cache)  # [B, D], [B, S]
        logits = project(states, cache.output or self.output.weight, self.output.bias)  # [B, V]
        copyable = cache.copyable
        if self.pointer is None or copyable is None:
            return logits
        if cache.width > 1:
            contexts = torch.arange(cache.contexts, device=words.device)
            copyable = copyable.rows(contexts.repeat_interleave(cache.width))
        return mixed(logits, self.pointer(states, scores, copyable))

    def step_argmax(self, words: Tensor, cache: DecoderCache, forbidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the likeliest next word after ``words`` [B] and its logit, [B] each, where the cache ``chooses``.

        The logits of the vocabulary are never written. ``forbidden`` [B, F]: words that may not come. The logit is NaN
        where one of the row's is not finite.
        """
        assert cache.output is not None  # it chooses
        return quantized_linear_argmax(self._next(words, cache).states, cache.output, forbidden)


def _check_embeddings(embeddings: np.ndarray, dim: int, vocab_size: int) -> None:
    if embeddings.shape[1] > dim:
        raise InputError(
            f"embeddings: expected at most dim = {dim} columns, got {embeddings.shape[1]}; "
            f"a --dim of {embeddings.shape[1]} or more takes them"
        )
    if len(embeddings) != vocab_size:
        raise InputError(
            f"embeddings: expected {vocab_size} rows as in the vocabulary, got {len(embeddings)}"
        )
