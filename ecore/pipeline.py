"""A model that answers: loaded from a folder, asked, and saved."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ecore.errors import InputError
from ecore.generation.decoding import Decoding
from ecore.generation.search import generate
from ecore.model import pretrained
from ecore.model.base import EmpatheticModel
from ecore.model.outputs import expect_finite

_MODES = threading.Lock()
"""Held while a model changes between train and eval mode."""


class Reply(str):
    """An answer, with the emotions perceived in what it answers to.

    Attributes:
        emotions: (name, probability) by falling probability: Softmax(h^m), Eq. 10. Empty where the model perceives
            none.
        relevant: names of the co-occurring emotions V', by falling attention h_emo; likewise.
    """

    emotions: list[tuple[str, float]]
    relevant: list[str]


class ECore:
    """A model with what it takes to answer.

    Attributes:
        model: the module, of :mod:`ecore.model`; on a backbone too.
    """

    def __init__(self, model: EmpatheticModel) -> None:
        self.model = model
        self._answering, self._train_after = 0, False

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, which: str = "best", device: str | torch.device | None = None
    ) -> ECore:
        """Load a model from a run's folder or from :meth:`save_pretrained`'s, ready to answer (in eval mode).

        Args:
            folder: the folder.
            which: "best" (by validation perplexity; the last where there was no validation) or "last".
            device: where to put it; None means CPU.

        Raises:
            InputError: something in the folder is missing, damaged or does not fit together.
        """
        return cls(pretrained.load(Path(folder), which, device or "cpu"))

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

    @torch.no_grad()
    def respond(self, turns: Sequence[str], **decoding: Any) -> Reply:
        """Answer a dialogue. Several threads may ask at once, whether the model is in train or in eval mode.

        Args:
            turns: what was said so far, the speaker first, then listener and speaker in turn.
            **decoding: fields of :class:`ecore.generation.decoding.Decoding`, e.g. ``method="beam"``; default greedy.

        Raises:
            InputError: no turn, an empty turn, a decoding option out of range, or values of the model that are not
                finite.
        """
        if isinstance(turns, str) or not turns:
            raise InputError("respond: expected a list of turns with at least one")
        for i, turn in enumerate(turns):
            if not turn.strip():
                raise InputError(f"respond: turn {i + 1} is empty")
        model, settings = self.model, Decoding(**decoding)
        batch = model.read([list(turns)]).to(model.device)
        with self._evaluating():
            encoding = model.encode(batch)
            words = generate(model, batch, settings, encoding)[0]
        reply = Reply(model.vocabulary.text(words))
        reply.emotions, reply.relevant = [], []
        perceived = encoding.perceived
        if perceived is None:
            return reply
        # As lists, because every look at an element would wait for a GPU.
        expect_finite(perceived.main_logits, "emotions perceived")
        probability = perceived.main_logits[0].float().softmax(-1)
        names, shares = model.vocabulary.emotions, probability.tolist()
        reply.emotions = [(names[i], shares[i]) for i in probability.argsort(descending=True).tolist()]
        relevant = perceived.relevant[0].tolist()
        ranked = perceived.emotion_attention[0].argsort(descending=True).tolist()
        reply.relevant = [names[i] for i in ranked if relevant[i]]
        return reply
