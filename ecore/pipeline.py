"""A model that answers: loaded from a folder, asked, and saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ecore.errors import InputError
from ecore.generation.decoding import Decoding
from ecore.generation.search import generate
from ecore.model import pretrained
from ecore.model.base import EmpatheticModel


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

    def save_pretrained(self, folder: str | Path) -> None:
        """Write configuration, vocabulary and weights to ``folder``, for :meth:`from_pretrained`."""
        pretrained.save(self.model, Path(folder))

    @torch.no_grad()
    def respond(self, turns: Sequence[str], **decoding: Any) -> Reply:
        """Answer a dialogue.

        Args:
            turns: what was said so far, the speaker first, then listener and speaker in turn.
            **decoding: fields of :class:`ecore.generation.decoding.Decoding`, e.g. ``method="beam"``; default greedy.

        Raises:
            InputError: no turn, an empty turn, or a decoding option out of range.
        """
        if isinstance(turns, str) or not turns:
            raise InputError("respond: expected a list of turns with at least one")
        for i, turn in enumerate(turns):
            if not turn.strip():
                raise InputError(f"respond: turn {i + 1} is empty")
        model, settings = self.model, Decoding(**decoding)
        batch = model.read([list(turns)]).to(model.device)
        training = model.training
        if training:  # going through all modules takes as long as some words
            model.eval()
        try:
            encoding = model.encode(batch)
            words = generate(model, batch, settings, encoding)[0]
        finally:
            if training:
                model.train()
        reply = Reply(model.vocabulary.text(words))
        reply.emotions, reply.relevant = [], []
        perceived = encoding.perceived
        if perceived is None:
            return reply
        # As lists, because every look at an element would wait for a GPU.
        probability = perceived.main_logits[0].float().softmax(-1)
        names, shares = model.vocabulary.emotions, probability.tolist()
        reply.emotions = [(names[i], shares[i]) for i in probability.argsort(descending=True).tolist()]
        relevant = perceived.relevant[0].tolist()
        ranked = perceived.emotion_attention[0].argsort(descending=True).tolist()
        reply.relevant = [names[i] for i in ranked if relevant[i]]
        return reply
