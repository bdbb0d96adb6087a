"""A model that answers: loaded from a folder, asked, and saved."""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from ecore import hub, pretrained
from ecore.data.batches import MAX_CONTEXT_WORDS
from ecore.data.dialogues import Dialogue, is_dialogue, read_dialogue
from ecore.data.text import tokenize
from ecore.errors import InputError
from ecore.generation.decoding import Decoding
from ecore.generation.search import Watch, generate
from ecore.generation.word_stream import WordStream
from ecore.model.base import EmpatheticModel
from ecore.model.edges import GraphEdges, graph_edges, has_graph
from ecore.model.outputs import expect_finite
from ecore.model.perceiver import Perceived, Perceiver

BATCH = 64
"""Dialogues that are answered or perceived at once."""
_MODES = threading.Lock()
"""Held while a model changes between train and eval mode."""


class Reply(str):
    """An answer, with the emotions perceived in what it answers to.

    Attributes:
        emotions: (name, probability) by falling probability: Softmax(h^m), Eq. 10. Empty where the model perceives
            none.
        relevant: names of the co-occurring emotions V', by falling attention h_emo; likewise.
        context_length: words of the context that were read (subwords with a backbone).
        length: words of the answer, likewise.
        complete: whether the answer ended by itself, and not at ``max_length``.
    """

    emotions: list[tuple[str, float]]
    relevant: list[str]
    context_length: int
    length: int
    complete: bool


@dataclass(frozen=True)
class Perception:
    """The emotions perceived in one dialogue, and the graph that they come from; M words, P emotions.

    Attributes:
        emotions: (name, probability) by falling probability: Softmax(h^m), Eq. 10.
        attention: (name, share) by falling share: Softmax(h_emo), by which the soft strategy guides (Eq. 13).
        relevant: names of the co-occurring emotions V', by falling share; the hard strategy guides by them alone.
        words: M, the graph's word nodes, ``[CLS]`` first; subwords with a backbone.
        names: P, the emotions in the order of the tensors below, which are None for a model without a graph.
        word_edges: [M, P], what each word receives from each emotion, summed over resolutions.
        emotion_edges: [P, P], weights by which the emotions' signals are aggregated: row i receives from column j.
        before: [P], the sum of ``word_edges`` over words.
        after: [P], h^g = ``emotion_edges`` ``before`` (Eq. 8).
        perceived_before: [P], Softmax(h^m) were ``before`` in h^g's place.
    """

    emotions: list[tuple[str, float]]
    attention: list[tuple[str, float]]
    relevant: list[str]
    words: tuple[str, ...]
    names: tuple[str, ...]
    word_edges: Tensor | None = None
    emotion_edges: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None
    perceived_before: Tensor | None = None


