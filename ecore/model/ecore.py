"""E-CORE: emotion-correlation-enhanced empathetic dialogue generation (Fu et al., EMNLP 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecore.config import ModelConfig
from ecore.data.batches import MAX_RESPONSE_WORDS, Batch, Split, context_batch
from ecore.data.vocabulary import BOS, PAD, Vocabulary
from ecore.data.word_tables import WordTables
from ecore.errors import InputError
from ecore.model.decoder import Decoded, Decoder, DecoderCache
from ecore.model.encoder import Embedding, Encoder
from ecore.model.graph_network import Correlation, EmotionAttention, FirstPass, GraphNetwork
from ecore.model.losses import Losses, correlation_loss, vocabulary_losses
from ecore.model.outputs import ECoreOutput, Encoding, Scores
from ecore.model.perceptron import Perception, Perceptron
from ecore.model.pointer import Copyable, Copying, Pointer, mixed
from ecore.model.transformer import project
from ecore_kernels import EmotionGraph, otsu

SOFT_RELEVANT = 3
"""How many emotions count as co-occurring under the soft strategy (Sec. 3.4)."""


def _shifted(batch: Batch) -> Tensor:
    """The word before each response word, [B, T]."""
    start = batch.response.new_full((len(batch.response), 1), BOS)
    return torch.cat([start, batch.response[:, :-1]], dim=1)


def _word_places(response: Tensor, tokens: int | None) -> Tensor:
    """Where the flattened response [B, T] has words; some padding at the end where ``tokens`` is over their number."""
    padding = (response == PAD).flatten()
    if tokens is None:
        return (~padding).nonzero().squeeze(1)
    return padding.to(torch.uint8).argsort(stable=True)[:tokens]


class ECore(nn.Module):
    """The model.

    Args:
        config: architecture and losses.
        vocabulary: words and emotions.
        tables: intensity and related words of every word of the vocabulary.
        embeddings: [V, G <= D] pre-trained vectors, NaN where a word has none.

    Raises:
        InputError: tables or embeddings that do not fit the vocabulary or the config.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: Vocabulary,
        tables: WordTables,
        embeddings: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        words, emotions = len(vocabulary), len(vocabulary.emotions)
        if len(tables.intensity) != words:
            raise InputError(
                f"word tables: expected {words} words as in the vocabulary, got {len(tables.intensity)}"
            )
        if embeddings is not None and embeddings.shape[1] > config.dim:
            raise InputError(
                f"embeddings: expected at most dim = {config.dim} columns, got {embeddings.shape[1]}; "
                f"a --dim of {embeddings.shape[1]} or more takes them"
            )
        if embeddings is not None and len(embeddings) != words:
            raise InputError(f"embeddings: expected {words} rows as in the vocabulary, got {len(embeddings)}")
        self.config = config
        self.vocabulary = vocabulary
        for name, value in tables._asdict().items():
            self.register_buffer(name, value.clone())
        self.register_buffer("emotion_words", torch.tensor(vocabulary.emotion_words), persistent=False)

        perceives = config.strategy != "none"
        graph = perceives and "graph" not in config.ablations
        self.embedding = Embedding(config, words, embeddings)
        self.encoder = Encoder(config)
        self.correlation = self.graph = self.perceptron = None
        if perceives:
            self.correlation = Correlation(emotions)
            self.graph = GraphNetwork(config) if graph else EmotionAttention(config)
            self.perceptron = Perceptron(config, emotions)
        self.decoder = Decoder(config, guided=graph)
        self.output = nn.Linear(config.dim, words)
        self.pointer = Pointer(config.dim) if config.copy else None
        self.start_word = nn.Linear(emotions, config.dim) if config.emotion_start else None
        if config.tie_embeddings:
            self.output.weight = self.embedding.word.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.emotion_words.device

    @property
    def tables(self) -> WordTables:
        """Intensity and related words, as they travel with the weights."""
        return WordTables(*(getattr(self, name) for name in WordTables._fields))

    # Text to batches --------------------------------------------------------------------------------------------

    def view(self, split: Split, progress: bool = True) -> Split:
        """``split`` as this model reads it: as it is."""
        return split

    def read(self, contexts: Sequence[Sequence[str]]) -> Batch:
        """A batch of raw contexts, each a list of turns, the speaker's first."""
        return context_batch(contexts, self.vocabulary, self.tables)

    # Context to encoding ----------------------------------------------------------------------------------------

    def encode(self, batch: Batch) -> Encoding:
        """Encode contexts, perceive their emotions and prepare what guides the response."""
        return self._encode(batch, *self.embedding.look_up(batch.context, batch.concepts, self.emotion_words))

    def _encode(self, batch: Batch, context: Tensor, concepts: Tensor, emotions: Tensor) -> Encoding:
        """:meth:`encode` from word vectors: the context's [B, M, D], related words' [B, C, D], emotions' [P, D]."""
        words = batch.context.shape[1]
        mask = torch.arange(words, device=batch.context.device) < batch.lengths[:, None]
        embedded = self.embedding.place(context, batch.state)
        memory_input, memory_mask = embedded, mask
        if self.config.commonsense and batch.concepts.shape[1]:
            memory_input = torch.cat([embedded, self.embedding.related(concepts)], dim=1)
            memory_mask = torch.cat([mask, batch.concepts != PAD], dim=1)
        memory = self.encoder(memory_input, memory_mask)
        copyable = None
        if self.pointer is not None:
            copyable = Copyable.of(F.pad(batch.context, (0, memory.shape[1] - words), value=PAD))
        if self.config.strategy == "none":
            return Encoding(memory, memory_mask, None, copyable=copyable)
        # Related words are left out of the mean: it stands for the context.
        mean = (memory[:, :words] * mask[..., None]).sum(1) / batch.lengths[:, None]

        correlation = self.correlation().softmax(-1)
        first: FirstPass | None = None
        graph: EmotionGraph | None = None
        if isinstance(self.graph, GraphNetwork):
            graph = EmotionGraph.from_intensity(
                self._intensity(batch), batch.lengths, self.config.thresholds, correlation
            )
            first = self.graph.perceive(embedded, emotions, graph)
            perception = self.perceptron(first.word_to_emotion, first.emotion_to_emotion, mean)
        else:
            to_emotion = self.graph(memory[:, :words], mask, emotions)
            perception = self.perceptron(to_emotion, correlation.expand(len(mean), -1, -1), mean)

        relevant = self._relevant(perception.attention)
        with torch.set_grad_enabled(torch.is_grad_enabled() and "gen-loss" not in self.config.ablations):
            guidance = self._guidance(perception, relevant, graph, first, mask, emotions)
        return Encoding(
            memory,
            memory_mask,
            guidance,
            perception.global_signal,
            perception.main,
            perception.attention,
            relevant,
            perception.gate,
            copyable,
        )

    def _intensity(self, batch: Batch) -> Tensor:
        """c of every context word, [B, M]."""
        return self.intensity[batch.context]

    def _relevant(self, attention: Tensor) -> Tensor:
        """V' (Sec. 3.4): the top three emotions, or the relevant side of Otsu's split (Eq. 14)."""
        if self.config.strategy == "hard":
            return otsu(attention.float(), self.config.max_relevant).mask
        top = attention.topk(min(SOFT_RELEVANT, attention.shape[1]), dim=1).indices
        return torch.zeros_like(attention, dtype=torch.bool).scatter(1, top, True)

    def _guidance(
        self,
        perception: Perception,
        relevant: Tensor,
        graph: EmotionGraph | None,
        first: FirstPass | None,
        mask: Tensor,
        emotions: Tensor,
    ) -> Tensor | None:
        """The node sum of the second pass over the improved graph (Eqs. 13, 14, 24), or its ablation."""
        if graph is None or first is None:
            return None
        if "co-g" in self.config.ablations:
            return emotions[perception.main.argmax(1)]
        if self.config.strategy == "soft":
            weight = perception.attention.float().softmax(-1)
            improved = EmotionGraph(
                graph.word_weight, graph.word_mask, weight, weight[:, None].expand(-1, weight.shape[1], -1)
            )
        else:
            improved = EmotionGraph(
                graph.word_weight, graph.word_mask, graph.emotion_weight, graph.correlation, relevant
            )
        return (self.graph.guide(first, improved) * mask[..., None]).sum(1)

    # Encoding to words ------------------------------------------------------------------------------------------

    def _first(self, encoding: Encoding) -> Tensor | None:
        """What stands for BOS's vector: [B, D] from the emotions' logits; None where BOS stands for itself."""
        if self.start_word is None:
            return None
        return self.start_word(
            encoding.main.detach() if "gen-loss" in self.config.ablations else encoding.main
        )

    def _decode(self, words: Tensor, encoding: Encoding) -> Decoded:
        """States [B, T, D] under teacher forcing, from the vectors of the words before each, [B, T, D]."""
        first = self._first(encoding)
        if first is not None:
            words = torch.cat([first[:, None], words[:, 1:]], dim=1)
        return self.decoder(
            self.embedding.place(words), encoding.memory, encoding.memory_mask, encoding.guidance
        )

    def forward(self, batch: Batch) -> ECoreOutput:
        """Logits of every response word given the words before it."""
        encoding = self.encode(batch)
        states, scores = self._decode(self.embedding.look_up(_shifted(batch))[0], encoding)
        logits = self.output(states)
        if self.pointer is not None:
            rows, length = logits.shape[:2]
            contexts = torch.arange(rows, device=logits.device).repeat_interleave(length)
            copying = self.pointer(
                states.flatten(0, 1), scores.flatten(0, 1), encoding.copyable.rows(contexts)
            )
            logits = mixed(logits.flatten(0, 1), copying).unflatten(0, (rows, length))
        return ECoreOutput(logits, encoding)

    def _word_losses(
        self, batch: Batch, tokens: int | None, label_smoothing: float, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Encoding]:
        """Smoothed loss, summed and scaled; plain loss of each response word [T]; its row [T]; the encoding."""
        vectors = self.embedding.look_up(batch.context, batch.concepts, self.emotion_words, _shifted(batch))
        encoding = self._encode(batch, *vectors[:3])
        # Padding is dropped before the projection to the vocabulary, which costs most of a step.
        places = _word_places(batch.response, tokens)
        rows = places // batch.response.shape[1]
        states, scores = self._decode(vectors[3], encoding)
        states = states.flatten(0, 1)[places]
        copying: Copying | None = None
        if self.pointer is not None:
            copying = self.pointer(states, scores.flatten(0, 1)[places], encoding.copyable.rows(rows))
        smoothed, nll = vocabulary_losses(
            states,
            self.output.weight,
            self.output.bias,
            batch.response.flatten()[places],
            label_smoothing,
            scale,
            copying,
        )
        return smoothed, nll, rows, encoding

    def loss(self, batch: Batch, health: bool = False, tokens: int | None = None) -> Losses:
        """The joint loss (Eq. 19) of a batch.

        Args:
            batch: B samples.
            health: add what the log wants to know of the graph.
            tokens: words of the responses, or any number over that, where the caller knows it: on a GPU
                counting them would make the host wait for the device.
        """
        generation, nll, _, encoding = self._word_losses(
            batch, tokens, self.config.label_smoothing, 1.0 / len(batch.response)
        )
        emotion = correlation = correct = generation.new_zeros(())
        total = generation
        if encoding.main is not None:
            emotion = F.cross_entropy(encoding.main.float(), batch.emotion)
            weight = self.correlation.pair_weight(self.config.eco_form)
            correlation = correlation_loss(weight, encoding.relevant)
            correct = (encoding.main.argmax(1) == batch.emotion).sum()
            total = total + self.config.gamma_emotion * emotion
            if "co-loss" not in self.config.ablations:
                total = total + self.config.gamma_correlation * correlation
        return Losses(
            total,
            generation,
            emotion,
            correlation,
            nll.sum(),
            (batch.response != PAD).sum(),
            correct,
            self._health(batch, encoding) if health and encoding.main is not None else {},
        )

    @torch.no_grad()
    def _health(self, batch: Batch, encoding: Encoding) -> dict[str, Tensor]:
        """What tells whether the graph lives; ``docs/model.md`` has the list."""
        position = torch.arange(batch.context.shape[1], device=batch.context.device)
        words = (position < batch.lengths[:, None]) & (position > 0)
        dead = words & (self._intensity(batch) == 0)
        perception = encoding.perception.float()
        normed = F.layer_norm(perception, perception.shape[1:])
        return {
            "perception_std": perception.std(),
            "perception_context": normed.var(0, correction=0).mean(),
            "dead_edges": dead.sum() / words.sum().clamp(min=1),
            "relevant": encoding.relevant.sum(1).float().mean(),
            "gate_mean": encoding.gate.float().mean(),
            "gate_std": encoding.gate.float().std(),
        }

    def score(self, batch: Batch, tokens: int | None = None) -> Scores:
        """Negative log-likelihood of every response, for perplexities; ``tokens`` as in :meth:`loss`."""
        _, nll, rows, encoding = self._word_losses(batch, tokens, 0.0, 1.0)
        summed = nll.new_zeros(len(batch.response), dtype=torch.float64).index_add(0, rows, nll.double())
        return Scores(summed, (batch.response != PAD).sum(1), encoding)

    def start(self, encoding: Encoding, max_length: int) -> DecoderCache:
        """A cache for responses of at most ``max_length`` words; the first :meth:`step` takes BOS.

        Raises:
            InputError: there are no positions for so many.
        """
        if max_length > MAX_RESPONSE_WORDS:
            raise InputError(f"max_length: expected at most {MAX_RESPONSE_WORDS}, got {max_length}")
        return self.decoder.start(
            encoding.memory,
            encoding.memory_mask,
            encoding.guidance,
            max_length,
            encoding.copyable,
            self._first(encoding),
        )

    def step(self, words: Tensor, cache: DecoderCache) -> Tensor:
        """Logits [B, V] of the next word after ``words`` [B], without dropout; the caller may change them.

        With copying they are log-probabilities.
        """
        position = self.embedding.position[cache.position]
        if cache.length == 0 and cache.first is not None:
            embedded = position + cache.first
        else:
            embedded = torch.add(position, self.embedding.word(words), alpha=self.embedding.scale)
        states, scores = self.decoder.step(embedded, cache)
        logits = project(states, self.output.weight, self.output.bias)
        if self.pointer is None:
            return logits
        copyable = cache.copyable
        if cache.width > 1:
            contexts = torch.arange(cache.contexts, device=words.device)
            copyable = copyable.rows(contexts.repeat_interleave(cache.width))
        return mixed(logits, self.pointer(states, scores, copyable))
