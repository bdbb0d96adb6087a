"""A model's emotion graph of one dialogue, the data of Figures 5 and 6."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ecore.data.batches import MAX_CONTEXT_WORDS
from ecore.data.text import tokenize
from ecore.errors import InputError
from ecore.model.edges import graph_edges, has_graph
from ecore.model.perceiver import Perceiver
from ecore.paper.figures.drawing import NotDrawn

if TYPE_CHECKING:
    from ecore.model.base import EmpatheticModel

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Trace:
    """The values of a model's graph for one dialogue; M words with ``[CLS]``, P emotions.

    Attributes:
        words: M, ``[CLS]`` first, as written in the (lower case, tokenized) dialogue.
        turns: M, each word's turn, counted from 0; -1 for ``[CLS]``.
        emotions: P names.
        word_edges: [M, P], E^{w-e} as Eq. 8 sums it: what each word receives from each emotion, summed over
            resolutions; 0 for ``[CLS]`` with ``graph_norm``.
        emotion_edges: [P, P], E^{e-e} as Eq. 8 aggregates by it (``Perceptron.aggregation``): row i receives from
            column j.
        before: [P], the sum of ``word_edges`` over words.
        after: [P], h^g = ``emotion_edges`` ``before`` (Eq. 8).
        perceived_before: [P], Softmax(h^m) were ``before`` in h^g's place in Eq. 9.
        perceived: [P], Softmax(h^m) (Eq. 10).
        emotion: the true emotion, where it is known.
    """

    words: tuple[str, ...]
    turns: tuple[int, ...]
    emotions: tuple[str, ...]
    word_edges: Array
    emotion_edges: Array
    before: Array
    after: Array
    perceived_before: Array
    perceived: Array
    emotion: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain lists and names, as JSON has them."""
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}

    @property
    def heading(self) -> str:
        """The perceived emotion and, where it is known, the true one."""
        best = int(self.perceived.argmax())
        caption = f"perceived: {self.emotions[best]} ({100 * self.perceived[best]:.0f} %)"
        return caption if self.emotion is None else f"{caption}   true: {self.emotion}"


@torch.no_grad()
def trace(model: EmpatheticModel, turns: Sequence[str], emotion: str | None = None) -> Trace:
    """Read the graph's edges after the first pass over one dialogue, the speaker's turn first.

    Raises:
        InputError: no turn, or a turn without words.
        NotDrawn: a model without the emotion graph.
    """
    if model.config.backbone:
        raise NotDrawn("the run has a pre-trained backbone, whose subwords this figure does not draw")
    tokens = [tokenize(turn) for turn in turns]
    if not tokens or not all(tokens):
        raise InputError("dialogue: expected at least one turn, and words in each")
    perceiver = model.perceiver
    if not isinstance(perceiver, Perceiver) or not has_graph(model):
        raise NotDrawn("the run has no emotion graph (--ablate graph or --strategy none)")
    model.eval()
    batch = model.read([list(turns)]).to(model.device)
    _, context = model.encode_words(batch)
    assert context is not None  # a model with a perceiver gives it what to read
    perceived = perceiver(context)
    word_edges, emotion_edges, before, after, perceived_before = (
        tensor[0].cpu().numpy() for tensor in graph_edges(perceiver, context, perceived)
    )
    flat = [(word, i) for i, turn in enumerate(tokens) for word in turn][-MAX_CONTEXT_WORDS:]
    return Trace(
        words=("[CLS]", *(word for word, _ in flat)),
        turns=(-1, *(turn for _, turn in flat)),
        emotions=model.vocabulary.emotions,
        word_edges=word_edges,
        emotion_edges=emotion_edges,
        before=before,
        after=after,
        perceived_before=perceived_before,
        perceived=perceived.main_logits[0].softmax(-1).cpu().numpy(),
        emotion=emotion,
    )
