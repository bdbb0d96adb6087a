"""E-CORE around a GPT-2: it reads the context, and answers under the guidance of the emotion graph.

GPT-2 replaces the word embedding, the encoder and the decoder; the perceiver and the losses are those of
:class:`ecore.model.ECore`. docs/pretrained.md lists what the paper leaves open here and the decisions taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecore.config import ModelConfig
from ecore.data.batches import MAX_CONTEXT_WORDS, Split
from ecore.data.subwords.batches import SubwordBatch, SubwordSplit, TurnReader, context_batch
from ecore.data.subwords.vocabulary import OFFSET, SubwordVocabulary
from ecore.data.vocabulary import EOS, PAD, own_word
from ecore.data.word_tables import WordTables
from ecore.errors import InputError
from ecore.model.base import EmpatheticModel, WordLosses, word_places
from ecore.model.outputs import ECoreOutput
from ecore.model.packing import shifted
from ecore.model.perceiver import Context, Perceived, Perceiver

if TYPE_CHECKING:
    from transformers import GPT2Model

_IGNORED = -100
KeysValues = list[tuple[Tensor, Tensor]]


class GPT2Encoding(NamedTuple):
    """A batch of contexts, encoded and perceived; named as in :class:`ecore.model.outputs.Encoding`.

    Attributes:
        memory: [B, M - 1, H], h_X of the context without ``[CLS]``; H is GPT-2's width.
        memory_mask: [B, M - 1] bool.
        past: GPT-2's keys and values of the context, each [B, heads, M - 1, d], a pair per block.
        perceived: their emotions; None under strategy "none".
    """

    memory: Tensor
    memory_mask: Tensor
    past: KeysValues
    perceived: Perceived | None = None

    @property
    def guidance(self) -> Tensor | None:
        """The guidance of the response, [B, D]; None without a graph."""
        return None if self.perceived is None else self.perceived.guidance


class GPT2Cache:
    """The state of unfinished responses: C contexts, ``width`` responses (rows) each.

    Attributes:
        length: subwords decoded so far.
        contexts, width: C and the responses of each; those of one context lie side by side.
        past: GPT-2's keys and values, of the context and then of the response.
        mask: [rows, M - 1 + max_length] bool, where ``past`` has subwords.
        position: [rows], of the next subword.
        guidance: [rows, 1, H], what every response subword's embedding is moved by; None without a graph.
    """

    def __init__(self, encoding: GPT2Encoding, guidance: Tensor | None, max_length: int) -> None:
        self.length = 0
        self.contexts, self.width = len(encoding.memory), 1
        self.past = _dynamic_cache(encoding.past)
        self.position = encoding.memory_mask.sum(1)
        self.mask = F.pad(encoding.memory_mask, (0, max_length), value=True)
        self.guidance = guidance

    def select(self, contexts: Tensor) -> None:
        """Keep, reorder or duplicate contexts with their responses: int64 [C'] indices into the present ones."""
        rows = contexts[:, None] * self.width + torch.arange(self.width, device=contexts.device)
        self._take(rows.flatten())
        self.contexts = len(contexts)

    def branch(self, parents: Tensor) -> None:
        """Go on from other responses to the same contexts: int64 [C, width'], which of its present ones."""
        first = torch.arange(self.contexts, device=parents.device)[:, None] * self.width
        self._take((first + parents).flatten())
        self.width = parents.shape[1]

    def _take(self, rows: Tensor) -> None:
        self.past.batch_select_indices(rows)
        self.position, self.mask = self.position[rows], self.mask[rows]
        self.guidance = None if self.guidance is None else self.guidance[rows]


def _dynamic_cache(past: KeysValues):
    """A cache that starts with ``past`` and leaves it as it is."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(past):
        cache.update(keys, values, layer)
    return cache


class GPT2ECore(EmpatheticModel):
    """The model.

    Args:
        config: the graph and the losses; settings of the word-level encoder and decoder
            (:data:`ecore.config.WORD_LEVEL`) are not
            read.
        vocabulary: GPT-2's subwords, and the prepared data's emotions and words.
        tables: intensity of every word of the prepared data.
        gpt2: the backbone, without a head: its word embedding is the head.

    Raises:
        InputError: tables or GPT-2 that do not fit the vocabulary.
    """

    vocabulary: SubwordVocabulary

    emotion_share: Tensor

    def __init__(
        self, config: ModelConfig, vocabulary: SubwordVocabulary, tables: WordTables, gpt2: GPT2Model
    ) -> None:
        super().__init__(config, vocabulary, tables, len(vocabulary.words))
        if len(vocabulary) - OFFSET > gpt2.config.vocab_size:
            raise InputError(
                f"backbone: its tokenizer has {len(vocabulary) - OFFSET} tokens, its word embedding "
                f"{gpt2.config.vocab_size}"
            )
        emotion_words, share = _emotion_words(vocabulary)
        self.register_buffer("emotion_words", emotion_words, persistent=False)
        self.register_buffer("emotion_share", share, persistent=False)
        blank = vocabulary.blank(gpt2.config.vocab_size)
        self.register_buffer("blank", torch.tensor(blank, dtype=torch.int64), persistent=False)
        self._reader = TurnReader(vocabulary, tables.intensity.cpu().numpy())
        self.most_context = min(MAX_CONTEXT_WORDS, gpt2.config.n_positions // 2)
        """Subwords of a context that are read: the latest."""
        self.most_response = gpt2.config.n_positions - self.most_context
        """Subwords of a response that GPT-2 has positions for, EOS counted."""

        width = gpt2.config.n_embd
        self.gpt2 = gpt2
        self.perceiver = self.guidance_norm = self.join_guidance = None
        if config.strategy == "none":
            return
        # Normed and without a bias: a bias, as large as the embeddings, would make all nodes start the same.
        self.project_words = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.dim, bias=False))
        self.project_context = nn.Linear(width, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.perceiver = Perceiver(config, len(vocabulary.emotions))
        if "graph" not in config.ablations:
            self.guidance_norm = nn.LayerNorm(config.dim)
            self.join_guidance = nn.Linear(config.dim, width, bias=False)
            # The guidance's half of W_d (Eq. 25). From 0, so that training starts at the backbone's own answers.
            nn.init.zeros_(self.join_guidance.weight)

    # Text to batches

    def view(self, split: Split, progress: bool = True) -> SubwordSplit:
        """Return ``split`` as this model reads it: in subwords.

        Raises:
            InputError: a response does not fit GPT-2's positions.
        """
        emotions = self.vocabulary.emotions
        return SubwordSplit(split, self._reader, emotions, self.most_context, self.most_response, progress)

    def read(self, contexts: Sequence[Sequence[str]]) -> SubwordBatch:
        """Return a batch of raw contexts, each a list of turns, the speaker's first."""
        return context_batch(contexts, self._reader, self.most_context)

    def context_intensity(self, batch: SubwordBatch) -> Tensor:
        """Return c of every subword's word, [B, M]."""
        return batch.intensity

    def _tokens(self, ids: Tensor) -> Tensor:
        """The tokenizer's tokens of ids; every special one is its end-of-text token."""
        return torch.where(ids < OFFSET, self.vocabulary.eos_token, ids - OFFSET)

    # Context to encoding

    def encode_words(self, batch: SubwordBatch) -> tuple[GPT2Encoding, Context | None]:
        """Return the encoding of contexts without their emotions, and what the perceiver reads."""
        position = torch.arange(batch.context.shape[1], device=batch.context.device)  # [M]
        mask = position < batch.lengths[:, None]  # [B, M]
        tokens = self._tokens(batch.context)  # [B, M]
        # GPT-2 reads dialogues as it was trained to, without [CLS]; the graph has it, as an end-of-text token.
        read = self.gpt2(input_ids=tokens[:, 1:], attention_mask=mask[:, 1:].long(), use_cache=True)
        past = [(layer.keys, layer.values) for layer in read.past_key_values.layers]
        encoding = GPT2Encoding(read.last_hidden_state, mask[:, 1:], past)
        if self.perceiver is None:
            return encoding, None
        memory = self.project_context(read.last_hidden_state)  # [B, M - 1, D]
        mean = (memory * mask[:, 1:, None]).sum(1) / (batch.lengths[:, None] - 1)  # [B, D]
        # Eq. 1 without dialogue states: turns end with an end-of-text token.
        embedded = self.gpt2.wte(tokens) + self.gpt2.wpe((position - 1).clamp(min=0))  # [B, M, H]
        words = self.dropout(self.project_words(embedded))  # [B, M, D]
        own_words = (self.gpt2.wte(self.emotion_words) * self.emotion_share[..., None]).sum(1)  # [P, H]
        return encoding, Context(
            words,
            mask,
            batch.lengths,
            batch.intensity,
            self.project_words(own_words),
            memory,
            mask[:, 1:],
            mean,
        )

    # Encoding to words

    def _joined(self, guidance: Tensor | None) -> Tensor | None:
        """[B, 1, H], W_d's share of the node sum (Eqs. 24 and 25)."""
        if guidance is None or self.join_guidance is None or self.guidance_norm is None:
            return None
        return self.join_guidance(self.guidance_norm(guidance))[:, None]

    def _answer(self, ids: Tensor, past, mask: Tensor, position: Tensor, joined: Tensor | None) -> Tensor:
        """GPT-2's last states [B, T, H] of ids [B, T] behind ``past``, which grows by them."""
        embedded = self.gpt2.wte(self._tokens(ids))
        if joined is not None:
            embedded = embedded + joined
        return self.gpt2(
            inputs_embeds=embedded,
            past_key_values=past,
            attention_mask=mask.long(),
            position_ids=position,
            use_cache=True,
        ).last_hidden_state

    def _decode(self, batch: SubwordBatch, encoding: GPT2Encoding) -> Tensor:
        """GPT-2's last states [B, T, H] under teacher forcing."""
        ids = shifted(batch.response)
        length = ids.shape[1]
        mask = F.pad(encoding.memory_mask, (0, length), value=True)
        position = encoding.memory_mask.sum(1, keepdim=True) + torch.arange(length, device=ids.device)
        past = _dynamic_cache(encoding.past)
        return self._answer(ids, past, mask, position, self._joined(encoding.guidance))

    def output(self, states: Tensor) -> Tensor:
        """Logits [..., V] of the tokenizer's tokens."""
        return F.linear(states, self.gpt2.wte.weight)

    def _logits(self, states: Tensor) -> Tensor:
        """Logits [..., OFFSET + V] of ids: minus infinity for the special ones, but for EOS."""
        logits = F.pad(self.output(states), (OFFSET, 0), value=-torch.inf)
        eos = OFFSET + self.vocabulary.eos_token
        logits[..., EOS] = logits[..., eos]
        logits[..., eos] = -torch.inf
        return logits

    def forward(self, batch: SubwordBatch) -> ECoreOutput:
        """Logits of every response subword given those before it."""
        encoding = self.encode(batch)
        return ECoreOutput(self._logits(self._decode(batch, encoding)), encoding)

    def word_losses(
        self, batch: SubwordBatch, tokens: int | None, label_smoothing: float, scale: float
    ) -> WordLosses:
        """Return the losses of every response subword."""
        encoding = self.encode(batch)
        places = word_places(batch.response, tokens)
        logits = self.output(self._decode(batch, encoding).flatten(0, 1)[places]).float()
        ids = batch.response.flatten()[places]
        # Not PAD, which is 0: so is one of the tokenizer's tokens.
        targets = torch.where(ids == PAD, _IGNORED, self._tokens(ids))
        smoothed = F.cross_entropy(
            logits, targets, ignore_index=_IGNORED, reduction="sum", label_smoothing=label_smoothing
        )
        nll = F.cross_entropy(logits.detach(), targets, ignore_index=_IGNORED, reduction="none")
        return WordLosses(scale * smoothed, nll, places // batch.response.shape[1], encoding)

    def start(self, encoding: GPT2Encoding, max_length: int) -> GPT2Cache:
        """A cache for responses of at most ``max_length`` subwords; the first :meth:`step` takes BOS.

        Raises:
            InputError: GPT-2 has no positions for so many.
        """
        self.check_length(max_length)
        return GPT2Cache(encoding, self._joined(encoding.guidance), max_length)

    def step(self, words: Tensor, cache: GPT2Cache) -> Tensor:
        """Logits [B, OFFSET + V] of the next subword after ``words`` [B]."""
        cache.length += 1
        mask = cache.mask[:, : cache.past.get_seq_length() + 1]
        states = self._answer(words[:, None], cache.past, mask, cache.position[:, None], cache.guidance)
        cache.position = cache.position + 1
        return self._logits(states[:, 0])


def own_words(vocabulary: SubwordVocabulary) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Each emotion's own word as it is written inside a sentence: see :meth:`SubwordVocabulary.encode`."""
    return vocabulary.encode([" " + own_word(emotion) for emotion in vocabulary.emotions])


def _emotion_words(vocabulary: SubwordVocabulary) -> tuple[Tensor, Tensor]:
    """Tokens [P, W] of each emotion's own word, and the share of each in their mean."""
    spellings = own_words(vocabulary)
    width = max(len(ids) for ids, _ in spellings)
    tokens = torch.zeros(len(spellings), width, dtype=torch.int64)
    share = torch.zeros(len(spellings), width)
    for row, (ids, _) in enumerate(spellings):
        tokens[row, : len(ids)] = torch.tensor(ids) - OFFSET
        share[row, : len(ids)] = 1.0 / len(ids)
    return tokens, share