class ECore:
    """A model with what it takes to answer.

    Attributes:
        model: the module, of :mod:`ecore.model`; on a backbone too.
        source: the folder that it was loaded from.
    """

    def __init__(self, model: EmpatheticModel) -> None:
        self.model = model
        self.source: Path | None = None
        self._answering, self._train_after = 0, False

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, which: str = "best", device: str | torch.device | None = None
    ) -> ECore:
        """Load a model from a run's folder or from :meth:`save_pretrained`'s, ready to answer (in eval mode).

        Args:
            folder: the folder; or as text ``user/name``, where no such folder is, a repository on the Hugging Face hub.
            which: "best" (by validation perplexity; the last where there was no validation) or "last".
            device: where to put it; None means CPU.

        Raises:
            InputError: something in the folder is missing, damaged or does not fit together.
        """
        source = Path(folder)
        if isinstance(folder, str) and not source.exists() and hub.is_name(folder):
            source = hub.download(folder)
        model = cls(pretrained.load(source, which, device or "cpu"))
        model.source = source
        return model

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write configuration, vocabulary and weights to ``folder``, for :meth:`from_pretrained`.

        Args:
            dtype: of the weights in the file; torch.bfloat16 or torch.float16 halve it, None leaves theirs. Loading
                makes float32 of them.

        Raises:
            InputError: no folder can be there, it is a run's, whose settings would be lost, or ``dtype`` cannot hold a
                weight.
        """
        pretrained.save(self.model, Path(folder), dtype)

    def push_to_hub(self, name: str, private: bool = False) -> str:
        """Put the model, with a card made from its run, on the Hugging Face hub, and return its address.

        The account that is logged in there (`hf auth login`, or HF_TOKEN) uploads. Weights go as safetensors alone.

        Args:
            name: ``user/name``.
            private: of a new repository, whether it is private.

        Raises:
            InputError: the hub refuses it or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.save_pretrained(folder)
            text = hub.card(self.model.config, self.source)
            (folder / "README.md").write_text(text.replace("USER/NAME", name), encoding="utf-8")
            return hub.upload(folder, name, private)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Keep the model in eval mode: the first thread puts it there, the last one puts it back."""
        with _MODES:
            if (
                self._answering == 0 and self.model.training
            ):  # going through all modules takes as long as some words
                self.model.eval()
                self._train_after = True
            self._answering += 1
        try:
            yield
        finally:
            with _MODES:
                self._answering -= 1
                if self._answering == 0 and self._train_after:
                    self.model.train()
                    self._train_after = False

    @overload
    def respond(self, dialogue: Dialogue, **decoding: Any) -> Reply: ...

    @overload
    def respond(self, dialogue: Sequence[Dialogue], **decoding: Any) -> list[Reply]: ...

    def respond(self, dialogue: Any, **decoding: Any) -> Reply | list[Reply]:
        """Answer a dialogue, or each of a list. Several threads may ask at once, in train or eval mode.

        Args:
            dialogue: one text; or a list of turns, the speaker first, then listener and speaker in turn; or a list of
                messages ``{"role": "user", "content": ...}``; or a list of dialogues that are lists themselves.
            **decoding: fields of :class:`ecore.generation.decoding.Decoding`, e.g. ``method="beam"``; default greedy.

        Returns:
            The answer; for a list of dialogues, the list of answers.

        Raises:
            InputError: no turn, an empty turn, a decoding option out of range, or values of the model that are not
                finite.
        """
        settings = self._settings(decoding)
        if is_dialogue(dialogue):
            return self.answer([read_dialogue(dialogue, "respond")], settings)[0]
        return self.answer(_dialogues(dialogue, "respond", dialogue_expected=True), settings)

    def stream(self, dialogue: Dialogue, **decoding: Any) -> Generator[str, None, Reply]:
        """Answer one dialogue word by word.

        The words joined are the answer: each has the space before it. A beam search knows its words only at its end.
        Whoever stops early (``close``, or a loop left) stops the model.

        Args:
            dialogue, **decoding: as for :meth:`respond`.

        Returns:
            An iterator over words; as a generator it returns the :class:`Reply`.

        Raises:
            InputError: as for :meth:`respond`.
        """
        return self._stream(read_dialogue(dialogue, "stream"), self._settings(decoding))

    def _settings(self, decoding: dict[str, Any]) -> Decoding:
        """Return the decoding of ``decoding``, checked against what the model can do."""
        settings = Decoding.of(decoding)
        self.model.check_length(settings.max_length)
        return settings

    def _stream(self, turns: list[str], settings: Decoding) -> Generator[str, None, Reply]:
        heard: queue.SimpleQueue[tuple[list[str], Reply | BaseException | None]] = queue.SimpleQueue()
        left = threading.Event()
        words = WordStream(self.model.vocabulary)

        def watch(rows: list[int], ids: list[int]) -> Collection[int]:
            for word in ids:
                heard.put((words.add(word), None))
            return rows if left.is_set() else ()

        def work() -> None:
            try:
                reply = self.answer([turns], settings, watch)[0]
                heard.put((words.rest(reply), reply))
            except BaseException as error:  # raised where the words are waited for
                heard.put(([], error))

        thread = threading.Thread(target=work, name="ecore stream", daemon=True)
        thread.start()
        try:
            while True:
                new_words, end = heard.get()
                yield from new_words
                if isinstance(end, BaseException):
                    raise end
                if end is not None:
                    return end
        finally:
            left.set()
            thread.join()

    @torch.no_grad()
    def answer(
        self, contexts: Sequence[Sequence[str]], decoding: Decoding, watch: Watch | None = None
    ) -> list[Reply]:
        """Answer lists of turns, :data:`BATCH` at a time; :meth:`respond` reads other forms.

        Args:
            contexts: turns of each dialogue.
            decoding: for all.
            watch: see :func:`ecore.generation.search.generate`; its rows count through all ``contexts``.

        Raises:
            InputError: values of the model that are not finite.
        """
        replies: list[Reply] = []
        with self._evaluating():
            for begin in range(0, len(contexts), BATCH):
                part = [list(turns) for turns in contexts[begin : begin + BATCH]]
                replies += self._answer_batch(part, decoding, _shifted(watch, begin))
        return replies

    def _answer_batch(
        self, contexts: list[list[str]], decoding: Decoding, watch: Watch | None
    ) -> list[Reply]:
        model = self.model
        batch = model.read(contexts).to(model.device)
        encoding = model.encode(batch)
        answers = generate(model, batch, decoding, encoding, watch)
        if encoding.perceived is None:
            emotions = [Emotions([], [], []) for _ in contexts]
        else:
            emotions = _emotions(encoding.perceived, model.vocabulary.emotions)
        replies = []
        for words, read, perceived in zip(answers, batch.lengths.tolist(), emotions, strict=True):
            reply = Reply(model.vocabulary.text(words))
            reply.emotions, reply.relevant = perceived.emotions, perceived.relevant
            reply.context_length, reply.length = read - 1, len(words)  # [CLS] is no word
            reply.complete = len(words) < decoding.max_length
            replies.append(reply)
        return replies

    @overload
    def perceive(self, texts: str) -> Perception: ...

    @overload
    def perceive(self, texts: Sequence[Any]) -> list[Perception] | Perception: ...

    def perceive(self, texts: Any) -> Perception | list[Perception]:
        """Perceive emotions without answering. Several threads may ask at once.

        Args:
            texts: one text; or a list, each item of which is a text or a dialogue (a list of turns or of messages). A
                list of messages is one dialogue.

        Returns:
            What is perceived in the text or dialogue; for a list, a list.

        Raises:
            InputError: as for :meth:`respond`; or the model perceives no emotions.
        """
        # Texts in a list are a list of texts; messages in a list are one dialogue.
        alone = isinstance(texts, str) or (is_dialogue(texts) and not isinstance(texts[0], str))
        contexts = [read_dialogue(texts, "perceive")] if alone else _dialogues(texts, "perceive")
        perceptions = self.perceive_contexts(contexts)
        return perceptions[0] if alone else perceptions

    @torch.no_grad()
    def perceive_contexts(self, contexts: Sequence[Sequence[str]]) -> list[Perception]:
        """Perceive the emotions of lists of turns, :data:`BATCH` at a time; :meth:`perceive` reads other forms.

        Raises:
            InputError: the model perceives no emotions.
        """
        if self.model.perceiver is None:
            raise InputError("perceive: the model perceives no emotions (--strategy none)")
        perceptions: list[Perception] = []
        with self._evaluating():
            for begin in range(0, len(contexts), BATCH):
                perceptions += self._perceive_batch(
                    [list(turns) for turns in contexts[begin : begin + BATCH]]
                )
        return perceptions

    def _perceive_batch(self, contexts: list[list[str]]) -> list[Perception]:
        model, perceiver = self.model, self.model.perceiver
        batch = model.read(contexts).to(model.device)
        _, context = model.encode_words(batch)
        assert context is not None  # a model with a perceiver gives it what to read
        assert perceiver is not None
        perceived = perceiver(context)
        edges: GraphEdges | None = None
        if isinstance(perceiver, Perceiver) and has_graph(model):
            edges = GraphEdges(*(t.float().cpu() for t in graph_edges(perceiver, context, perceived)))
        names = tuple(model.vocabulary.emotions)
        perceptions = []
        for row, (turns, emotions) in enumerate(zip(contexts, _emotions(perceived, names), strict=True)):
            length = int(batch.lengths[row])
            words = self._words(turns, batch.context[row, 1:length])
            tensors = () if edges is None else (edges.word_edges[row, :length], *(t[row] for t in edges[1:]))
            perceptions.append(Perception(*emotions, ("[CLS]", *words), names, *tensors))
        return perceptions

    def _words(self, turns: list[str], ids: Tensor) -> list[str]:
        """Return the words that ``ids`` stand for, as written where the vocabulary does not have them."""
        if self.model.config.backbone is not None:
            return [self.model.vocabulary.piece(i) for i in ids.tolist()]
        return [word for turn in turns for word in tokenize(turn)][-MAX_CONTEXT_WORDS:]

    def to(self, device: str | torch.device) -> ECore:
        """Move the model to ``device``; returns itself."""
        self.model.to(device)
        return self

    def quantize(self, weights: str = "int8") -> ECore:
        """Answer with the decoder's and the output layer's weights in few bits, on a CPU; returns itself.

        The model keeps its own weights too: perceptions, perplexities and saved files do not change. When the model's
        weights change, those of few bits are made again.

        Args:
            weights: "int8" (a scale an output), "bfloat16", or "float32" for the model's own again.

        Raises:
            InputError: another name; or not float32, and the model is on a GPU or has a pre-trained backbone.
        """
        self.model.quantize(weights)
        return self


def _dialogues(values: Any, where: str, dialogue_expected: bool = False) -> list[list[str]]:
    """Return the turns of each of a list of dialogues.

    Raises:
        InputError: it is no list, or a dialogue in it is none.
    """
    if not isinstance(values, Sequence) or isinstance(values, bytes | bytearray) or not values:
        wanted = "a text, a list of turns or messages with at least one" if dialogue_expected else "a text"
        raise InputError(f"{where}: expected {wanted}, or a list of dialogues")
    return [read_dialogue(value, f"{where}: dialogue {i}") for i, value in enumerate(values, start=1)]


def _shifted(watch: Watch | None, begin: int) -> Watch | None:
    """Return ``watch`` for a batch whose row 0 is its row ``begin``."""
    if watch is None or begin == 0:
        return watch

    def shifted(rows: list[int], words: list[int]) -> list[int]:
        return [row - begin for row in watch([row + begin for row in rows], words)]

    return shifted


class Emotions(NamedTuple):
    """The first fields of :class:`Perception`."""

    emotions: list[tuple[str, float]]
    attention: list[tuple[str, float]]
    relevant: list[str]


def _emotions(perceived: Perceived, names: Sequence[str]) -> list[Emotions]:
    """Return the emotions of every context."""
    expect_finite(perceived.main_logits, "emotions perceived")
    expect_finite(perceived.emotion_attention, "emotions perceived")
    # As lists, because every look at an element would wait for a GPU.
    probabilities, attentions = (
        logits.float().softmax(-1).tolist() for logits in (perceived.main_logits, perceived.emotion_attention)
    )
    relevant, by_name = perceived.relevant.tolist(), range(len(names))
    found = []
    for row, (probability, attention) in enumerate(zip(probabilities, attentions, strict=True)):
        by_probability = sorted(by_name, key=probability.__getitem__, reverse=True)
        by_attention = sorted(by_name, key=attention.__getitem__, reverse=True)
        found.append(
            Emotions(
                [(names[i], probability[i]) for i in by_probability],
                [(names[i], attention[i]) for i in by_attention],
                [names[i] for i in by_attention if relevant[row][i]],
            )
        )
    return found
